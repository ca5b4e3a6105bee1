"""The branch ``lowrank``: two FP16 factors approximate the rounding error of the weight.

They minimize the error of the layer's output at the given rank. Our choice, after SVDQuant, which
splits the weight before rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.formats.fp16 import FP16
from mpq_deploy.formats.integers import integer_format
from mpq_deploy.formats.interfaces import Branch, Forms, Scheme, StoredMatrix
from mpq_deploy.formats.sizes import FP16_BYTES, part_of
from mpq_deploy.rounding.arrays import cast, fetched, names_of, placed
from mpq_deploy.rounding.quantizers import QuantizedMatrix, damped

if TYPE_CHECKING:
    from mpq_deploy.formats.layer_rounding import LayerRounding
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter
    from mpq_deploy.latency.roofline import Traffic
    from mpq_deploy.models.spec import Array
    from mpq_deploy.recover.trained_weights import LayerTwin, LayerWeight, StartingWeight, TwinKit

Tensor = Any  # torch.Tensor

RANKS = (8, 16)


@dataclass(frozen=True)
class LowRankMatrix:
    """An INT4 body beside two FP16 factors: ``up`` float16 [O, r] times ``down`` float16 [r, K]."""

    body: QuantizedMatrix
    down: Array
    up: Array

    def dequantize(self) -> Array:
        """Return the dequantized weight, float32 [O, K]."""
        product = self.up.astype(np.float32) @ self.down.astype(np.float32)
        return np.asarray(self.body.dequantize() + product, np.float32)

    def arrays(self) -> dict[str, Array]:
        """Return the factors; the body is stored as a form of its own."""
        return {"down": self.down, "up": self.up}


@dataclass(frozen=True)
class LowRank(Branch):
    """Two FP16 factors of rank ``amount``: two nodes apply them to the input, an Add joins both."""

    kind = "lowrank"
    meaning = "two FP16 low-rank factors beside it"
    # The products with the factors: TensorRT-RTX fuses the Add into the product before it.
    kernels = 2

    def suits(self, body: Scheme) -> bool:
        return body.weight.bits == 4 and body.activation is None and not body.simulated

    def refusal(self, layer: Layer) -> str:
        if layer.window is not None:
            # Seen in builds: the engine has both factors, but its log does not name the second.
            return "its engine cannot be verified beside a convolution written as a product"
        if 2 * self.amount <= min(layer.out_channels, layer.reduction):
            return ""
        size = f"{layer.out_channels} x {layer.reduction}"
        return f"rank {self.amount} is not small compared with its {size} weight"

    def parts(self, layer: Layer, scheme: Scheme) -> tuple[tuple[Layer, Scheme], ...]:
        """Return body and factors; the second factor is a 1x1 Conv, or the layer's own operator."""
        down = part_of(layer, self.amount, "lowrank_down")
        up = part_of(layer, layer.out_channels, "lowrank_up")
        shape = (
            (layer.out_channels, self.amount)
            if layer.out_axis == 0
            else (self.amount, layer.out_channels)
        )
        ones = tuple(1 for _ in layer.kernel)
        return (layer, scheme.body), (down, FP16), (replace(up, weight_shape=(*shape, *ones)), FP16)

    def round(self, scheme: Scheme, layer: LayerRounding, forms: Forms) -> LowRankMatrix:
        body = forms[scheme.body.weight_form]
        assert isinstance(body, QuantizedMatrix)
        error = layer.weight - body.dequantize()
        return LowRankMatrix(
            body, *low_rank_factors(error, layer.moments, layer.how.damping, self.amount)
        )

    def read(self, scheme: Scheme, stored: StoredMatrix) -> LowRankMatrix:
        assert isinstance(stored.body, QuantizedMatrix)
        return LowRankMatrix(stored.body, stored.arrays["down"], stored.arrays["up"])

    def write(self, to: LayerWriter, scheme: Scheme, matrix: LowRankMatrix) -> None:
        # Copy the node before the body is written, which may replace it by a matrix product.
        down = to.copy("lowrank_down", bias=False)
        super().write(to, scheme, matrix.body)
        layer, first = to.layer, to.layer.out_axis == 0
        _, (down_layer, _), (up_layer, _) = self.parts(layer, scheme)
        values = []
        for part, factor in ((down_layer, matrix.down), (up_layer, matrix.up)):
            array = (factor if first else factor.T).reshape(part.weight_shape).astype(np.float32)
            values.append(to.named_constant(part.weight, array))
        down.replace_input_with(0, to.x)
        down.replace_input_with(1, values[0])
        attributes = {"transB": 1} if layer.op == "Gemm" and first else {}
        up = to.beside(layer.op, [down.outputs[0], values[1]], attributes, "lowrank_up")
        to.add_output([down, up], "lowrank_add")

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        """Make the quantizer in torch; the factors are parameters of their own."""
        matrix: LowRankMatrix = start.matrix
        up, down = matrix.up.astype(np.float32), matrix.down.astype(np.float32)
        precision = integer_format(start.scheme.body).precision
        grid = kit.grid(matrix.body, start.weight - up @ down, precision)

        def through(w: LayerWeight, delta: Tensor) -> Tensor:
            return w.grid(delta) + kit.halved(w.up) @ kit.halved(w.down)

        def deployed(w: LayerWeight, delta: Tensor) -> LowRankMatrix:
            factors = (kit.array(kit.halved(factor), np.float16) for factor in (w.down, w.up))
            return LowRankMatrix(w.grid.merged(delta), *factors)

        parts = {"grid": grid, "up": kit.parameter(up), "down": kit.parameter(down)}
        return kit.twin(parts, through, deployed, grid.mean_step)

    def traffic(self, layer: Layer, whole: Traffic) -> tuple[Traffic, ...]:
        between = whole.outputs // layer.out_channels * self.amount
        return whole, replace(whole, outputs=between), replace(whole, inputs=between)

    def joining_traffic(self, layer: Layer, whole: Traffic) -> int:
        return FP16_BYTES * whole.outputs


def low_rank_factors(
    error: Array, moments: list[Array], damping: float, rank: int
) -> tuple[Array, Array]:
    """Return FP16 factors (down [r, K], up [O, r]) that approximate ``error`` [O, K].

    They minimize the error of the layer's output, |(error - up down) L|, at this rank, where H =
    L L^T is the damped mean of x x^T, given as its diagonal blocks ``moments``. The solution is the
    truncated SVD of error L.
    """
    exact = cast(placed(error), np.float64)
    xp, start, parts = names_of(exact), 0, []
    for block in moments:
        root = xp.linalg.cholesky(damped(placed(block), damping))
        parts.append(exact[:, start : start + len(block)] @ root)
        start += len(block)
    seen = xp.concatenate(parts, axis=1)
    # The left singular vectors, from the small Gram matrix; projecting on them is optimal.
    _, vectors = xp.linalg.eigh(seen @ seen.T)
    up = xp.flip(vectors, 1)[:, :rank]
    # Eigenvectors have arbitrary signs: fix them, so that equal inputs give equal bytes.
    largest = up[xp.argmax(xp.abs(up), axis=0), xp.arange(rank)]
    up = up * xp.where(largest < 0, -1.0, 1.0)
    down = up.T @ exact
    # Balance the norms of both factors, so that FP16 keeps the same precision in both.
    size = xp.sqrt(xp.maximum(xp.linalg.norm(down, axis=1), np.finfo(np.float16).tiny))
    factors = cast(down / size[:, None], np.float16), cast(up * size, np.float16)
    return fetched(factors[0]), fetched(factors[1])
