"""What a diffusers pipeline returns, with the float model and with each variant as its denoiser."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from mpq_deploy.calls.pipeline_lanes import Image, images_in_lanes
from mpq_deploy.calls.pipeline_runs import PipelineRuns, image_seed, shown_call
from mpq_deploy.calls.record_pipeline import Runs, joined_images, pipeline_folder, record_pipeline
from mpq_deploy.evaluate.images import as_maps
from mpq_deploy.evaluate.setup import Part, Setup, finite_output
from mpq_deploy.models.spec import Array
from mpq_deploy.runtime.correction import Correction
from mpq_deploy.runtime.ort import OrtDenoiser

# The pipeline that was loaded last, by its folder and its denoiser's description.
_LOADED: dict[tuple[Path, str], PipelineRuns] = {}


def runs_of(setup: Setup, correction: Correction | None = None) -> PipelineRuns:
    """Return the pipeline, loaded once for all variants."""
    folder = pipeline_folder(setup.float_model(Path()))
    if correction is not None:
        # Its scheduler stands behind the correction from then on.
        return PipelineRuns(folder, setup.spec, correction=correction)
    key = (folder, setup.spec.model_dump_json())
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = PipelineRuns(folder, setup.spec)
    return _LOADED[key]


def forget_pipeline() -> None:
    """Give back the memory of the pipeline that ``runs_of`` has loaded."""
    _LOADED.clear()


def pipeline_reference(setup: Setup, part: Part, path: Path) -> dict[str, Array]:
    """Run the pipeline with the float model as its denoiser, for the images of ``part``."""
    settings, images = setup.settings, part.images or range(len(setup.rows))
    numbers = [int(setup.rows[place]) for place in images]
    runs = Runs(numbers, settings.steps, settings.seed, images.start)
    denoiser = OrtDenoiser.in_lanes(path, setup.spec)
    with tempfile.TemporaryDirectory() as folder:
        made = record_pipeline(
            setup.float_model(path),
            runs,
            settings.timesteps,
            Path(folder),
            setup.talk,
            denoiser.run,
            outputs=True,
            lanes=denoiser.lanes,
        )
        return {
            "images": as_maps(made.images),
            **made.calls.arrays(),
            "outputs": made.outputs,
            "sampler": np.array(made.name),
        }


def pipeline_images(setup: Setup, part: Part, denoiser: OrtDenoiser) -> Array:
    """Return what the pipeline gives with a variant as its denoiser, from the float run's noise."""
    timestep = setup.spec.timestep_name

    def compute(feeds: dict[str, Array]) -> Array:
        at = float(np.ravel(feeds[timestep])[0]) if timestep else 0.0
        return finite_output(denoiser.run(feeds), part.name, at)

    runs = runs_of(setup, correction=part.correction)
    places = range(len(setup.rows)) if part.images is None else part.images
    wanted = (
        Image(int(setup.rows[place]), image_seed(setup.settings.seed, place), compute)
        for place in places
    )
    images = []
    with setup.talk.bar(f"run {runs.short_name} with {part.name}", len(places)) as advance:
        for image in images_in_lanes(runs, wanted, setup.settings.steps, denoiser.lanes):
            images.append(image)
            advance(1)
    return as_maps(joined_images(images))


def pipeline_notes(setup: Setup, pictures: bool, value_range: tuple[float, float]) -> list[str]:
    """Say what was run, and with what."""
    assert setup.spec.pipeline is not None
    name, call = setup.spec.pipeline.class_name, setup.spec.pipeline.calls[int(setup.rows[0])]
    notes = [
        f"The samples are what {name} of diffusers returns, run with the float model and with each variant in its "
        f"{setup.spec.pipeline.component}'s place; the first was called with {shown_call(call)}."
    ]
    if not pictures:
        notes.append(
            "It returns no pictures: PSNR and SSIM compare its arrays, with the float run's range "
            f"[{value_range[0]:.3g}, {value_range[1]:.3g}] as the peak."
        )
    return notes


def correction_note(setup: Setup, correction: Correction) -> str:
    """Say what of a correction applies to the pipeline's scheduler."""
    return runs_of(setup, correction=correction).correction_note
