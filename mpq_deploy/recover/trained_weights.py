"""The weight of one layer as training sees it: a latent moved by an adapter, through the quantizer of its scheme.

One class per deployed form (plain, rows, cols, scale, lowrank, FP16), one for simulated ones. Each gives the deployed
weight in torch, and at the end the codes and scales to write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpq_deploy.formats.branch_matrices import (
    ColsMatrix,
    LowRankMatrix,
    RowsMatrix,
    ScaledMatrix,
    by_column,
    columns_of,
)
from mpq_deploy.formats.candidates import DeployedMatrix, fold_matrix
from mpq_deploy.formats.scheme import INT4, INT8, Precision, Scheme
from mpq_deploy.formats.simulated import SimulatedMatrix
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.recover.adapters import Adapter
from mpq_deploy.recover.torch_quantizers import Grid, Levels, halved
from mpq_deploy.rounding.quantizers import QuantizedMatrix

Tensor = Any  # torch.Tensor; torch is not followed by mypy here


@dataclass(frozen=True)
class StartingWeight:
    """What a layer's training starts from: its scheme, the plan's codes (None for FP16), the float weight [O, K]."""

    layer: Layer
    scheme: Scheme
    matrix: DeployedMatrix | None
    weight: Array


class LayerWeight(torch.nn.Module):  # type: ignore[misc]
    """Base of all forms. ``step``: the mean weight step, by which the adapter's learning rate is scaled."""

    def __init__(self, start: StartingWeight, adapter: Adapter, step: float) -> None:
        super().__init__()
        self.layer, self.adapter, self.step = start.layer, adapter, step
        # What the deployed weight stands for, float [O, K].
        self.target = start.weight

    def matrix(self) -> Tensor:
        """Return the deployed weight [O, K]."""
        return self.through(self.adapter())

    def through(self, delta: Tensor) -> Tensor:
        """Return the deployed weight [O, K] of the latent moved by ``delta`` [O, K]."""
        raise NotImplementedError

    def deployed(self) -> DeployedMatrix | None:
        """Return the codes and scales to write; None for FP16."""
        raise NotImplementedError

    def constants(self) -> dict[str, Array]:
        """Return what replaces constants of the exported graph: the weight of an FP16 layer."""
        return {}

    def forward(self) -> Tensor:
        """Return the deployed weight in its shape in the file."""
        return self.folded(self.matrix())

    def folded(self, matrix: Tensor) -> Tensor:
        """Bring a matrix [O, K] to the weight's shape in the file."""
        return (matrix if self.layer.out_axis == 0 else matrix.T).reshape(self.layer.weight_shape)


class PlainWeight(LayerWeight):
    """Integers and scales, nothing beside them."""

    def __init__(self, start: StartingWeight, adapter: Adapter, margin: float) -> None:
        assert isinstance(start.matrix, QuantizedMatrix)
        grid = grid_of(start.matrix, start.weight, start.scheme.weight, margin)
        super().__init__(start, adapter, mean_step(grid))
        self.grid = grid

    def through(self, delta: Tensor) -> Tensor:
        """See the base."""
        return self.grid(delta)

    def deployed(self) -> QuantizedMatrix:
        """See the base."""
        return merged(self.grid, self.adapter())


class RowsWeight(LayerWeight):
    """An INT4 body, and INT8 for the promoted output channels."""

    def __init__(self, start: StartingWeight, adapter: Adapter, margin: float) -> None:
        assert isinstance(start.matrix, RowsMatrix)
        rows = start.matrix.rows
        others = np.setdiff1d(np.arange(start.layer.out_channels), rows)
        body = grid_of(start.matrix.body, start.weight[others], start.scheme.body.weight, margin)
        super().__init__(start, adapter, mean_step(body))
        self.body = body
        self.promoted = grid_of(start.matrix.promoted, start.weight[rows], INT8, margin)
        self._start = start.matrix
        self.register_buffer("others", torch.from_numpy(others.astype(np.int64)))
        self.register_buffer("rows", torch.from_numpy(rows.astype(np.int64)))
        self.register_buffer("order", torch.from_numpy(start.matrix.order.astype(np.int64)))

    def through(self, delta: Tensor) -> Tensor:
        """See the base."""
        parts = [self.body(delta[self.others]), self.promoted(delta[self.rows])]
        return torch.cat(parts)[self.order]

    def deployed(self) -> RowsMatrix:
        """See the base."""
        delta, start = self.adapter(), self._start
        body = _with_rows(start.every_body, self.others.cpu().numpy(), merged(self.body, delta[self.others]))
        promoted = _with_rows(start.every_int8, start.rows, merged(self.promoted, delta[self.rows]))
        return RowsMatrix(body, promoted, start.rows)


