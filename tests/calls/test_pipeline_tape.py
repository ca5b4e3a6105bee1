"""The derivative of a pipeline's image against differences of images that diffusers makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from mpq_deploy.calls.pipeline_runs import PipelineRuns  # noqa: E402
from mpq_deploy.calls.pipeline_tape import PipelineTape  # noqa: E402
from mpq_deploy.calls.sampler_tape import NoTrajectory  # noqa: E402
from mpq_deploy.errors import ModelError  # noqa: E402
from tests.oracle.comparison import open_case  # noqa: E402
from tests.oracle.pipelines import STEPS, save_case  # noqa: E402
from tests.oracle.trajectories import SEED, agreement  # noqa: E402

pytestmark = pytest.mark.torch
# Guidance and decoder; inputs that another network makes of the samples; two calls in a step; pixels
# that leave torch in the pipeline itself; a video's frames.
EXACT = (
    "StableDiffusionPipeline",
    "StableDiffusionControlNetPipeline",
    "FluxPipeline with a negative prompt",
    "DDIMPipeline",
    "WanPipeline of two transformers",
)


@pytest.mark.parametrize("name", EXACT)
def test_errors_of_the_denoiser_change_the_image_as_the_tape_says(
    name: str, tmp_path: Path
) -> None:
    case = save_case(name, tmp_path)
    found = agreement(case, open_case(case), (4e-4,))
    assert found.predicted == pytest.approx(found.measured[0], rel=0.02)


def test_a_pipeline_that_leaves_torch_on_the_way_has_no_trajectory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = save_case("DDIMPipeline", tmp_path)
    denoiser = open_case(case)
    runs = PipelineRuns(case.folder, denoiser.spec)
    scheduler = type(runs._pipeline.scheduler)
    step = scheduler.step

    def detached(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        return step(self, output.detach(), *args, **kwargs)

    for other in (detached, torch.no_grad()(step)):
        monkeypatch.setattr(scheduler, "step", other)
        with pytest.raises(NoTrajectory, match="takes samples out of their derivative"):
            PipelineTape.of(runs, 0, STEPS, SEED, denoiser.network.reference)

    def through_numpy(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        return step(self, torch.from_numpy(output.numpy()), *args, **kwargs)

    monkeypatch.setattr(scheduler, "step", through_numpy)
    with pytest.raises(NoTrajectory, match="no single tensor with a derivative"):
        PipelineTape.of(runs, 0, STEPS, SEED, denoiser.network.reference)
    # The same pipeline makes its images as before.
    monkeypatch.setattr(scheduler, "step", step)
    runs.compute = denoiser.network.reference
    assert runs.image(0, STEPS, SEED).shape[0] == 1


def test_an_output_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    case = save_case("DDIMPipeline", tmp_path)
    denoiser = open_case(case)
    runs = PipelineRuns(case.folder, denoiser.spec)
    with pytest.raises(ModelError, match="not finite at call 1 of an image"):
        PipelineTape.of(runs, 0, STEPS, SEED, lambda feeds: feeds["sample"] * float("nan"))
