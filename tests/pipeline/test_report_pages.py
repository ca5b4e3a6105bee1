"""Reports of incomplete runs or with values that are NaN; plans of other budgets; sweeps along the curve."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.allocate.cross_terms import cross_share
from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.evaluate.evaluation_result import Evaluation
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.recipe import load_recipe
from mpq_deploy.report import budget_plans as budgets
from mpq_deploy.report import collect as assemble
from mpq_deploy.report.budget_curve import Stop, options
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.sensitivity.steadied import steadied
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import Latency
from tests.pipeline.conftest import Outcome

Cli = Callable[..., Outcome]


def test_a_run_without_evaluation_is_reported_as_it_is(run: Path, cli: Cli) -> None:
    for stage in ("evaluate", "controls", "engine"):
        shutil.rmtree(run / stage)
    done = cli("report", run, "--as-is")
    assert done.code == 0, done.err
    page, values = (
        (run / "report.html").read_text(encoding="utf-8"),
        json.loads((run / "report.json").read_text(encoding="utf-8")),
    )
    assert (
        "have not been compared" in page
        and "without --as-is makes it" in page
        and 'id="budgets"' in page
    )
    assert values["psnr_db"] is None and values["evaluation"] is None and values["controls"] == {}
    assert not (run / "evaluate").exists() and not (run / "engine").exists()
    assert "-" in done.out.splitlines()[1].split()


def test_a_run_without_a_plan_has_nothing_to_report(run: Path, cli: Cli) -> None:
    shutil.rmtree(run / "allocate")
    done = cli("report", run, "--as-is")
    assert (
        done.code == 2 and "'allocate' is missing" in done.err and "mpq-deploy allocate" in done.err
    )


def test_what_is_no_number_is_left_out_and_named(
    run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Evaluation.load(run / "evaluate")
    variants = {
        "ours": {
            "measured_nmse": math.nan,
            "psnr_db": math.nan,
            "pooled_psnr_db": math.nan,
            "ssim": math.nan,
        },
        "int8": {
            "measured_nmse": math.inf,
            "psnr_db": -math.inf,
            "nmse_by_timestep": (math.inf, 1.0),
        },
    }
    wrong = replace(
        whole,
        variants={
            name: replace(found, **variants.get(name, {})) for name, found in whole.variants.items()
        },
    )
    monkeypatch.setattr(assemble.Evaluation, "load", classmethod(lambda cls, folder: wrong))
    done = cli("report", run)
    assert done.code == 0, done.err
    values = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert values["measured_nmse"] is None and values["psnr_db"] is None and not values["identical"]
    assert values["controls"]["int8"]["nmse_by_timestep"] == []
    assert "the measured error of ours is not finite" in (run / "report.html").read_text(
        encoding="utf-8"
    )
    assert "the measured error of int8 is not finite" in (run / "report.md").read_text(
        encoding="utf-8"
    )


def test_the_plans_of_other_budgets_hold_them_and_are_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_pipeline(load_recipe(run / "recipe.yaml"), run, Talk()) as pipeline:
        pipeline.run_until("allocate")
        plan = PrecisionPlan.load(run / "allocate" / "plan.json")
        table = steadied(SensitivityTable.load(run / "measure"))
        solver = PlanSolver(pipeline.run)
        found = budgets.budget_plans(pipeline.run, plan, solver)
        assert len(found.plans) > 3 and found.times is not None and solver.costs is not None
        values = [(p.size_bytes, p.predicted_nmse, p.latency_ms or 0.0) for p in found.plans]
        for one in found.plans:
            schemes = {
                name: found.schemes[i] for name, i in zip(found.layers, one.schemes, strict=True)
            }
            predicted = table.plan_loss(schemes, cross_share(table, schemes))
            assert one.predicted_nmse == pytest.approx(predicted)
            sizes = sum(row[i] for row, i in zip(found.layer_bytes, one.schemes, strict=True))
            assert plan.fixed_bytes + sizes <= one.size_bytes <= plan.fp16_size_bytes
            forms = {name: SCHEMES[scheme] for name, scheme in schemes.items()}
            assert one.latency_ms == solver.costs.plan_ns(solver.layers, forms) / 1e6
            mine = (one.size_bytes, one.predicted_nmse, one.latency_ms or 0.0)
            assert not any(o != mine and all(a <= b for a, b in zip(o, mine)) for o in values)
        fp16 = dict.fromkeys(found.layers, SCHEMES["fp16"])
        assert found.times.fp16_ms == solver.costs.plan_ns(solver.layers, fp16) / 1e6
        assert found.times.source == "estimated"

        def refuse(*_: object) -> None:
            raise AssertionError("solved again")

        monkeypatch.setattr(budgets, "front_plans", refuse)
        assert budgets.budget_plans(pipeline.run, plan, solver) == found
        (run / budgets.CACHE).write_text("{", encoding="utf-8")
        with pytest.raises(AssertionError, match="solved again"):
            budgets.budget_plans(pipeline.run, plan, solver)


def test_the_options_of_each_plan_build_one_at_least_as_good(run: Path) -> None:
    # A penalty would let a plan without a branch have a larger loss.
    recipe = load_recipe(run / "recipe.yaml", {"allocate.branch_penalty": 0})
    with open_pipeline(recipe, run, Talk()) as pipeline:
        pipeline.run_until("allocate")
        solver = PlanSolver(pipeline.run)
        section = solver.section
        points = solver.front(12)
    assert len(points) > 4
    for point in points:
        size, time = point.size_bytes, point.latency_ms
        words = options(Stop(size, 1.0, point.predicted_loss, (), time), solver.fp16_size).split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        solver.section = section.model_copy(
            update={
                "max_latency": Latency.parse(given["--max-latency"]),
                "objective": given["--objective"],
                "cross_terms": False,
            }
        )
        built = solver.solve(given["--budget"])
        losses = solver.table.losses
        summed = [
            sum(losses[name][scheme] for name, scheme in plan.items())
            for plan in (built.schemes, point.schemes)
        ]
        assert summed[0] <= summed[1] * (1 + 1e-3)


def test_the_kurtosis_is_that_of_the_weights_rows(run: Path) -> None:
    from mpq_deploy.sensitivity.kurtosis import layer_kurtosis
    from mpq_deploy.sensitivity.layer_weights import float_matrix

    with open_pipeline(load_recipe(run / "recipe.yaml"), run, Talk()) as pipeline:
        pipeline.run_until("calibrate")
        exported = pipeline.run.exported
        stats = pipeline.run.calibration.stats
        twice = [budgets.layer_kurtoses(pipeline.run, exported) for _ in range(2)]
        layer = exported.graph.layers[1]
        assert twice[0] == twice[1] and set(twice[0]) == {one.name for one in exported.graph.layers}
        assert twice[0][layer.name] == layer_kurtosis(
            layer, float_matrix(exported.graph, layer), stats
        )


def test_a_sweep_measures_points_of_the_curve_onto_its_page(run: Path, cli: Cli) -> None:
    done = cli("sweep", run, "--points", "3")
    assert done.code == 0, done.err
    swept = json.loads((run / "sweep.json").read_text(encoding="utf-8"))
    assert len(swept["points"]) == 3 and all(
        point["measured_nmse"] > 0 for point in swept["points"]
    )
    sizes = np.array([point["size_ratio"] for point in swept["curve"]])
    assert all(point["latency_ms"] > 0 for point in [*swept["curve"], *swept["points"]])
    for point in swept["points"]:
        assert np.abs(sizes - point["size_ratio"]).min() < 0.02
        assert point["size_ratio"] <= point["budget"]
    page = (run / "sweep.html").read_text(encoding="utf-8")
    assert (
        page.count('class="marker series-swept"') == 3
        and "Everything INT8" in page
        and "sweep.html" in done.out
        and 'id="time"' in page
        and 'class="plans fast"' in page
    )
    cli("report", run)
    assert (run / "report.html").read_text(encoding="utf-8").count(
        'class="marker series-swept"'
    ) == 3


def test_a_predicted_sweep_has_a_page_too(run: Path, cli: Cli) -> None:
    done = cli("sweep", run, "--budgets", "0.1,0.4,0.5")
    assert done.code == 0, done.err
    page = (run / "sweep.html").read_text(encoding="utf-8")
    assert "2 budgets, predicted" in page and "no plan fits" in page and 'id="budget-box"' in page
