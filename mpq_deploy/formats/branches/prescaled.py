"""The branch ``scale``: the input's channels are multiplied by factors that even out their ranges.

The weight is divided by them: MPQ-DM's pre-scaling (arXiv 2412.11549), as SmoothQuant's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.formats.integers import integer_format
from mpq_deploy.formats.interfaces import Branch, DeployedMatrix, Scheme, StoredMatrix
from mpq_deploy.formats.sizes import FP16_BYTES, input_channels
from mpq_deploy.rounding.quantizers import QuantizedMatrix

if TYPE_CHECKING:
    from mpq_deploy.calibrate.stats import ActivationStats
    from mpq_deploy.formats.layer_rounding import LayerRounding
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter
    from mpq_deploy.models.spec import Array
    from mpq_deploy.recover.trained_weights import LayerTwin, StartingWeight, TwinKit

# Tenths of the activation's range that move to the weight: factors max|W| ** (1 - a) / max|X| ** a.
# MPQ-DM's is 5; which one a layer takes is measured.
TENTHS = (3, 5, 7, 9)


@dataclass(frozen=True)
class ScaledMatrix:
    """A body: the weight divided by the ``factors`` float16 [C] by which the input's channels are multiplied."""

    body: QuantizedMatrix
    factors: Array

    def dequantize(self) -> Array:
        """Return the weight that acts on the input as it was, float32 [O, K]."""
        taps = self.body.codes.shape[1] // len(self.factors)
        return np.asarray(self.body.dequantize() * by_column(self.factors, taps), np.float32)

    def arrays(self) -> dict[str, Array]:
        """The body's, and the factors."""
        return {"factors": self.factors, **self.body.arrays()}


@dataclass(frozen=True)
class Prescaled(Branch):
    """``amount`` tenths of the activation's range move to the weight. Nothing is computed beside the body."""

    kind = "scale"
    meaning = "input channels scaled to even out their ranges"
    rescales = True

    @property
    def activation_form(self) -> str:
        return self.suffix

    def suits(self, body: Scheme) -> bool:
        return body.activation is not None and not body.simulated

    def input_scale(self, stats: ActivationStats) -> float:
        return float(stats.scales_rescaled[TENTHS.index(self.amount)])

    def input_amax(self, stats: ActivationStats) -> Array:
        factors = stats.factors[TENTHS.index(self.amount)].astype(np.float32)
        return np.asarray((stats.amax_by_timestep * factors).max(axis=1))

    def rank(self, stats: ActivationStats) -> int:
        return int(np.flatnonzero(stats.exponents == TENTHS.index(self.amount))[0])

    def input_bytes(self, layer: Layer) -> int:
        return FP16_BYTES * input_channels(layer)

    def factors(self, stats: ActivationStats) -> Array | None:
        return np.asarray(stats.factors[TENTHS.index(self.amount)])

    def factors_in(self, matrix: ScaledMatrix) -> Array | None:
        return matrix.factors

    def rounds_first(self, scheme: Scheme) -> tuple[Scheme, ...]:
        """The body as the rescaled input sees it, with all other bodies."""
        return (scheme,)

    def rescaling(self, layer: LayerRounding) -> Array:
        assert layer.inputs.factors is not None, (
            "branches that rescale the input's channels need the factors"
        )
        return np.asarray(layer.inputs.factors[TENTHS.index(self.amount)])

    def around(self, body: DeployedMatrix, layer: LayerRounding) -> ScaledMatrix:
        assert isinstance(body, QuantizedMatrix)
        return ScaledMatrix(body, self.rescaling(layer))

    def read(self, scheme: Scheme, stored: StoredMatrix) -> ScaledMatrix:
        return ScaledMatrix(QuantizedMatrix.of(stored.arrays), stored.arrays["factors"])

    def write(self, to: LayerWriter, scheme: Scheme, matrix: ScaledMatrix) -> None:
        super().write(to, scheme, matrix.body)

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        """Latent and adapter live on the factors' side of the weight."""
        matrix: ScaledMatrix = start.matrix
        taps = start.weight.shape[1] // len(matrix.factors)
        divided = start.weight / by_column(matrix.factors, taps)
        grid = kit.grid(matrix.body, divided, integer_format(start.scheme.body).precision)
        return kit.twin(
            {"grid": grid},
            lambda w, delta: w.grid(delta),
            lambda w, delta: ScaledMatrix(w.grid.merged(delta), matrix.factors),
            grid.mean_step,
            divided,
        )


def exponent_order(weight_amax: Array, amax_by_timestep: Array, factors: Array) -> Array:
    """Return the rows of ``factors`` [A, C] by the error that rounding leaves in the readers' outputs, int32 [A].

    The least first: rounding x f in steps of s is noise of s^2 / 12 in each channel, which the
    weight divided by f makes sum_c (max|W_c| / f_c)^2 times as large; s follows the widest channel
    of each timestep of ``amax_by_timestep`` [K, C], in the mean over timesteps. Our choice.
    """
    wide = factors.astype(np.float64)
    steps = (amax_by_timestep[:, None] * wide).max(axis=2)
    noise = np.square(steps).mean(axis=0) * np.square(weight_amax / wide).sum(axis=1)
    return np.argsort(noise, kind="stable").astype(np.int32)


def by_column(factors: Array, taps: int) -> Array:
    """Return the factors of the input channels for each column of the weight matrix, float32 [C * taps]."""
    return np.repeat(factors.astype(np.float32), taps)


def scale_factors(weight_amax: Array, input_amax: Array, share: float) -> Array:
    """Return factors that match each input channel's range to its weights', float16 [C].

    With ``share`` a in [0, 1] the factors are max|W_c|^(1-a) / max|X_c|^a, brought to a geometric
    mean of 1: for a = 0.5 MPQ-DM's delta = sqrt(max|W_c| / max|X_c|) (its published code) but for
    that mean, which the scales take up. Channels that are zero on either side keep 1. Bounded to
    2^-10 .. 2^10, so that FP16 holds both the factors and what they make (our choice).
    """
    usable = (weight_amax > 0) & (input_amax > 0)
    logs = np.zeros(len(usable))
    logs[usable] = (1 - share) * np.log2(weight_amax[usable]) - share * np.log2(input_amax[usable])
    logs[usable] -= logs[usable].mean() if usable.any() else 0.0
    return np.asarray(np.exp2(np.clip(logs, -10, 10)), np.float16)
