"""The branch ``scale``: the input's channels are multiplied by factors that even out their ranges.

The weight is divided by the factors: MPQ-DM's pre-scaling (arXiv 2412.11549), like SmoothQuant.
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

# The exponents a in tenths, with factors max|W| ** (1 - a) / max|X| ** a: how much of the
# activation's range moves to the weight. MPQ-DM takes 5; here it is measured which one is best.
TENTHS = (3, 5, 7, 9)


@dataclass(frozen=True)
class ScaledMatrix:
    """A ``body``, the weight divided by the input's channel ``factors`` float16 [C]."""

    body: QuantizedMatrix
    factors: Array

    def dequantize(self) -> Array:
        """Return the dequantized weight for the unscaled input, float32 [O, K]."""
        taps = self.body.codes.shape[1] // len(self.factors)
        return np.asarray(self.body.dequantize() * by_column(self.factors, taps), np.float32)

    def arrays(self) -> dict[str, Array]:
        """Return the body's arrays and the factors."""
        return {"factors": self.factors, **self.body.arrays()}


@dataclass(frozen=True)
class Prescaled(Branch):
    """Factors with the exponent ``amount`` / 10. Nothing is computed beside the body."""

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
        """Return the scheme itself: its body is rounded for the scaled input with all others."""
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
        """Make the quantizer in torch; latent and adapter are those of the divided weight."""
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
    """Return the indices of ``factors`` [A, C] in ascending order of expected error, int32 [A].

    Rounding x f in steps of s adds noise of variance s^2 / 12 to each channel. The weight divided
    by f amplifies the noise by sum_c (max|W_c| / f_c)^2. s is proportional to the widest scaled
    channel at each timestep of ``amax_by_timestep`` [K, C]; the error is the mean over timesteps.
    Our choice.
    """
    wide = factors.astype(np.float64)
    steps = (amax_by_timestep[:, None] * wide).max(axis=2)
    noise = np.square(steps).mean(axis=0) * np.square(weight_amax / wide).sum(axis=1)
    return np.argsort(noise, kind="stable").astype(np.int32)


def by_column(factors: Array, taps: int) -> Array:
    """Return the channel ``factors`` [C] repeated for each weight column, float32 [C * taps]."""
    return np.repeat(factors.astype(np.float32), taps)


def scale_factors(weight_amax: Array, input_amax: Array, share: float) -> Array:
    """Return factors that match each input channel's range to its weights' range, float16 [C].

    With ``share`` a in [0, 1] the factors are max|W_c|^(1-a) / max|X_c|^a, divided by their
    geometric mean (the scales absorb it). Except for the mean, a = 0.5 is MPQ-DM's delta =
    sqrt(max|W_c| / max|X_c|) (its published code). Channels with a maximum of 0 have the factor 1.
    Bounded to 2^-10 .. 2^10, so that FP16 holds factors and products (our choice).
    """
    usable = (weight_amax > 0) & (input_amax > 0)
    logs = np.zeros(len(usable))
    logs[usable] = (1 - share) * np.log2(weight_amax[usable]) - share * np.log2(input_amax[usable])
    logs[usable] -= logs[usable].mean() if usable.any() else 0.0
    return np.asarray(np.exp2(np.clip(logs, -10, 10)), np.float16)
