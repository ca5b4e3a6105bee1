"""A changed field makes again just the stages that it concerns, and the message names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.runs import DIGESTED, Built, build, recipe_for, stage_bytes

AFTER_ALLOCATE = ("allocate", "quantize", "engine", "evaluate", "report")
# Everything in INT8 has the ranges that were measured as best.
AFTER_MEASURE = ("measure", "allocate", "quantize", "controls", "engine", "evaluate", "report")
# Another plan of the same candidates leaves the controls as they are; other candidates do not.
AFTER_CANDIDATES = (
    "candidates",
    "measure",
    "allocate",
    "quantize",
    "controls",
    "engine",
    "evaluate",
    "report",
)
AFTER_CALIBRATE = ("calibrate", *AFTER_CANDIDATES)


def test_nothing_changed(model: Path, run: Path, finished: Built) -> None:
    again = build(recipe_for(model), run)
    assert again.made == ["report"]
    assert stage_bytes(run) == stage_bytes(finished.run)
    assert [row["name"] for row in again.report["stages"]] == list(DIGESTED)
    assert all(row["cached"] for row in again.report["stages"])


@pytest.mark.parametrize(
    ("field", "value", "first", "stages"),
    [
        ("budget", 0.5, "allocate", AFTER_ALLOCATE),
        ("allocate.gap", 0.01, "allocate", AFTER_ALLOCATE),
        ("measure.seed", 5, "measure", AFTER_MEASURE),
        ("measure.method", "local_error", "measure", AFTER_MEASURE),
        ("quantize.rounding", "nearest", "candidates", AFTER_CANDIDATES),
        ("allocate.schemes", ["fp16", "w8a16", "w4a16"], "candidates", AFTER_CANDIDATES),
        ("calibrate.scale", "absmax", "calibrate", AFTER_CALIBRATE),
        ("calibrate.seed", 3, "calibrate", AFTER_CALIBRATE),
        ("evaluate.steps", 4, "evaluate", ("evaluate", "report")),
        ("evaluate.controls", False, "controls", ("controls", "evaluate", "report")),
        ("engine.batch_max", 16, "engine", ("engine", "report")),
    ],
)
def test_a_changed_field(
    model: Path, run: Path, field: str, value: Any, first: str, stages: tuple[str, ...]
) -> None:
    again = build(recipe_for(model, **{field.replace(".", "__"): value}), run)
    # A stage that turns out the same bytes as before spares those behind it; the model decides whether it does.
    exact = field in ("budget", "quantize.rounding", "calibrate.seed", "evaluate.steps")
    assert tuple(again.made) == stages if exact else set(again.made) <= set(stages)
    assert (again.made[0], again.made[-1]) == (first, "report")
    line = next(line for line in again.said if line.startswith(first) and "again" in line)
    assert f"recipe.{field} changed" in line


def test_the_model_file_touched(model: Path, tmp_path: Path) -> None:
    """Other bytes at the same path: everything is made again."""
    import onnx
    from onnx import numpy_helper

    path = Path(shutil.copytree(model.parent, tmp_path / "own")) / model.name
    recipe = recipe_for(path, quantize__rounding="nearest", measure__method="local_error")
    first = build(recipe, tmp_path / "run", "allocate")
    proto = onnx.load(path)
    weight = next(t for t in proto.graph.initializer if t.name == "down.conv1.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(proto, path)
    again = build(recipe, tmp_path / "run", "allocate")
    assert again.made == list(DIGESTED[:5]) == first.made
    assert any("model.files" in line for line in again.said if line.startswith("export"))


def test_a_second_budget_measures_nothing_again(model: Path, run: Path, finished: Built) -> None:
    again = build(recipe_for(model, budget=0.6), run)
    for stage in ("export", "calibrate", "candidates", "measure", "controls"):
        assert stage_bytes(run, (stage,)) == stage_bytes(finished.run, (stage,))
    assert again.report["predicted_nmse"] < finished.report["predicted_nmse"]


def test_back_to_the_first_budget_gives_the_first_bytes(
    model: Path, run: Path, finished: Built
) -> None:
    build(recipe_for(model, budget=0.6), run)
    build(recipe_for(model), run)
    assert stage_bytes(run) == stage_bytes(finished.run)


def test_a_version_of_a_tool_that_changed_is_named(model: Path, run: Path) -> None:
    record = run / "evaluate" / "stage.json"
    values = json.loads(record.read_text(encoding="utf-8"))
    values["inputs"]["version.onnxruntime"] = "1.0.0"
    record.write_text(json.dumps(values), encoding="utf-8")
    again = build(recipe_for(model), run)
    assert again.made == ["evaluate", "report"]
    assert any("version.onnxruntime changed" in line for line in again.said)