class ColsWeight(LayerWeight):
    """A body, and FP16 columns for the outlier input channels."""

    def __init__(self, start: StartingWeight, adapter: Adapter, margin: float) -> None:
        assert isinstance(start.matrix, ColsMatrix)
        grid = grid_of(start.matrix.body, start.weight, start.scheme.body.weight, margin)
        super().__init__(start, adapter, mean_step(grid))
        taps = start.matrix.weight.shape[1] // len(start.matrix.columns)
        columns = columns_of(start.matrix.columns, taps).astype(np.int64)
        self.grid, self._channels = grid, start.matrix.columns
        self.register_buffer("columns", torch.from_numpy(columns))
        self.register_buffer("outliers", torch.from_numpy(start.weight[:, columns]))

    def through(self, delta: Tensor) -> Tensor:
        """See the base."""
        return self.grid(delta).index_copy(1, self.columns, halved(self.outliers + delta[:, self.columns]))

    def deployed(self) -> ColsMatrix:
        """See the base."""
        delta = self.adapter()
        body = merged(self.grid, delta)
        columns = self.columns.cpu().numpy()
        body.codes[:, columns] = 0
        outliers = halved(self.outliers + delta[:, self.columns]).detach().cpu().numpy()
        return ColsMatrix(body, outliers.astype(np.float16), self._channels)


