"""The final images of a pipeline with its parts quantized, beside those of the float pipeline.

In: the float pipeline and the quantized graph of each part. Out: the error of the images with all
parts quantized, and with each alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from mpq_deploy.calls.pipeline_runs import image_seed
from mpq_deploy.calls.whole_pipeline import Change, WholePipeline
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.sensitivity.image_gain import relative_error
from mpq_deploy.system.progress import Talk


class FinalImages(BaseModel):
    """Relative squared errors of the final images: of ``all`` parts together, and of each alone.

    ``psnr_db``: of all parts together, mean over images whose range is 1; None where they are equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    together: float
    alone: dict[str, float]
    psnr_db: float | None


def compare_images(
    pipeline: WholePipeline,
    graphs: Mapping[str, Path],
    count: int,
    steps: int,
    seed: int,
    talk: Talk,
) -> FinalImages:
    """Run the pipeline in float, with all ``graphs`` (part -> ONNX file), and with each alone."""
    changes = {name: _computed(path, pipeline.specs[name]) for name, path in graphs.items()}
    with talk.bar("final images", count * (2 + len(graphs))) as advance:

        def images(chosen: Mapping[str, Change]) -> list[Array]:
            made = []
            for number in range(count):
                made.append(pipeline.image(number, steps, image_seed(seed, number), chosen))
                advance(1)
            return made

        exact = images({})
        together = images(changes)
        alone = {
            name: relative_error(images({name: change}), exact) for name, change in changes.items()
        }
    errors = [float(np.mean(np.square(a - b))) for a, b in zip(together, exact)]
    psnr = float(np.mean([-10 * np.log10(e) for e in errors])) if all(errors) else None
    return FinalImages(
        images=count, together=relative_error(together, exact), alone=alone, psnr_db=psnr
    )


def _computed(path: Path, spec: DenoiserSpec) -> Change:
    session = OrtDenoiser(path, spec, fake_quant_only=True)
    return lambda call: session.run(call.feeds())
