"""A build that goes on with more calls keeps those recorded, and ends as a fresh one would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from mpq_deploy.system.parallel.work import Crew
from tests.graphs import denoiser_graph
from tests.pipeline.runs import Notes, build, open_pipeline, recipe_for, save_denoiser, stage_bytes
from tests.tiny_models import ONE_LEVEL, tiny_text_pipeline_folder

STAGES = ("calibrate", "candidates", "measure", "allocate", "evaluate")
QUICK: dict[str, Any] = {"calibrate__samples": 6, "calibrate__timesteps": 2}
THOROUGH: dict[str, Any] = {
    "calibrate__samples": 11,
    "calibrate__timesteps": 3,
    "calibrate__observed": 8,
    "measure__samples": 4,
    "measure__probes": 3,
    "quantize__refinements": 3,
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that sessions ran."""
    seen: list[int] = []
    run = ort.InferenceSession.run

    def counted(self: Any, names: Any, feeds: dict[str, Any], *args: Any) -> Any:
        seen.append(len(feeds["sample"]))
        return run(self, names, feeds, *args)

    monkeypatch.setattr(ort.InferenceSession, "run", counted)
    return seen


def calibrated(
    model: Path, run: Path, rows: list[int], crew: Crew | None = None, **changes: Any
) -> tuple[int, str]:
    """Calibrate; return the rows that were run and what the stage said."""
    notes = Notes()
    with open_pipeline(recipe_for(model, **changes), run, notes, crew) as pipeline:
        pipeline.ensure("export")
        rows.clear()
        pipeline.ensure("calibrate")
    return sum(rows), [line for line in notes.lines if line.startswith("calibrate  ")][-1]


def test_more_calls_extend_those_recorded(tmp_path: Path, rows: list[int]) -> None:
    """Batches of four: of six samples the first four are kept, at timesteps that were not used before."""
    model = save_denoiser(tmp_path, denoiser_graph(channels=8, size=4))
    calibrated(model, tmp_path / "on", rows, **QUICK)
    more, said = calibrated(model, tmp_path / "on", rows, **THOROUGH)
    fresh, told = calibrated(model, tmp_path / "fresh", rows, **THOROUGH)
    assert "(kept 4 of them)" in said and "kept" not in told
    # Four trajectories of four steps.
    assert fresh - more == 4 * 4
    for run in ("on", "fresh"):
        build(recipe_for(model, **THOROUGH), tmp_path / run, "evaluate")
    assert stage_bytes(tmp_path / "on", STAGES) == stage_bytes(tmp_path / "fresh", STAGES)


STANDARD: dict[str, Any] = {"calibrate__samples": 16, "calibrate__observed": 14}
MORE: dict[str, Any] = {"calibrate__samples": 30, "calibrate__observed": 30}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_observed_is_added_to(tmp_path: Path, rows: list[int], workers: int) -> None:
    """Of 14 calls the first 12 are kept: sums over parts are the same, in one process and in several."""
    from mpq_deploy.system.parallel.processes import Processes

    model = save_denoiser(tmp_path, denoiser_graph(channels=8, size=4))
    calibrated(model, tmp_path / "on", rows, **STANDARD)
    crew = Processes(workers) if workers else None
    more, said = calibrated(model, tmp_path / "on", rows, crew, **MORE)
    fresh, _ = calibrated(model, tmp_path / "fresh", rows, **MORE)
    assert "(kept 16 of them), 12 of them observed before" in said
    # Trajectories of four steps, and two timesteps that are observed.
    assert workers or fresh - more == 16 * 4 + 12 * 2
    assert stage_bytes(tmp_path / "on") == stage_bytes(tmp_path / "fresh")
    for changes in ({"calibrate__timesteps": 3}, {"calibrate__reservoir": 300}):
        _, said = calibrated(model, tmp_path / "on", rows, **MORE, **changes)
        assert "kept" in said and "observed before" not in said


def test_what_was_observed_of_calls_that_are_run_again_is_not_kept(
    tmp_path: Path, rows: list[int]
) -> None:
    """The last of 14 samples are half a batch, which a larger batch may round otherwise."""
    model = save_denoiser(tmp_path, denoiser_graph(channels=8, size=4))
    options = {"calibrate__batch_size": 8, "calibrate__observed": 12}
    calibrated(model, tmp_path / "on", rows, calibrate__samples=14, **options)
    _, said = calibrated(model, tmp_path / "on", rows, calibrate__samples=30, **options)
    assert "(kept 8 of them), 3" not in said and "observed before" not in said


def test_workers_extend_the_calls_likewise(tmp_path: Path, rows: list[int]) -> None:
    from mpq_deploy.system.parallel.processes import Processes

    model = save_denoiser(tmp_path, denoiser_graph(channels=8, size=4))
    calibrated(model, tmp_path / "on", rows, **QUICK)
    _, said = calibrated(model, tmp_path / "on", rows, Processes(2), **THOROUGH)
    calibrated(model, tmp_path / "fresh", rows, **THOROUGH)
    assert "(kept 4 of them)" in said
    assert stage_bytes(tmp_path / "on") == stage_bytes(tmp_path / "fresh")


def test_fewer_and_other_calls(tmp_path: Path, rows: list[int]) -> None:
    """Going back needs no new ones; of another seed or sampler none is kept."""
    model = save_denoiser(tmp_path, denoiser_graph(channels=8, size=4))
    calibrated(model, tmp_path / "run", rows, **THOROUGH)
    _, said = calibrated(model, tmp_path / "run", rows, **{**QUICK, "calibrate__samples": 8})
    assert "(kept 8 of them)" in said
    for changes in ({"calibrate__seed": 5}, {"calibrate__steps": 5}, {"calibrate__batch_size": 3}):
        _, said = calibrated(model, tmp_path / "run", rows, **QUICK, **changes)
        assert "kept" not in said


def test_altered_calls_are_not_kept(tmp_path: Path, rows: list[int]) -> None:
    model = save_denoiser(tmp_path, denoiser_graph(channels=8, size=4))
    calibrated(model, tmp_path / "run", rows, **QUICK)
    file = tmp_path / "run/calibrate/calls/calls-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    _, said = calibrated(model, tmp_path / "run", rows, **THOROUGH)
    assert "kept" not in said


@pytest.mark.torch
def test_a_pipeline_makes_only_the_further_images(tmp_path: Path, rows: list[int]) -> None:
    pytest.importorskip("transformers")
    folder = tiny_text_pipeline_folder(tmp_path / "model", sample_size=8, **ONE_LEVEL)
    changes = {"target": "onnxruntime-cpu", "calibrate__timesteps": 2}
    calibrated(folder, tmp_path / "on", rows, calibrate__samples=3, **changes)
    changes["calibrate__timesteps"] = 3
    more, said = calibrated(folder, tmp_path / "on", rows, calibrate__samples=5, **changes)
    fresh, _ = calibrated(folder, tmp_path / "fresh", rows, calibrate__samples=5, **changes)
    assert "(kept 6 of them)" in said
    # Three images, of which PNDM's four steps take five calls with the prompt and five without.
    assert fresh - more == 3 * 5 * 2
    on, other = (stage_bytes(tmp_path / run, ("calibrate",)) for run in ("on", "fresh"))
    assert {name for name in other if on[name] != other[name]} <= {"calibrate/stage.json"}
