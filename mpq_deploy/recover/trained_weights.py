"""The trained weight of a layer: a latent moved by an adapter, through its scheme's quantizer.

What that quantizer is in torch (a ``LayerTwin``) is made by the scheme's format or branch, with the
``TwinKit``. A twin gives the deployed weight, and at the end the codes and scales to write.
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
    """Where a layer's training starts: the plan's codes (None for FP16), the float weight [O, K]."""

    matrix: Any  # of the class that the scheme's format or branch makes
    weight: Array


@dataclass(frozen=True)
class LayerTwin:
    """The quantizer of one weight in torch.

    ``parts``: its modules, parameters and buffers, by name, which the ``LayerWeight`` w takes over.
    ``through(w, delta)``: the deployed weight [O, K] of the latent moved by ``delta`` [O, K];
    ``deployed(w, delta)``: its codes and scales, None for FP16. ``step``: the mean weight step, by
    which the adapter's learning rate is scaled; ``target``: what the deployed weight stands for,
    float [O, K].
    """

    parts: Mapping[str, Any]
    through: Callable[[Any, Tensor], Tensor]
    deployed: Callable[[Any, Tensor], DeployedMatrix | None]
    step: float
    target: Array | None = None


@dataclass(frozen=True)
class TwinKit:
    """What twins are made of. ``margin`` of the latent weights: see ``Grid``."""

    margin: float

    twin = LayerTwin
    cat = staticmethod(torch.cat)
    halved = staticmethod(halved)

    def grid(self, matrix: QuantizedMatrix, weight: Array, precision: Precision) -> Grid:
        """Return the grid that starts from a deployed ``matrix`` of ``weight`` float [O, K]."""
        return Grid(matrix, weight, (precision.quant_min, precision.quant_max), self.margin)

    def levels(self, matrix: SimulatedMatrix, weight: Array) -> Levels:
        """Return the levels of each row that start from ``matrix`` of ``weight`` float [O, K]."""
        return Levels(matrix, weight, self.margin)

    def float_levels(self, matrix: LevelMatrix, weight: Array) -> FloatLevels:
        """Return the levels that start from a ``matrix`` of small floats."""
        return FloatLevels(matrix, weight, self.margin)

    def of(self, grid: Grid | Levels | FloatLevels) -> LayerTwin:
        """Return the twin of a weight that is ``grid`` and nothing else."""
        through, deployed = (
            (lambda w, delta: w.grid(delta)),
            (lambda w, delta: w.grid.merged(delta)),
        )
        return LayerTwin({"grid": grid}, through, deployed, grid.mean_step)

    def of_half(self, weight: Array) -> LayerTwin:
        """Return the twin of an FP16 weight, which can make up for others at no extra byte."""
        # The spacing of FP16 numbers of the weight's size would be no learning rate; that of INT8
        # codes is.
        step = float(np.abs(weight).max() / INT8.quant_max) or 1.0
        parts = {"float_weight": self.tensor(weight)}
        return LayerTwin(
            parts, lambda w, delta: halved(w.float_weight + delta), lambda w, delta: None, step
        )

    def tensor(self, array: Array) -> Tensor:
        """Return a float32 tensor."""
        return torch.from_numpy(np.array(array, np.float32))

    def indices(self, array: Array) -> Tensor:
        """Return a tensor to index with."""
        return torch.from_numpy(array.astype(np.int64))

    def parameter(self, array: Array) -> Tensor:
        """Return a parameter, which is learned."""
        return torch.nn.Parameter(torch.from_numpy(array))

    def array(self, tensor: Tensor, dtype: type[np.generic]) -> Array:
        """Return the values of ``tensor``."""
        return np.asarray(tensor.detach().cpu().numpy().astype(dtype))


class Adapter(torch.nn.Module):  # type: ignore[misc]
    """``up`` [O, r] times ``down`` [r, K] (EfficientDM's B and A), which moves a latent weight.

    Starts as EfficientDM's does, A by Kaiming (uniform within 1 / sqrt(K)), B zero, so that the
    product is zero. With ``rank`` 0 ``up`` [O, K] is all there is: every code learns by itself (our
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
        """Take other factors [O, r] and [r, K] to start from."""
        with torch.no_grad():
            if self.down is None:
                self.up.copy_(up @ down)
            else:
                self.up.copy_(up)
                self.down.copy_(down)


class LayerWeight(torch.nn.Module):  # type: ignore[misc]
    """The trainable weight of a layer: an adapter, and its twin's parts by their names."""

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
        """Return the deployed weight [O, K]."""
        return self.through(self.adapter())

    def through(self, delta: Tensor) -> Tensor:
        """Return the deployed weight [O, K] of the latent moved by ``delta`` [O, K]."""
        return self._twin.through(self, delta)

    def deployed(self) -> DeployedMatrix | None:
        """Return the codes and scales to write; None for FP16."""
        return self._twin.deployed(self, self.adapter())

    def constants(self) -> dict[str, Array]:
        """Return what replaces constants of the exported graph: the weight of an FP16 layer."""
        if self._quantized:
            return {}
        return {self.layer.weight: fold_matrix(self.layer, self.matrix().detach().cpu().numpy())}

    def forward(self) -> Tensor:
        """Return the deployed weight in its shape in the file."""
        return self.folded(self.matrix())

    def folded(self, matrix: Tensor) -> Tensor:
        """Bring a matrix [O, K] to the weight's shape in the file."""
        return (matrix if self.layer.out_axis == 0 else matrix.T).reshape(self.layer.weight_shape)


def layer_weight(
    start: StartingWeight, rank: int, margin: float, rng: np.random.Generator
) -> LayerWeight:
    """Make the trainable weight of a layer: the form that its plan deploys."""
    rows, columns = start.weight.shape
    return LayerWeight(start, Adapter(rows, columns, rank, rng), margin)