class ScaledWeight(LayerWeight):
    """A weight divided by the factors of its input's channels: latent and adapter live on that side of them."""

    def __init__(self, start: StartingWeight, adapter: Adapter, margin: float) -> None:
        assert isinstance(start.matrix, ScaledMatrix)
        divided = start.weight / by_column(start.matrix.factors, start.weight.shape[1] // len(start.matrix.factors))
        grid = grid_of(start.matrix.body, divided, start.scheme.body.weight, margin)
        super().__init__(start, adapter, mean_step(grid))
        self.grid, self.factors, self.target = grid, start.matrix.factors, divided

    def through(self, delta: Tensor) -> Tensor:
        """See the base."""
        return self.grid(delta)

    def deployed(self) -> ScaledMatrix:
        """See the base."""
        return ScaledMatrix(merged(self.grid, self.adapter()), self.factors)


class LowRankWeight(LayerWeight):
    """An INT4 body beside two FP16 factors, which learn as they are."""

    def __init__(self, start: StartingWeight, adapter: Adapter, margin: float) -> None:
        assert isinstance(start.matrix, LowRankMatrix)
        factors = start.matrix.up.astype(np.float32), start.matrix.down.astype(np.float32)
        rest = start.weight - factors[0] @ factors[1]
        grid = grid_of(start.matrix.body, rest, start.scheme.body.weight, margin)
        super().__init__(start, adapter, mean_step(grid))
        self.grid = grid
        self.up, self.down = (torch.nn.Parameter(torch.from_numpy(factor)) for factor in factors)

    def through(self, delta: Tensor) -> Tensor:
        """See the base."""
        return self.grid(delta) + halved(self.up) @ halved(self.down)

    def deployed(self) -> LowRankMatrix:
        """See the base."""
        up, down = (halved(f).detach().cpu().numpy().astype(np.float16) for f in (self.up, self.down))
        return LowRankMatrix(merged(self.grid, self.adapter()), down, up)


class SimulatedWeight(LayerWeight):
    """A weight that no engine can hold: each output channel has its own levels."""

    def __init__(self, start: StartingWeight, adapter: Adapter, margin: float) -> None:
        assert isinstance(start.matrix, SimulatedMatrix)
        levels = Levels(start.matrix, start.weight, margin)
        super().__init__(start, adapter, float(levels.step.mean()))
        self.levels = levels

    def through(self, delta: Tensor) -> Tensor:
        """See the base."""
        return self.levels(delta)

    def deployed(self) -> SimulatedMatrix:
        """See the base."""
        return self.levels.merged(self.adapter())


class HalfWeight(LayerWeight):
    """An FP16 layer: it can make up for what others lost, at no byte more."""

    def __init__(self, start: StartingWeight, adapter: Adapter) -> None:
        # The spacing of FP16 numbers of the weight's size would be no learning rate; that of INT8 codes is.
        super().__init__(start, adapter, float(np.abs(start.weight).max() / INT8.quant_max) or 1.0)
        self.register_buffer("float_weight", torch.from_numpy(np.array(start.weight, np.float32)))

    def through(self, delta: Tensor) -> Tensor:
        """See the base."""
        return halved(self.float_weight + delta)

    def deployed(self) -> None:
        """See the base."""

    def constants(self) -> dict[str, Array]:
        """See the base."""
        return {self.layer.weight: fold_matrix(self.layer, self.matrix().detach().cpu().numpy())}


def layer_weight(start: StartingWeight, rank: int, margin: float, rng: np.random.Generator) -> LayerWeight:
    """Make the trainable weight of a layer: the form that its plan deploys."""
    rows, columns = start.weight.shape
    adapter = Adapter(rows, columns, rank, rng)
    if start.matrix is None:
        return HalfWeight(start, adapter)
    forms: dict[type, type[LayerWeight]] = {
        QuantizedMatrix: PlainWeight,
        RowsMatrix: RowsWeight,
        ColsMatrix: ColsWeight,
        LowRankMatrix: LowRankWeight,
        ScaledMatrix: ScaledWeight,
        SimulatedMatrix: SimulatedWeight,
    }
    return forms[type(start.matrix)](start, adapter, margin)


def grid_of(matrix: QuantizedMatrix, weight: Array, precision: Precision | None, margin: float) -> Grid:
    """Make the grid that starts from a deployed ``matrix`` of ``weight`` float [O, K]."""
    precision = precision or INT4
    limits = precision.quant_min, precision.quant_max
    if matrix.channel_scale is None:
        return Grid(matrix.codes, matrix.scale, weight, *limits, margin)
    channel = matrix.channel_scale[:, None]
    multiples = np.rint(matrix.scale.astype(np.float32) / channel.astype(np.float32))
    return Grid(matrix.codes, channel, weight, *limits, margin, multiples)


def merged(grid: Grid, delta: Tensor) -> QuantizedMatrix:
    """Return the codes and scales that a grid stands for with the latent moved by ``delta``."""
    with torch.no_grad():
        codes = grid.codes(delta).cpu().numpy().astype(np.int8)
    scale = grid.scale.stored()
    if grid.multiples is None:
        return QuantizedMatrix(codes, scale)
    blocks = grid.multiples.cpu().numpy() * scale.astype(np.float32)
    return QuantizedMatrix(codes, blocks.astype(np.float16), scale[:, 0])


def mean_step(grid: Grid) -> float:
    """Return the mean of a grid's first steps."""
    return float(grid.first.mean())


def _with_rows(whole: QuantizedMatrix, rows: Array, part: QuantizedMatrix) -> QuantizedMatrix:
    """Return ``whole`` with its ``rows`` replaced by those of ``part``."""

    def replaced(old: Array | None, new: Array | None) -> Array | None:
        if old is None or new is None:
            return None
        copy: Array = old.copy()
        copy[rows] = new
        return copy

    codes, scale = replaced(whole.codes, part.codes), replaced(whole.scale, part.scale)
    assert codes is not None and scale is not None
    return QuantizedMatrix(codes, scale, replaced(whole.channel_scale, part.channel_scale))
