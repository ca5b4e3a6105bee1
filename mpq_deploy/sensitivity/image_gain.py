"""What an error of a part's output does to the pipeline's final images: a gain per part.

A part's output is changed by random noise of a small relative size while the float pipeline runs;
the relative squared error of the images over that of the output is the gain. Errors are quadratic
for small changes, which two sizes of noise check. Our choice; white noise has not the shape of a
quantized model's error, so predictions by it are compared with measured images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from mpq_deploy.calls.pipeline_runs import image_seed
from mpq_deploy.calls.whole_pipeline import Change, WholePipeline
from mpq_deploy.models.spec import Array
from mpq_deploy.system.progress import Talk

# Relative sizes of the noise, the one of the gain first; and the images that it is measured on.
SIZES = (0.01, 0.03)
IMAGES = 4
# The gains of the two sizes are this many times apart where errors are not quadratic.
APART = 1.5


class Gain(BaseModel):
    """A part's ``gain``, that of the larger noise, and the rows that the part computes per image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gain: float
    at_larger: float
    rows: float

    @property
    def quadratic(self) -> bool:
        """Whether both sizes of noise give about one gain."""
        low, high = sorted((self.gain, self.at_larger))
        return high <= APART * low


def measure_gains(
    pipeline: WholePipeline, names: Sequence[str], steps: int, seed: int, talk: Talk
) -> dict[str, Gain]:
    """Return the gain of each part in ``names``, and the rows of all parts, by runs of the pipeline."""
    found: dict[str, list[float]] = {}
    with talk.bar("gains", IMAGES * (1 + len(SIZES) * len(names))) as advance:

        def images(name: str = "", size: float = 0.0) -> list[Array]:
            made = []
            for number in range(IMAGES):
                noise = np.random.default_rng((seed, number, len(name), *name.encode()))
                changes = {name: _noisy(noise, size)} if name else {}
                made.append(pipeline.image(number, steps, image_seed(seed, number), changes))
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


def _noisy(noise: np.random.Generator, size: float) -> Change:
    def change(feeds: Mapping[str, Array], value: Array) -> Array:
        unit = float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
        drawn = noise.standard_normal(value.shape) * size * unit
        return np.asarray(value + drawn, np.float32)

    return change


def relative_error(made: Sequence[Array], exact: Sequence[Array]) -> float:
    """Return the squared error of images over the squares of the exact ones."""
    error = sum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in zip(made, exact))
    return error / sum(float(np.sum(np.square(b, dtype=np.float64))) for b in exact)
