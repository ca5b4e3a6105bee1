"""A whole pipeline for several targets in one run: each has what it has alone, and the parts share their calls."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.cli import app
from mpq_deploy.cli.app import run_until
from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe
from mpq_deploy.run.folder import MARKER, base_of, several_in, target_place
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.run.several_parts import build_whole
from mpq_deploy.sensitivity.probe import Probing
from mpq_deploy.system.parallel.processes import Processes
from mpq_deploy.system.progress import Talk
from tests.pipeline.runs import FEW_SCHEMES, recipe_for, stage_bytes
from tests.tiny_models import ONE_LEVEL, tiny_text_pipeline_folder

pytestmark = pytest.mark.torch
CPU, NANO = "onnxruntime-cpu", "jetson-orin-nano"
PARTS = ("unet", "vae_decoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_pipeline_folder(tmp_path_factory.mktemp("tiny"), **ONE_LEVEL)


def recipe(folder: Path, target: str, **changes: Any) -> Recipe:
    prompts = folder.parent / "some.txt"
    prompts.write_text("abc\ndef\nghi\n", encoding="utf-8")
    given = {
        "target": target,
        "prompts": str(prompts),
        "component_samples": 8,
        "pinned": ["text_encoder"],
        "budget": 0.7,
    }
    return recipe_for(folder, **{**FEW_SCHEMES, **given, "evaluate__controls": False, **changes})


def counted_run(last: str, settings: Recipe, run: Path) -> Counter[str]:
    """Build up to ``last``; return how often the models went back through."""
    passes, probe = Counter[str](), Probing.probe

    def counted(*given: Any) -> Any:
        passes["probe"] += 1
        return probe(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probing, "probe", counted)
        run_until(last, settings, run)
    return passes


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[str]]:
    """A finished run of two targets, and its passes. Tests leave it as it is."""
    run = tmp_path_factory.mktemp("both") / "run"
    return run, counted_run("report", recipe(folder, f"{CPU},{NANO}"), run)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[str]]:
    """The second target alone, up to its plan, and its passes."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, counted_run("allocate", recipe(folder, NANO), run)


def part(run: Path, target: str, name: str) -> Path:
    return run / "targets" / target / "components" / name


def test_each_target_has_the_plan_that_it_has_alone(
    both: tuple[Path, Counter[str]], alone: tuple[Path, Counter[str]]
) -> None:
    (run, passes), (one, passes_alone) = both, alone
    assert [folder.name for folder in several_in(run)] == [CPU, NANO]
    for name in PARTS:
        own = part(run, NANO, name)
        assert base_of(own) == run / "components" / name
        for stage in ("export", "calibrate"):
            assert not (own / stage).exists()
            assert stage_bytes(run / "components" / name, (stage,)) == stage_bytes(
                one / "components" / name, (stage,)
            )
        mine, other = (
            PrecisionPlan.load(place / "allocate" / "plan.json")
            for place in (own, one / "components" / name)
        )
        assert mine.schemes == other.schemes and mine.size_bytes == other.size_bytes
        # Measured together, sums round otherwise in their last digits.
        assert mine.predicted_loss == pytest.approx(other.predicted_loss, rel=1e-4)
    # One pass through the models for both.
    assert passes == passes_alone and passes["probe"] > 0
    wholes = [PipelineFile.load(one) for one in several_in(run)]
    assert {str(whole.recipe["target"]) for whole in wholes} == {CPU, NANO}
    assert all(whole.measured_image_error for whole in wholes)


def test_commands_take_each_target(both: tuple[Path, Counter[str]], tmp_path: Path) -> None:
    run = both[0]

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["-q", "--json", *map(str, arguments)])

    gated = call("gate", run, "--max-size", 0.71)
    assert gated.exit_code == 0 and set(json.loads(gated.stdout)["targets"]) == {CPU, NANO}
    assert call("gate", run, "--max-size", 0.3).exit_code == 1
    against = call("gate", run, "--max-size", 0.71, "--baseline", run).exception
    assert isinstance(against, UsageError) and "--baseline is for one part" in str(against)
    named = call("gate", run, "--max-size", 0.71, "--target", NANO)
    assert set(json.loads(named.stdout)["targets"]) == {NANO}
    compared = call("compare", run, run)
    assert set(json.loads(compared.stdout)["targets"]) == {CPU, NANO}
    swept = call("sweep", run, "--budgets", "0.6,0.8")
    assert swept.exit_code == 0 and set(json.loads(swept.stdout)["targets"]) == {CPU, NANO}
    packed = call("package", run, "--target", CPU, "-o", tmp_path / "it.tar")
    assert packed.exit_code == 0 and (tmp_path / "it.tar").is_file(), packed.output
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(f'href="targets/{name}/report.html"' in page for name in (CPU, NANO))
    refused = call("sample", run).exception
    assert isinstance(refused, UsageError) and f"{run}/targets/{CPU}" in refused.hint


def test_a_target_may_be_added_and_takes_no_other_model(
    both: tuple[Path, Counter[str]], folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(both[0], tmp_path / "run"))
    before = stage_bytes(run / "components" / "unet", ("export", "calibrate"))
    run_until("allocate", recipe(folder, "rtx", engine__build=False), run)
    assert {one.name for one in several_in(run)} == {CPU, NANO, "rtx"}
    assert stage_bytes(run / "components" / "unet", ("export", "calibrate")) == before
    with pytest.raises(UsageError, match="targets of a run share their calls"):
        run_until("allocate", recipe(folder, "rtx", component_samples=9), run)
    with pytest.raises(UsageError, match="is a target of"):
        run_until("allocate", recipe(folder, f"{NANO},rtx"), run / "targets" / NANO)


def test_workers_open_the_parts_of_a_target(
    both: tuple[Path, Counter[str]], folder: Path, tmp_path: Path
) -> None:
    """Their files lie in the run of all targets: those of the part, and those that its targets share."""
    from mpq_deploy.models.pipeline_parts import whole_parts

    run = Path(shutil.copytree(both[0], tmp_path / "run"))
    own = part(run, NANO, "unet")
    expected = stage_bytes(own, ("measure",))
    shutil.rmtree(own / "measure")
    settings = recipe(folder, NANO)
    parts = whole_parts(settings)
    assert parts is not None
    build_whole(settings, run / "targets" / NANO, parts, "measure", Talk(), Processes(2))
    assert stage_bytes(own, ("measure",)) == expected


def test_places_of_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "targets" / "run"
    run.mkdir(parents=True)
    (run / MARKER).write_text("{}", encoding="utf-8")
    whole, unet = run / "targets" / "rtx", run / "targets" / "rtx" / "components" / "unet"
    for path, base in ((whole, run), (unet, run / "components" / "unet"), (run, run)):
        assert base_of(path) == base
    place = target_place(unet)
    assert place is not None and place.root / place.below == unet
    # A part of a run of one target, and a folder that only has the name.
    assert base_of(run / "components" / "unet") == run / "components" / "unet"
    assert target_place(tmp_path / "targets" / "other") is None
    unet.mkdir(parents=True)
    monkeypatch.chdir(unet)
    assert base_of(Path()) == run / "components" / "unet"
