"""The trained weight of a layer: the scheme's quantizer applied to a latent weight plus an adapter.

The scheme's format or branch makes the quantizer in torch (a ``LayerTwin``) with a ``TwinKit``. A
twin gives the dequantized weight, and after training the codes and scales to write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpq_deploy.formats.candidates import fold_matrix
from mpq_deploy.formats.interfaces import INT8, DeployedMatrix, Precision
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite
from mpq_deploy.models.spec import Array
from mpq_deploy.recover.torch_quantizers import FloatLevels, Grid, Levels, halved
from mpq_deploy.rounding.float_levels import LevelMatrix
from mpq_deploy.rounding.quantizers import QuantizedMatrix
from mpq_deploy.rounding.row_grids import SimulatedMatrix

Tensor = Any  # torch.Tensor; torch is not followed by mypy here


@dataclass(frozen=True)
class StartingWeight(LayerRewrite):
    """Where a layer's training starts.

    ``matrix``: the plan's codes and scales, None for FP16; ``weight``: the float weight [O, K].
    """

    matrix: Any  # of the class that the scheme's format or branch makes
    weight: Array


@dataclass(frozen=True)
class LayerTwin:
    """The quantizer of one weight in torch.

    ``parts``: name -> module, parameter or buffer, which become attributes of the ``LayerWeight``
    w. ``through(w, delta)``: the dequantized weight [O, K] of the latent plus ``delta`` [O, K];
    ``deployed(w, delta)``: its codes and scales, None for FP16. ``step``: the mean weight step, the
    unit of the adapter's learning rate. ``target``: the float weight [O, K] that the dequantized
    weight approximates; None: the layer's own.
    """

    parts: Mapping[str, Any]
    through: Callable[[Any, Tensor], Tensor]
    deployed: Callable[[Any, Tensor], DeployedMatrix | None]
    step: float
    target: Array | None = None


@dataclass(frozen=True)
class TwinKit:
    """The building blocks of twins. ``margin`` of the latent weights: see ``Grid``."""

    margin: float

    twin = LayerTwin
    cat = staticmethod(torch.cat)
    halved = staticmethod(halved)

    def grid(self, matrix: QuantizedMatrix, weight: Array, precision: Precision) -> Grid:
        """Return the ``Grid`` that starts from ``matrix``, the rounded ``weight`` float [O, K]."""
        return Grid(matrix, weight, (precision.quant_min, precision.quant_max), self.margin)

    def levels(self, matrix: SimulatedMatrix, weight: Array) -> Levels:
        """Return the ``Levels`` that start from ``matrix``, the rounded ``weight`` float [O, K]."""
        return Levels(matrix, weight, self.margin)

    def float_levels(self, matrix: LevelMatrix, weight: Array) -> FloatLevels:
        """Return the ``FloatLevels`` that start from ``matrix``, the rounded ``weight`` [O, K]."""
        return FloatLevels(matrix, weight, self.margin)

    def of(self, grid: Grid | Levels | FloatLevels) -> LayerTwin:
        """Return the twin of a weight without a branch, quantized by ``grid``."""
        through, deployed = (
            (lambda w, delta: w.grid(delta)),
            (lambda w, delta: w.grid.merged(delta)),
        )
        return LayerTwin({"grid": grid}, through, deployed, grid.mean_step)

    def of_half(self, weight: Array) -> LayerTwin:
        """Return the twin of an FP16 weight, trained to compensate other layers' errors."""
        # The step of an INT8 quantizer: that of FP16 is too small as a unit of learning rates.
        step = float(np.abs(weight).max() / INT8.quant_max) or 1.0
        parts = {"float_weight": self.tensor(weight)}
        return LayerTwin(
            parts, lambda w, delta: halved(w.float_weight + delta), lambda w, delta: None, step
        )

    def tensor(self, array: Array) -> Tensor:
        """Return a float32 tensor."""
        return torch.from_numpy(np.array(array, np.float32))

    def indices(self, array: Array) -> Tensor:
        """Return an int64 tensor, to index with."""
        return torch.from_numpy(array.astype(np.int64))

    def parameter(self, array: Array) -> Tensor:
        """Return a learned parameter."""
        return torch.nn.Parameter(torch.from_numpy(array))

    def array(self, tensor: Tensor, dtype: type[np.generic]) -> Array:
        """Return the values of ``tensor`` as a NumPy array."""
        return np.asarray(tensor.detach().cpu().numpy().astype(dtype))


