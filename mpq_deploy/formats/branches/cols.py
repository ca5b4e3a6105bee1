"""The branch ``cols``: outlier input channels are computed in FP16, all others by the INT8 body."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.formats.fp16 import FP16
from mpq_deploy.formats.integers import integer_format, round_alone
from mpq_deploy.formats.interfaces import Branch, Forms, Scheme, StoredMatrix
from mpq_deploy.formats.sizes import FP16_BYTES, INT32_BYTES, input_channels, outlier_count, part_of
from mpq_deploy.rounding.quantizers import QuantizedMatrix

if TYPE_CHECKING:
    from mpq_deploy.calibrate.stats import ActivationStats
    from mpq_deploy.formats.layer_rounding import LayerRounding
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter
    from mpq_deploy.latency.roofline import Traffic
    from mpq_deploy.models.spec import Array
    from mpq_deploy.recover.trained_weights import LayerTwin, LayerWeight, StartingWeight, TwinKit

Tensor = Any  # torch.Tensor

# Variants: how many thirty-seconds of the input channels are outliers.
SHARES = (1, 2)


@dataclass(frozen=True)
class ColsMatrix:
    """A body with zero weights for the outlier channels, and the FP16 weights of these channels.

    ``columns`` int32 [n]: the outlier channels; ``weight`` float16 [O, n * taps]: their columns,
    the ``taps`` of each channel together.
    """

    body: QuantizedMatrix
    weight: Array
    columns: Array

    @property
    def places(self) -> Array:
        """The columns of the layer's weight matrix that ``weight`` holds, int [n * taps]."""
        return columns_of(self.columns, self.weight.shape[1] // len(self.columns))

    def dequantize(self) -> Array:
        """Return the dequantized weight, float32 [O, K]."""
        whole = self.body.dequantize()
        whole[:, self.places] = self.weight.astype(np.float32)
        return whole

    def arrays(self) -> dict[str, Array]:
        """Return the body's arrays and the channels; their FP16 weights are in the float model."""
        return {"columns": self.columns, **self.body.arrays()}


@dataclass(frozen=True)
class Cols(Branch):
    """``amount`` thirty-seconds of the input channels go through a Gather and a small FP16 product.

    The body reads the INT8 activation, whose scale ignores the outlier channels, and has zero
    weights for them. An Add joins both outputs.
    """

    kind = "cols"
    meaning = "its outlier input channels in FP16"
    # The Gather and the small product: TensorRT-RTX fuses the Add into the product before it.
    kernels = 2

    @property
    def activation_form(self) -> str:
        return self.suffix

    def suits(self, body: Scheme) -> bool:
        return body.activation is not None and not body.simulated

    def columns(self, layer: Layer) -> int:
        """Return the number of outlier channels of ``layer``."""
        return outlier_count(input_channels(layer), self.amount)

    def refusal(self, layer: Layer) -> str:
        if 2 * self.columns(layer) <= input_channels(layer):
            return ""
        return f"its {input_channels(layer)} input channels are too few to move some out"

    def parts(self, layer: Layer, scheme: Scheme) -> tuple[tuple[Layer, Scheme], ...]:
        shape = list(layer.weight_shape)
        shape[1 - layer.out_axis] = self.columns(layer)
        outliers = replace(
            part_of(layer, layer.out_channels, "outliers"), weight_shape=tuple(shape)
        )
        return (layer, scheme.body), (outliers, FP16)

    def joining_bytes(self, layer: Layer) -> int:
        """Return the bytes of the indices of the Gather."""
        return INT32_BYTES * self.columns(layer)

    def nominal_bits(self, layer: Layer, body: int) -> float:
        return body + (FP16.weight.bits - body) * self.columns(layer) / input_channels(layer)

    def input_scale(self, stats: ActivationStats) -> float:
        return float(stats.scales_without[SHARES.index(self.amount)])

    def left_out(self, stats: ActivationStats) -> Array:
        return np.sort(stats.outliers[: outlier_count(len(stats.outliers), self.amount)])

    def round(self, scheme: Scheme, layer: LayerRounding, forms: Forms) -> ColsMatrix:
        """Return the matrix; its body is rounded as if the outlier channels did not exist."""
        assert layer.inputs.outliers is not None, (
            "branches that take outlier channels out need to know them"
        )
        channels = np.sort(layer.inputs.outliers[: self.columns(layer.layer)])
        rest, moments = without_columns(
            layer.weight, layer.moments, columns_of(channels, layer.taps)
        )
        return beside_body(
            round_alone(scheme.body, layer, rest, moments), layer.weight, channels, layer.taps
        )

    def read(self, scheme: Scheme, stored: StoredMatrix) -> ColsMatrix:
        taps = stored.layer.reduction // input_channels(stored.layer)
        return beside_body(
            QuantizedMatrix.of(stored.arrays), stored.weight, stored.arrays["columns"], taps
        )

    def write(self, to: LayerWriter, scheme: Scheme, matrix: ColsMatrix) -> None:
        # Copy the node before the body is written, which may replace it by a matrix product.
        twin = to.copy("outliers", bias=False)
        super().write(to, scheme, matrix.body)
        layer, shape = to.layer, list(to.layer.weight_shape)
        shape[1 - layer.out_axis] = len(matrix.columns)
        weight = (matrix.weight if layer.out_axis == 0 else matrix.weight.T).reshape(shape)
        indices = to.named_constant(f"{layer.weight}//outlier_channels", matrix.columns)
        axis = {"axis": 1 if layer.op == "Conv" else -1}
        gather = to.beside("Gather", [to.x, indices], axis, "outlier_channels", to.x)
        twin.replace_input_with(0, gather.outputs[0])
        twin.replace_input_with(
            1, to.named_constant(f"{layer.weight}//outliers", weight.astype(np.float32))
        )
        to.add_output([gather, twin], "outliers_add")

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        matrix: ColsMatrix = start.matrix
        grid = kit.grid(matrix.body, start.weight, integer_format(start.scheme.body).precision)

        def outliers(w: LayerWeight, delta: Tensor) -> Tensor:
            return kit.halved(w.outliers + delta[:, w.columns])

        def through(w: LayerWeight, delta: Tensor) -> Tensor:
            return w.grid(delta).index_copy(1, w.columns, outliers(w, delta))

        def deployed(w: LayerWeight, delta: Tensor) -> ColsMatrix:
            body = w.grid.merged(delta)
            body.codes[:, matrix.places] = 0
            return ColsMatrix(body, kit.array(outliers(w, delta), np.float16), matrix.columns)

        parts = {
            "grid": grid,
            "columns": kit.indices(matrix.places),
            "outliers": kit.tensor(start.weight[:, matrix.places]),
        }
        return kit.twin(parts, through, deployed, grid.mean_step)

    def traffic(self, layer: Layer, whole: Traffic) -> tuple[Traffic, ...]:
        return whole, replace(whole, inputs=self._gathered(layer, whole))

    def joining_traffic(self, layer: Layer, whole: Traffic) -> int:
        return FP16_BYTES * whole.outputs + 2 * FP16_BYTES * self._gathered(layer, whole)

    def _gathered(self, layer: Layer, whole: Traffic) -> int:
        return whole.inputs * self.columns(layer) // (input_channels(layer) * layer.group)


def columns_of(channels: Array, taps: int) -> Array:
    """Return the columns of the weight matrix of the input ``channels``, ``taps`` for each."""
    return np.asarray((channels[:, None] * taps + np.arange(taps)).reshape(-1))


def without_columns(
    weight: Array, moments: list[Array], columns: Array
) -> tuple[Array, list[Array]]:
    """Return the weight [O, K] and the Hessian blocks with ``columns`` set to zero.

    The branch computes those columns in FP16, so the body's rounding must not compensate errors in
    them.
    """
    rest = weight.copy()
    rest[:, columns] = 0
    kept, start = [], 0
    for block in moments:
        inside = columns[(columns >= start) & (columns < start + len(block))] - start
        cut = np.array(block)
        cut[inside], cut[:, inside] = 0, 0
        kept.append(cut)
        start += len(block)
    return rest, kept


def beside_body(body: QuantizedMatrix, weight: Array, channels: Array, taps: int) -> ColsMatrix:
    """Combine a ``body`` with the FP16 columns of ``weight`` [O, K] for ``channels``, ascending."""
    return ColsMatrix(body, weight[:, columns_of(channels, taps)].astype(np.float16), channels)
