"""The branch ``rows``: salient output channels are stored in INT8, all others in the INT4 body.

MPQ-DM gives such channels one bit more; the deployable form is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.formats.int8 import W8A8, W8A16
from mpq_deploy.formats.integers import integer_format
from mpq_deploy.formats.interfaces import INT8, Branch, Forms, Scheme
from mpq_deploy.formats.sizes import FP16_BYTES, INT32_BYTES, part_of
from mpq_deploy.rounding.quantizers import QuantizedMatrix

if TYPE_CHECKING:
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter
    from mpq_deploy.latency.roofline import Traffic
    from mpq_deploy.models.spec import Array
    from mpq_deploy.recover.trained_weights import LayerTwin, LayerWeight, StartingWeight, TwinKit

Tensor = Any  # torch.Tensor

# Variants, from MPQ-DM's group search: m = 0, k, 2k, ... output channels, up to half, k = O // 10.
TENTHS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class RowsMatrix:
    """An INT4 body and INT8 rows for the output channels ``rows`` (int32 [m], ascending).

    ``every_body`` and ``every_int8`` hold all O channels in INT4 and in INT8, and are shared with
    other schemes; the properties below take the deployed channels from them.
    """

    every_body: QuantizedMatrix
    every_int8: QuantizedMatrix
    rows: Array

    @property
    def body(self) -> QuantizedMatrix:
        """The channels that are not promoted, in ascending order, [O - m, K]."""
        return self.every_body.take(self.others)

    @property
    def promoted(self) -> QuantizedMatrix:
        """The promoted channels, [m, K]."""
        return self.every_int8.take(self.rows)

    @property
    def order(self) -> Array:
        """The index of each output channel in the concatenation of body and promoted, int32 [O]."""
        return np.argsort(np.concatenate([self.others, self.rows])).astype(np.int32)

    @property
    def others(self) -> Array:
        """The channels that stay in the body, int [O - m]."""
        return np.setdiff1d(np.arange(len(self.every_body.codes)), self.rows)

    def dequantize(self) -> Array:
        """Return the dequantized weight, float32 [O, K]."""
        whole = self.every_body.dequantize()
        whole[self.rows] = self.promoted.dequantize()
        return whole

    def arrays(self) -> dict[str, Array]:
        """Return nothing: two stored forms and the stored order of channels contain the matrix."""
        return {}


@dataclass(frozen=True)
class Rows(Branch):
    """``amount`` tenths of the output channels have INT8 weights.

    The node computes the body's output channels, and a second node of the same operator the
    promoted ones. A Concat joins them and a Gather restores the channels' order (in one kernel).
    """

    kind = "rows"
    meaning = "its salient output channels in 8-bit weights"
    # The second product, and the kernel that joins the channels.
    kernels = 2
    promotes = True

    def suits(self, body: Scheme) -> bool:
        return body.weight.bits == 4 and not body.simulated

    def promoted(self, layer: Layer) -> int:
        """Return the number of promoted output channels: ``amount`` (O // 10), as in MPQ-DM."""
        return self.amount * (layer.out_channels // 10)

    def refusal(self, layer: Layer) -> str:
        if self.promoted(layer):
            return ""
        return f"a tenth of its {layer.out_channels} output channels is less than one"

    def parts(self, layer: Layer, scheme: Scheme) -> tuple[tuple[Layer, Scheme], ...]:
        count = self.promoted(layer)
        int8 = W8A8 if scheme.activation else W8A16
        rest = part_of(layer, layer.out_channels - count)
        return (rest, scheme.body), (part_of(layer, count, "promoted"), int8)

    def joining_bytes(self, layer: Layer) -> int:
        """Return the bytes of the order of the channels."""
        return INT32_BYTES * layer.out_channels

    def nominal_bits(self, layer: Layer, body: int) -> float:
        return body + (INT8.bits - body) * self.promoted(layer) / layer.out_channels

    def rounds_first(self, scheme: Scheme) -> tuple[Scheme, ...]:
        return scheme.body, W8A16

    def assemble(self, scheme: Scheme, layer: Layer, forms: Forms, order: Array) -> RowsMatrix:
        body, int8 = forms[scheme.body.weight_form], forms[W8A16.weight_form]
        assert isinstance(body, QuantizedMatrix) and isinstance(int8, QuantizedMatrix)
        return promote_rows(body, int8, order[: self.promoted(layer)])

    def write(self, to: LayerWriter, scheme: Scheme, matrix: RowsMatrix) -> None:
        node, output = to.node, to.node.outputs[0]
        twin = to.copy("promoted")
        to.graph.insert_after(node, twin)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            assert bias.const_value is not None
            values = bias.const_value.numpy()
            halves = (node, "body", matrix.others), (twin, "promoted", matrix.rows)
            for half, name, channels in halves:
                half.replace_input_with(
                    2, to.named_constant(f"{bias.name}//{name}", values[channels])
                )
            del to.graph.initializers[bias.name or ""]
        (body_layer, body), (promoted_layer, promoted) = self.parts(to.layer, scheme)
        super().write(to.of(body_layer), body, matrix.body)
        super().write(to.of(promoted_layer, twin), promoted, matrix.promoted)
        # Gemm's output has two axes; TensorRT takes negative axes as well.
        axis = {"axis": -1 if to.layer.op == "MatMul" else 1}
        concat = to.beside("Concat", [output, twin.outputs[0]], axis, "join")
        order = to.named_constant(f"{to.layer.weight}//order", matrix.order)
        gather = to.beside("Gather", [concat.outputs[0], order], axis, "restore")
        to.graph.insert_after(twin, [concat, gather])
        to.hand_over(output, gather, concat)

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        matrix: RowsMatrix = start.matrix
        rows, others = matrix.rows, matrix.others
        body_codes = integer_format(start.scheme.body).precision
        body = kit.grid(matrix.body, start.weight[others], body_codes)
        promoted = kit.grid(matrix.promoted, start.weight[rows], INT8)

        def through(w: LayerWeight, delta: Tensor) -> Tensor:
            return kit.cat([w.body(delta[w.others]), w.promoted(delta[w.rows])])[w.order]

        def deployed(w: LayerWeight, delta: Tensor) -> RowsMatrix:
            new = w.body.merged(delta[w.others]), w.promoted.merged(delta[w.rows])
            wholes = (
                matrix.every_body.with_rows(others, new[0]),
                matrix.every_int8.with_rows(rows, new[1]),
            )
            return RowsMatrix(*wholes, rows)

        indices = {"others": others, "rows": rows, "order": matrix.order}
        parts = {
            "body": body,
            "promoted": promoted,
            **{name: kit.indices(i) for name, i in indices.items()},
        }
        return kit.twin(parts, through, deployed, body.mean_step)

    def traffic(self, layer: Layer, whole: Traffic) -> tuple[Traffic, ...]:
        positions, count = whole.outputs // layer.out_channels, self.promoted(layer)
        parts = layer.out_channels - count, count
        return tuple(replace(whole, outputs=positions * channels) for channels in parts)

    def joining_traffic(self, layer: Layer, whole: Traffic) -> int:
        return 2 * FP16_BYTES * whole.outputs


def promote_rows(body: QuantizedMatrix, int8: QuantizedMatrix, rows: Array) -> RowsMatrix:
    """Return the matrix with output channels ``rows`` from ``int8``, the others from ``body``.

    Both hold all output channels.
    """
    return RowsMatrix(body, int8, np.sort(np.asarray(rows, np.int32)))