class Adapter(torch.nn.Module):  # type: ignore[misc]
    """A low-rank update of a latent weight: ``up`` [O, r] times ``down`` [r, K].

    These are EfficientDM's B and A, and start as there: A uniform within 1 / sqrt(K) (Kaiming), B
    zero, so that the product is zero. With ``rank`` 0 ``up`` is the whole update [O, K] (our
    choice, where memory allows).
    """

    def __init__(self, rows: int, columns: int, rank: int, rng: np.random.Generator) -> None:
        super().__init__()
        rank = min(rank, rows, columns)
        self.up = torch.nn.Parameter(torch.zeros(rows, rank or columns))
        self.down: torch.nn.Parameter | None = None
        if rank:
            bound = 1 / math.sqrt(columns)
            down = rng.uniform(-bound, bound, (rank, columns)).astype(np.float32)
            self.down = torch.nn.Parameter(torch.from_numpy(down))

    def forward(self) -> Tensor:
        """Return the product [O, K]."""
        return self.up if self.down is None else self.up @ self.down

    def start_from(self, up: Tensor, down: Tensor) -> None:
        """Set the factors to ``up`` [O, r] and ``down`` [r, K]."""
        with torch.no_grad():
            if self.down is None:
                self.up.copy_(up @ down)
            else:
                self.up.copy_(up)
                self.down.copy_(down)


class LayerWeight(torch.nn.Module):  # type: ignore[misc]
    """The trainable weight of a layer: an adapter and a twin, whose parts are attributes."""

    def __init__(self, start: StartingWeight, adapter: Adapter, margin: float) -> None:
        super().__init__()
        self.layer, self.adapter, self.factors = start.layer, adapter, start.factors
        self._twin = start.scheme.branch.twin(start, TwinKit(margin))
        for name, part in self._twin.parts.items():
            if isinstance(part, (torch.nn.Module, torch.nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.step, self._quantized = self._twin.step, start.scheme.quantized
        self.target = start.weight if self._twin.target is None else self._twin.target

    def matrix(self) -> Tensor:
        """Return the dequantized weight [O, K] of the current adapter."""
        return self.through(self.adapter())

    def through(self, delta: Tensor) -> Tensor:
        """Return the dequantized weight [O, K] of the latent plus ``delta`` [O, K]."""
        return self._twin.through(self, delta)

    def deployed(self) -> DeployedMatrix | None:
        """Return the codes and scales to write; None for FP16."""
        return self._twin.deployed(self, self.adapter())

    def constants(self) -> dict[str, Array]:
        """Return name -> new constant of the exported graph: the weight of an FP16 layer, or {}."""
        if self._quantized:
            return {}
        return {self.layer.weight: fold_matrix(self.layer, self.matrix().detach().cpu().numpy())}

    def forward(self) -> Tensor:
        """Return the dequantized weight in the shape that it has in the ONNX file."""
        return self.folded(self.matrix())

    def folded(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` [O, K] in the shape that the weight has in the ONNX file."""
        return (matrix if self.layer.out_axis == 0 else matrix.T).reshape(self.layer.weight_shape)


def layer_weight(
    start: StartingWeight, rank: int, margin: float, rng: np.random.Generator
) -> LayerWeight:
    """Make the trainable weight of a layer, with the quantizer of its scheme in the plan."""
    rows, columns = start.weight.shape
    return LayerWeight(start, Adapter(rows, columns, rank, rng), margin)
