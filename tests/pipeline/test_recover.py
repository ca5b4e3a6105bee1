"""The recover stage: made when it is wanted, deployed in the plan's place, resumed when it was killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.stages.recover import CHECKPOINT
from tests.pipeline.kills import build_in_child, die
from tests.pipeline.runs import Built, build, recipe_for, stage_bytes

pytestmark = pytest.mark.torch
SETTINGS: dict[str, Any] = {
    "recover__steps": 12,
    "recover__batch_size": 4,
    "recover__trajectories": 4,
    "recover__round_steps": 6,
    "recover__held_out": 4,
    "recover__check_every": 4,
    "recover__rank": 4,
}


@pytest.fixture(scope="module")
def recovered(model: Path, finished: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The finished run, built again with recovery."""
    run = shutil.copytree(finished.run, tmp_path_factory.mktemp("recovered") / "run")
    return build(recipe_for(model, **SETTINGS), Path(run))


def test_off_does_not_run_it(finished: Built) -> None:
    assert "recover" not in finished.made
    assert not (finished.run / "recover").exists()
    assert finished.report["recovery"] is None and finished.report["extras"] == {}


def test_the_recovered_graph_takes_the_place_of_the_plan_s(
    recovered: Built, finished: Built
) -> None:
    assert recovered.made == ["recover", "engine", "evaluate", "report"]
    report, before = recovered.report, recovered.report["extras"]["plan"]
    assert before["measured_nmse"] == finished.report["measured_nmse"]
    assert (
        report["measured_nmse"] != before["measured_nmse"]
    )  # two images say nothing about which is better
    assert report["size_bytes"] == before["size_bytes"] == finished.report["size_bytes"]
    assert constant_bytes(recovered.run / "recover" / "model.onnx") == report["size_bytes"]
    assert report["recovery"]["after"] < report["recovery"]["before"]
    assert stage_bytes(recovered.run, ("quantize", "allocate")) == stage_bytes(
        finished.run, ("quantize", "allocate")
    )
    assert not (recovered.run / CHECKPOINT).exists()
    assert "Error while training" in (recovered.run / "report.html").read_text(encoding="utf-8")
    for page in ("report.md", "report.html"):
        assert "Ours, before recovery" in (recovered.run / page).read_text(encoding="utf-8")
        assert "removed" in (recovered.run / page).read_text(encoding="utf-8")


def test_nothing_changed_makes_nothing_again(model: Path, recovered: Built, tmp_path: Path) -> None:
    run = Path(shutil.copytree(recovered.run, tmp_path / "run"))
    assert build(recipe_for(model, **SETTINGS), run).made == ["report"]
    more = build(recipe_for(model, **{**SETTINGS, "recover__seed": 5}), run)
    assert more.made == ["recover", "engine", "evaluate", "report"]


def test_off_again_goes_back_to_the_plan(
    model: Path, finished: Built, recovered: Built, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(recovered.run, tmp_path / "run"))
    again = build(recipe_for(model), run)
    assert again.made == ["engine", "evaluate", "report"]
    assert again.report["measured_nmse"] == finished.report["measured_nmse"]
    assert again.report["extras"] == {}


def _die_at_the_second_checkpoint(stage: str) -> None:
    from mpq_deploy.recover import recover as module

    save, saved = module.save_checkpoint, []

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        saved.append(1)
        if len(saved) == 2:
            die()

    module.save_checkpoint = save_and_die  # type: ignore[assignment]


def test_killed_training_goes_on_and_ends_with_the_same_bytes(
    model: Path, finished: Built, recovered: Built, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    code, _ = build_in_child(recipe_for(model, **SETTINGS), run, _die_at_the_second_checkpoint)
    assert code < 0 and (run / CHECKPOINT).exists() and not (run / "recover").exists()
    again = build(recipe_for(model, **SETTINGS), run)
    assert any("continues from step 8" in line for line in again.said)
    assert stage_bytes(run, ("recover",)) == stage_bytes(recovered.run, ("recover",))
    assert not (run / CHECKPOINT).exists()


def test_the_command_line_turns_it_on_and_off(model: Path, run: Path, cli: Any) -> None:
    settings = json.loads(
        json.dumps({k.split("__")[1]: v for k, v in SETTINGS.items() if not k.endswith("steps")})
    )
    import yaml

    stored = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    stored["recover"].update(settings, round_steps=6)
    (run / "recipe.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    done = cli(
        "--quiet", "recover", run, "--steps", 3, "--loss", "output", "--loss", "relation=0.01"
    )
    assert done.code == 0 and done.out.strip() == str(run / "recover")
    kept = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["recover"]
    assert kept["steps"] == 3 and kept["losses"] == {"output": 1.0, "relation": 0.01}
    assert cli("recover", run, "--loss", "relation=much").code == 2
    assert cli("recover", run, "--loss", "colour").code == 2
    assert cli("--quiet", "recover", run, "--steps", 0).code == 0
    assert (
        yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["recover"]["steps"] == 0
    )
