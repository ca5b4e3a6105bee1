"""Builds for the target simulate: they say so everywhere, never reach a builder, and are not for other targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.recipe import SIMULATED_DEFAULT, load_recipe
from mpq_deploy.run.recipe_check import check_recipe
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import Built, build, recipe_for

SCHEMES_ASKED = ["fp16", "w2a4-sim", "w4a6-sim", "w8a16-sim"]


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    recipe = recipe_for(
        model,
        target="simulate",
        budget="0.27",
        allocate__schemes=SCHEMES_ASKED,
        allocate__branches=["omq", "zres"],
        engine__build=True,
    )
    return build(recipe, tmp_path_factory.mktemp("simulate") / "run")


def test_the_plan_is_simulated_and_within_its_nominal_bytes(built: Built) -> None:
    plan = json.loads((built.run / "allocate" / "plan.json").read_text(encoding="utf-8"))
    assert plan["simulated"] is True
    assert plan["size_bytes"] <= plan["budget_bytes"]
    used = {row["scheme"] for row in plan["layers"]} - {"fp16"}
    assert used and all("-sim" in name for name in used)
    assert (
        json.loads((built.run / "quantize" / "size.json").read_text(encoding="utf-8"))["size_bytes"]
        == plan["size_bytes"]
    )
    assert built.report["predicted_nmse"] > 0 and built.report["measured_nmse"] > 0


def test_every_report_says_simulated(built: Built) -> None:
    assert built.report["simulated"] is True
    assert {control["title"] for control in built.report["controls"].values()} == {
        "Everything 8-bit, simulated",
        "Everything 4-bit, simulated",
    }
    markdown, page = (
        (built.run / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html")
    )
    for row in (line for line in markdown.splitlines() if " dB |" in line):
        assert "simulated" in row
    assert (
        "nominal bytes, which no engine reaches" in markdown
        and "nominal bytes, which no engine reaches" in page
    )
    assert page.count("simulated") > 5
    said = "\n".join(built.said)
    assert "nominal bytes, simulated" in said


def test_no_builder_sees_the_plan(built: Built) -> None:
    assert built.report["engine"] is None and "simulated" in built.report["engine_note"]
    graph = onnx.load(built.run / "quantize" / "model.onnx", load_external_data=False)
    assert any(entry.key == "mpq_deploy.simulated_weights" for entry in graph.metadata_props)


def test_the_command_line_says_simulated(built: Built, cli: Any) -> None:
    outcome: Outcome = cli("report", built.run)
    shown = outcome.out + outcome.err
    assert outcome.code == 0
    rows = [line for line in outcome.out.splitlines() if line.startswith(("ours", "int8", "int4"))]
    assert len(rows) == 3 and all("simulated" in row for row in rows), shown
    listed: Outcome = cli("targets")
    assert any(
        "simulated" in line for line in listed.out.splitlines() if line.startswith("simulate")
    )
    swept: Outcome = cli("sweep", built.run, "--budgets", "0.25,0.3")
    assert "simulated" in swept.out


def test_the_target_has_candidates_of_its_own() -> None:
    recipe = load_recipe(None, {"target": "simulate"})
    assert recipe.allocate.schemes == SIMULATED_DEFAULT
    check_recipe(recipe)
    assert all(SCHEMES[name].simulated for name in SIMULATED_DEFAULT if name != "fp16")


@pytest.mark.parametrize(
    ("target", "schemes", "says"),
    [
        ("rtx", ["w8a8", "w2a4-sim"], "2-bit weights do not exist in TensorRT; nearest: w4a8"),
        ("rtx", ["w8a8", "w4a8-sim"], "simulated, with zero points and nominal bytes"),
        ("simulate", ["w2a4-sim", "w4a8"], "nearest: w4a8-sim"),
        ("tensorrt-10", ["fp16", "w4a8"], "nearest: w4a16"),
        ("onnxruntime-cpu", ["simulated"], "does not take 'w2a2-sim'"),
    ],
)
def test_a_scheme_of_another_target_is_refused_before_anything_starts(
    target: str, schemes: list[str], says: str
) -> None:
    recipe = load_recipe(
        None, {"target": target, "allocate.schemes": schemes, "engine.build": False}
    )
    with pytest.raises(UsageError) as caught:
        check_recipe(recipe)
    assert says in caught.value.message
