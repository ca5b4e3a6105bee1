"""The correction stage: made when it is wanted, once per quantized model, and never run when it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mpq_deploy.errors import ModelError
from mpq_deploy.runtime.correction import load_correction
from tests.pipeline.runs import Built, build, recipe_for, stage_bytes


@pytest.fixture(scope="module")
def corrected(model: Path, finished: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The finished run, built again with the correction."""
    run = shutil.copytree(finished.run, tmp_path_factory.mktemp("corrected") / "run")
    return build(recipe_for(model, evaluate__correction="ptqd"), Path(run))


def test_none_does_not_run_it(finished: Built) -> None:
    assert "correction" not in finished.made
    assert not (finished.run / "correction").exists()
    assert finished.report["extras"] == {}


def test_it_makes_the_correction_and_evaluates_with_it(corrected: Built, finished: Built) -> None:
    assert corrected.made == ["correction", "evaluate", "report"]
    extra = corrected.report["extras"]["ours+ptqd"]
    assert extra["size_bytes"] == corrected.report["size_bytes"]
    assert all(extra[key] is not None for key in ("measured_nmse", "psnr_db", "ssim"))
    assert stage_bytes(corrected.run, ("quantize",)) == stage_bytes(finished.run, ("quantize",))
    assert corrected.report["measured_nmse"] == finished.report["measured_nmse"]
    assert any("ours+ptqd: PTQD's correction" in note for note in corrected.report["notes"])
    for page in ("report.md", "report.html"):
        assert "Ours, corrected (PTQD)" in (corrected.run / page).read_text(encoding="utf-8")


def test_the_file_belongs_to_both_graphs_and_to_no_other(corrected: Built) -> None:
    path = corrected.run / "correction" / "correction.json"
    for name in ("model.onnx", "model.fp32.onnx"):
        assert load_correction(path, corrected.run / "quantize" / name).calls == 2
    with pytest.raises(ModelError, match="another model"):
        load_correction(path, corrected.run / "export" / "model.onnx")


def test_nothing_changed_makes_nothing_again(model: Path, corrected: Built, tmp_path: Path) -> None:
    run = Path(shutil.copytree(corrected.run, tmp_path / "run"))
    again = build(recipe_for(model, evaluate__correction="ptqd"), run)
    assert again.made == ["report"]


def test_another_budget_makes_another_correction(
    model: Path, corrected: Built, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(corrected.run, tmp_path / "run"))
    again = build(recipe_for(model, evaluate__correction="ptqd", budget=0.6), run)
    assert again.made == ["allocate", "quantize", "correction", "engine", "evaluate", "report"]
    old, new = (
        json.loads((r / "correction" / "correction.json").read_text(encoding="utf-8"))
        for r in (corrected.run, run)
    )
    assert old["models"] != new["models"]
    back = build(recipe_for(model, evaluate__correction="ptqd"), run)
    assert "correction" in back.made
    assert stage_bytes(run, ("correction",)) == stage_bytes(corrected.run, ("correction",))


def test_one_bias_for_all_channels_is_another_correction(
    model: Path, corrected: Built, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(corrected.run, tmp_path / "run"))
    again = build(
        recipe_for(model, evaluate__correction="ptqd", evaluate__correction_bias="scalar"), run
    )
    assert again.made == ["correction", "evaluate", "report"]
    steps = json.loads((run / "correction" / "correction.json").read_text(encoding="utf-8"))[
        "steps"
    ]
    assert {len(step["bias"]) for step in steps} == {1}


def test_back_to_none_leaves_it_out(model: Path, corrected: Built, tmp_path: Path) -> None:
    run = Path(shutil.copytree(corrected.run, tmp_path / "run"))
    again = build(recipe_for(model), run)
    assert again.made == ["evaluate", "report"]
    assert again.report["extras"] == {}
