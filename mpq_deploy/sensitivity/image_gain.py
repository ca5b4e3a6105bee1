"""The gain from an error of one pipeline part's output to an error of the final images.

Noise of a small relative size is added to the part's output while the float pipeline runs. The gain
is the relative squared error of the images divided by that of the part's output. Half of a
denoiser's noise (in its square) is the same at every step: a quantized denoiser's error is partly
constant, too, while noise drawn anew at each step averages out. Two sizes of noise check that
small errors are quadratic. Our choice; predictions by it are compared with measured images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from mpq_deploy.calls.pipeline_runs import image_seed
from mpq_deploy.calls.whole_pipeline import PartCall, WholePipeline
from mpq_deploy.models.spec import Array
from mpq_deploy.system.progress import Talk

# Relative sizes of the noise (the gain is that of the first), and the number of images measured.
SIZES = (0.01, 0.03)
IMAGES = 4
# Where the gains of the two sizes differ by more than this factor, errors are not quadratic.
APART = 1.5
# Share of the noise's square that a denoiser keeps from step to step (our choice: on two tiny
# pipelines the gains of quantized denoisers were 1.15 and 0.67 times what this share gives; a share
# of 1 gives gains 1.6 and 2.7 times too high, a share of 0 gains 5 and 3 times too low).
STAYS = 0.5


class Gain(BaseModel):
    """A part's ``gain`` at the smaller and at the larger noise; batch ``rows`` per image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gain: float
    at_larger: float
    rows: float

    @property
    def quadratic(self) -> bool:
        """Whether both sizes of noise give about the same gain."""
        low, high = sorted((self.gain, self.at_larger))
        return high <= APART * low


def measure_gains(
    pipeline: WholePipeline, names: Sequence[str], steps: int, seed: int, talk: Talk
) -> dict[str, Gain]:
    """Run the pipeline; return each part's gain and rows, gain 0 for parts not in ``names``."""
    found: dict[str, list[float]] = {}
    with talk.bar("gains", IMAGES * (1 + len(SIZES) * len(names))) as advance:

        def images(name: str = "", size: float = 0.0) -> list[Array]:
            made = []
            for number in range(IMAGES):
                own = image_seed(seed, number)
                steady = bool(name) and pipeline.specs[name].timestep is not None
                noise = {name: _Noise(size, own, STAYS if steady else 0.0)} if name else {}
                made.append(pipeline.image(number, steps, own, noise))
                advance(1)
            return made

        exact = images()
        rows = {name: count / IMAGES for name, count in pipeline.rows.items()}
        for name in names:
            found[name] = [relative_error(images(name, size), exact) / size**2 for size in SIZES]
    zero = [0.0] * len(SIZES)
    return {
        name: Gain(gain=gain, at_larger=larger, rows=rows[name])
        for name in rows
        for gain, larger in [found.get(name, zero)]
    }


class _Noise:
    """Adds noise with an rms of ``size`` times the rms of a part's output.

    ``stays``: share of the noise's square that is drawn once for all calls of an image.
    """

    def __init__(self, size: float, seed: int, stays: float) -> None:
        self._generator = np.random.default_rng(seed)
        self._size, self._stays = size, stays
        self._first: Array | None = None

    def __call__(self, call: PartCall) -> Array:
        """Return the output with noise."""
        value = call.output
        drawn = np.asarray(self._generator.standard_normal(value.shape))
        if self._first is None or self._first.shape != value.shape:
            self._first = drawn
        else:
            drawn = self._first * self._stays**0.5 + drawn * (1 - self._stays) ** 0.5
        unit = float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
        return np.asarray(value + drawn * (self._size * unit), np.float32)


def relative_error(made: Sequence[Array], exact: Sequence[Array]) -> float:
    """Return the squared error of the images ``made``, relative to the squares of ``exact``."""
    pairs = zip(made, exact, strict=True)
    error = sum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in pairs)
    # Black images have no size that an error could be relative to.
    return error / (sum(float(np.sum(np.square(b, dtype=np.float64))) for b in exact) or 1.0)
