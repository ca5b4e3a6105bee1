"""The benchmarks' own arithmetic: bounds, lines and verdicts; and that each one says what it shows."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpq_deploy.allocate.problem import Problem

FOLDER = Path(__file__).parents[2] / "benchmarks"
# Not scripts: what they share, and the models of scale.py.
SHARED = ("table", "scale_models")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def using(name: str) -> Any:
    return pytest.mark.parametrize("script", [name], indirect=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_it_shows(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: what most scripts import takes seconds."""
    path = FOLDER / f"{name}.py"
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


@using("allocate")
@pytest.mark.parametrize("budget", [0.3, 0.4, 0.55])
def test_lagrangian_bound_is_below_the_optimum_and_near_it(
    script: ModuleType, budget: float
) -> None:
    layers = script.made_up(4, seed=5)
    fp16 = sum(layer.bytes["fp16"] for layer in layers)
    problem = Problem(layers, 0, int(budget * fp16))
    plans = (
        {n.name: s for n, s in zip(layers, schemes)}
        for schemes in itertools.product(script.TYPICAL, repeat=len(layers))
    )
    losses = [
        sum(n.loss[plan[n.name]] for n in layers)
        for plan in plans
        if problem.plan_bytes(plan) <= problem.budget_bytes
    ]
    bound = script.lagrangian_bound(problem)
    assert 0 < bound <= min(losses) * (1 + 1e-12)


@using("allocate")
def test_made_up_layers_repeat_and_share_inputs(script: ModuleType) -> None:
    first, again = script.made_up(50, seed=1), script.made_up(50, seed=1)
    assert first == again
    assert len({layer.inputs for layer in first}) < 50
    assert all(
        layer.bytes["w4a16-b128"] < layer.bytes["w8a16"] < layer.bytes["fp16"] for layer in first
    )


def point(budget: float, psnr: float | None, ratio: float = 1.0) -> dict[str, Any]:
    quality = {"psnr_db": psnr, "pooled_psnr_db": psnr}
    return {
        "budget": budget,
        **quality,
        "size_bytes": 1,
        "predicted_nmse": ratio,
        "measured_nmse": 1.0,
    }


INT8 = {"psnr_db": 40.0, "pooled_psnr_db": 39.0}


@using("budgets")
@pytest.mark.parametrize(
    ("at_265", "at_28", "at_35", "expected"),
    [
        (40.0, 40.1, 48.0, [True, True, True]),
        (39.9, 40.0, 47.9, [False, False, False]),
        (None, None, None, [True, True, True]),
    ],
    ids=["just enough", "just short", "identical images"],
)
def test_leads_over_int8(
    script: ModuleType,
    at_265: float | None,
    at_28: float | None,
    at_35: float | None,
    expected: list[bool],
) -> None:
    points = [point(0.265, at_265), point(0.28, at_28), point(0.35, at_35)]
    assert [passed for passed, _ in script.lead_checks(points, INT8)] == expected


@using("budgets")
def test_a_budget_that_no_plan_fits_fails_its_check(script: ModuleType) -> None:
    points = [{"budget": 0.265, "smallest_feasible_bytes": 9}, point(0.28, 41.0), point(0.35, 50.0)]
    checks = script.lead_checks(points, INT8)
    assert [passed for passed, _ in checks] == [False, True, True]
    assert "no plan fits" in checks[0][1]


@using("budgets")
@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.6, True), (1.6, True), (0.59, False), (1.61, False)]
)
def test_ratios(script: ModuleType, ratio: float, expected: bool) -> None:
    assert script.ratio_check([point(0.3, 40.0), point(0.4, 40.0, ratio)])[0] is expected


@using("budgets")
def test_each_control_is_compared_at_its_bytes_and_at_its_error(script: ModuleType) -> None:
    def plan(ratio: float, error: float, psnr: float) -> dict[str, Any]:
        return {**point(ratio, psnr), "size_ratio": ratio, "measured_nmse": error}

    control = {"title": "Everything FP8", "size_ratio": 0.5000005, "measured_nmse": 1e-3}
    control |= INT8
    points = [plan(0.26, 9e-4, 39.0), plan(0.3, 9e-4, 41.0), plan(0.5, 1e-5, 60.0)]
    table, checks = script.against_controls(points, {"fp8": control}, {"fp8": 0.5})
    assert [passed for passed, _ in checks] == [True, True]
    assert "1/100 of the error, +20.0 dB" in checks[0][1] and "60% of its bytes" in checks[1][1]
    assert "| 0.500 | 0.5000 | 1.00e-05 | 60.0 | - | 0.3000 | 9.00e-04 | 41.0 | - |" in table
    # A plan of less error whose images are worse is not better, nor is one as large smaller.
    for worse in (plan(0.5, 1e-5, 39.9), plan(0.5, 2e-3, 41.0)):
        _, checks = script.against_controls([worse], {"fp8": control}, {})
        assert [passed for passed, _ in checks] == [False, False]
    _, checks = script.against_controls([plan(0.6, 1e-5, 60.0)], {"fp8": control}, {})
    assert [passed for passed, _ in checks] == [False, False]


@using("peers")
def test_the_line_goes_through_its_ends_and_nowhere_else(script: ModuleType) -> None:
    (low, low_db), (high, high_db) = script.LINE
    assert script.on_line(script.LINE, low) == pytest.approx(low_db)
    assert script.on_line(script.LINE, high) == pytest.approx(high_db)
    assert script.on_line(script.LINE, (low + high) / 2) == pytest.approx((low_db + high_db) / 2)
    assert script.on_line(script.LINE, low - 0.1) is None


@using("peers")
def test_a_child_is_measured_by_itself(script: ModuleType, tmp_path: Path) -> None:
    # A child counts from the pages that it shares with its parent at the fork, and this process may be large.
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 200_000_000
    code = f"import sys; held = bytearray({held}); sys.exit(3)"
    status, seconds, peak_mb = script.run_child((sys.executable, "-c", code), tmp_path / "log")
    assert status == 3
    assert seconds > 0
    small = script.run_child((sys.executable, "-c", "pass"), tmp_path / "log")[2]
    assert peak_mb > held / 1e6
    assert small < held / 1e6 - 100


@using("peers")
def test_losing_the_line_at_one_size_fails(script: ModuleType) -> None:
    job = script.Job("ours", "weights only, budget 0.4", "weight-only", (), Path("x"))
    above = script.Result(file_mb=15.0, mean_db=60.0)
    below = script.Result(file_mb=20.0, mean_db=20.0)
    assert script.line_check("the line", script.LINE, [(job, above)])[0]
    assert not script.line_check("the line", script.LINE, [(job, above), (job, below)])[0]
    assert not script.line_check("the line", script.LINE, [])[0]


@using("probe_quality")
def test_agreement_is_perfect_with_itself_and_knows_a_factor(script: ModuleType) -> None:
    from mpq_deploy.sensitivity.table import SensitivityTable

    truth = {f"l{i}": {"fp16": 0.0, "w8a8": 10.0**-i} for i in range(5)}
    twice = {
        name: {scheme: 2 * loss for scheme, loss in row.items()} for name, row in truth.items()
    }
    tables = [SensitivityTable("x", [0.0], losses, {}) for losses in (truth, twice)]
    count, rank, spread = script.compare(*tables, "w8a8")
    assert (count, rank) == (5, pytest.approx(1.0))
    assert spread == pytest.approx([2.0, 2.0, 2.0])
    count, rank, _ = script.compare(*tables, "fp16")
    assert count == 0
    assert math.isnan(rank)


@using("scale")
def test_goals_of_scale_need_every_stage_and_enough_measuring(script: ModuleType) -> None:
    def recipe(**measure: int) -> Any:
        return script.bench_recipe(
            None, [], {f"measure.{key}": value for key, value in measure.items()}
        )

    def costs(minutes: float, peak: float) -> list[Any]:
        return [
            script.StageCost(stage, 60 * minutes, 0.0, int(peak), 0, 0)
            for stage in ("model", *script.STAGES)
        ]

    enough = recipe(timesteps=4, probes=4)
    assert [passed for passed, _ in script.goals("860M", costs(1, 7e9), enough)] == [True] * 3
    assert [passed for passed, _ in script.goals("860M", costs(11, 9e9), enough)] == [False] * 3
    assert len(script.goals("860M", costs(1, 7e9), recipe(timesteps=1, probes=4))) == 1
    assert len(script.goals("860M", costs(1, 7e9)[:3], enough)) == 1
    assert [passed for passed, _ in script.goals("2570M", costs(100, 19e9), enough)] == [True]
    assert script.goals("20M", costs(1, 1e9), enough) == []


@using("scale")
def test_memory_of_a_process_tree_includes_its_children(script: ModuleType) -> None:
    held = "import time; block = b'x' * (64 << 20); print(1, flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        resident, private = script.tree_memory(process.pid)
        children = (
            Path(f"/proc/{process.pid}/task/{process.pid}/children")
            .read_text(encoding="utf-8")
            .split()
        )
        for child in (*map(int, children), process.pid):
            os.kill(child, signal.SIGKILL)
    assert private > 64 << 20
    assert resident > private


@using("papers")
def test_what_was_measured_and_how_long_it_took_are_paragraphs_of_their_own(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = importlib.import_module("table")
    files = {"unet/w.safetensors": "a5074f9d676f" + "0" * 52, "unet/config.json": "b" * 64}
    export = SimpleNamespace(fields=lambda run: {"model.files": files})
    monkeypatch.setattr(table, "STAGES", {"export": export})
    timings = {script.STAGES[0]: {"seconds": 1.0, "peak_rss_bytes": 5e6}}
    folder = SimpleNamespace(timings=lambda: timings)
    evaluate = SimpleNamespace(steps=20)
    run = SimpleNamespace(folder=folder, recipe=SimpleNamespace(evaluate=evaluate))
    weights, stages = script.about(run, 8).split("\n\n")
    assert weights == "Weights (SHA-256): unet/w.safetensors a5074f9d676f."
    assert stages.startswith("Stages, when they were last made:")


@using("papers")
def test_a_check_says_by_what_a_plan_of_ours_does_not_win(script: ModuleType) -> None:
    def result(name: str, nmse: float, psnr_db: float, to_float: float) -> Any:
        plan = script.Plan(name, {}, 100)
        return script.Result(plan, 0.2, nmse, psnr_db, psnr_db - 5, 0.3, to_float)

    papers = [result("uniform", 0.04, 26.0, 0.18), result("MPQ-DMv2: zres", 0.03, 25.0, 0.20)]
    passed, line = script.check("W2A4", result("ours", 0.02, 29.0, 0.06), papers)
    assert passed and line.startswith("- PASS: W2A4: ours beats the papers' plans: ")
    assert "error 2.00e-02 against 3.00e-02 (MPQ-DMv2)" in line and "NOT" not in line
    passed, line = script.check("W2A4", result("ours", 0.02, 25.5, 0.19), papers)
    assert not passed and line.startswith("- FAIL")
    found, _, lost = line.partition("NOT by ")
    assert "error" in found and "29.0" not in line
    assert lost.startswith(
        "PSNR 25.5 dB against 26.0 dB (uniform), distance 0.19000 against 0.18000"
    )


def test_no_kept_page_runs_the_two_together() -> None:
    pages = sorted((FOLDER.parent / "docs" / "results").glob("*.md"))
    following = [
        (page.name, after)
        for page in pages
        for line, after in itertools.pairwise(page.read_text(encoding="utf-8").splitlines())
        if line.startswith("Weights (SHA-256)")
    ]
    assert len(following) > 10
    assert {after for _, after in following} == {""}, following


@using("speed")
def test_goals_of_speed_are_judged_by_wall_and_by_processor_time(script: ModuleType) -> None:
    fine = {name: script.Cost(1.0, 1.0, 0.0) for name in (*script.ORDER, "bare", "budget")}
    fine["import"] = script.Cost(0.2, 0.2, 0.0)
    checks = script.goals("m", fine)
    assert len(checks) == 6 and all(passed for passed, _ in checks)
    # Images count in the whole build, not in what is judged without them.
    dear = script.goals("m", {**fine, "evaluate": script.Cost(500.0, 500.0, 0.0)})
    assert [line.split(" below")[0] for passed, line in dear if not passed] == [
        "- FAIL: m: the whole build"
    ]
    # A busy machine: wall time is lost, processor time is not.
    checks = script.goals("m", {**fine, "quantize": script.Cost(30.0, 4.0, 9.0)})
    assert all(passed for passed, _ in checks)
    assert any(
        "FAIL by wall 30.00 s" in line and "PASS by CPU / 2 2.00 s" in line for _, line in checks
    )
    slow = {**fine, "calibrate": script.Cost(1.5, 1.5, 0.0), "budget": script.Cost(30.0, 30.0, 0.0)}
    assert [passed for passed, _ in script.goals("m", slow)].count(False) == 2
    # A sum that lacks a stage passes nothing.
    checks = script.goals("m", {name: cost for name, cost in fine.items() if name != "evaluate"})
    assert [line for passed, line in checks if not passed] == [
        "- m: not judged as a whole: evaluate not measured in this run"
    ]


@using("speed")
def test_a_cost_linear_in_the_size_has_exponent_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, sizes = [], {}
    for name, size in (("large", 20_000_000), ("small", 2_000_000)):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "costs.json")
        files[-1].write_text(
            f'[{{"stage": "measure", "cpu_seconds": {size / 1e6}}}]', encoding="utf-8"
        )
        sizes[tmp_path / name / "run"] = size
    monkeypatch.setattr(script, "parameters", sizes.__getitem__)
    assert script.curve(files).splitlines()[-1] == "| measure | 2.0 | 20.0 | 1.00 |"


@using("kills")
def test_killed_builds_are_compared_by_their_engines_too(
    script: ModuleType, tmp_path: Path
) -> None:
    """All but digest and size of the engine's own file, which no two builds share."""

    def contents(kernels: str = "gemm", **changes: Any) -> Any:
        (tmp_path / "engine").mkdir(exist_ok=True)
        (tmp_path / "engine" / "layers.txt").write_text(kernels, encoding="utf-8")
        record = {"sha256": "a", "weights_bytes": 10, "verified": True, **changes}
        (tmp_path / "engine" / "build.json").write_text(json.dumps(record), encoding="utf-8")
        return script.contents(tmp_path)

    assert contents() == contents(sha256="b", bytes=3)
    assert contents() != contents("correlation")
    assert contents() != contents(weights_bytes=11)


@using("latency")
def test_errors_of_random_weights_are_in_the_order_of_bits(script: ModuleType) -> None:
    from mpq_deploy.formats.scheme import schemes_named

    names = ("w8a16", "w8a8", "f8a16", "f8a8", "w4a16-b32", "w4a16-b128", "nvfp4")
    errors = script.scheme_errors(list(schemes_named(names)))
    order = ("w8a16", "w8a8", "f8a16", "f8a8", "w4a16-b32", "w4a16-b128", "nvfp4")
    assert sorted(errors, key=errors.__getitem__) == sorted(errors, key=order.index)
    # A uniform grid of step d has d^2 / 12, wherever the values lie; of 448's float about 7e-4.
    assert 2e-5 < errors["w8a16"] < 1e-4
    assert 5e-4 < errors["f8a16"] < 1e-3


@using("latency")
def test_rules_and_plans_are_counted_alike_and_plans_keep_their_budgets(
    script: ModuleType, tmp_path: Path
) -> None:
    import onnx_ir as ir

    from mpq_deploy.graph.layers import layer_graph
    from mpq_deploy.graph.load import load_model
    from mpq_deploy.graph.shapes import inferred_shapes
    from mpq_deploy.recipe import load_recipe
    from tests.graphs import denoiser_graph

    model = load_model(denoiser_graph(channels=64, size=16).save(tmp_path / "model.onnx"))
    recipe = load_recipe(None, {"target": "rtx-blackwell"})
    shapes = {
        batch: inferred_shapes(
            ir.to_proto(model), {"sample": (batch, 3, 16, 16), "timestep": (batch,)}
        )
        for batch in (recipe.engine.batch_opt, recipe.engine.batch_max)
    }
    case = script.Case(layer_graph(model), shapes, recipe)
    fp16, int8 = case.rule("fp16"), case.rule("int8")
    assert fp16.size == case.fp16_size and fp16.loss == 0
    assert int8.size < fp16.size
    for objective in script.OBJECTIVES:
        plan = case.ours(0.5, objective)
        assert plan.size <= 0.5 * case.fp16_size
    least, balanced, fastest = (case.ours(0.5, name) for name in ("quality", "balanced", "latency"))
    assert least.loss <= balanced.loss <= 2 * least.loss * script.EQUAL
    assert fastest.nanoseconds <= balanced.nanoseconds <= least.nanoseconds
    as_good = case.as_good(int8)
    assert as_good.size <= int8.size and as_good.loss <= int8.loss * script.EQUAL
    assert as_good.nanoseconds <= int8.nanoseconds and not int8.beats(as_good)
    table, checks = script.compare(case)
    assert table.count("\n") == 1 + len(case.rules) + 6 and len(checks) == 2


@using("latency")
def test_a_rule_that_is_smaller_faster_and_as_good_is_named(script: ModuleType) -> None:
    rule = script.Plan("Everything FP8", 50, 1e-3, 90)
    plans = [script.Plan(f"ours, {b:g}, balanced", 60, 1e-3, 100) for b in script.BUDGETS]
    fp16 = script.Plan("Everything FP16", 100, 0.0, 95)
    case = SimpleNamespace(target=SimpleNamespace(name="rtx"))
    checks = list(script.checks_of(case, fp16, [rule], plans, {rule.title: rule}))
    assert [passed for passed, _ in checks] == [False, False]
    assert "no, of its time: balanced 1.05" in checks[0][1]
    assert "no; Everything FP8 beats ours, 0.35, balanced" in checks[1][1]
    better = [script.Plan(p.title, 60, 9e-4, 94) for p in plans]
    checks = list(script.checks_of(case, fp16, [rule], better, {rule.title: rule}))
    assert [passed for passed, _ in checks] == [True, True]


@using("trajectory")
def test_steps_with_and_without_their_signs(script: ModuleType) -> None:
    pytest.importorskip("torch")
    from mpq_deploy.sensitivity.trajectory import StepProducts

    z = np.random.default_rng(0).standard_normal((5, 2, 40)).astype(np.float32)
    products = StepProducts({"layer": {"w8a8": z, "fp16": 0 * z}}, np.full(40, 3.0), 0.25)
    together = float(np.square(z.sum(0)).mean() / 3)
    apart = float(np.square(z).sum(0).mean() / 3)
    for coherence, loss in ((1.0, together), (0.0, apart), (0.5, (together + apart) / 2)):
        found = script.mixed(products, coherence).losses["layer"]
        assert found["w8a8"] == pytest.approx(loss, rel=1e-5) and found["fp16"] == 0
    assert products.table(apart=False).losses["layer"]["w8a8"] == pytest.approx(together, rel=1e-5)
    each = script.weighted(products, "each")
    errors = each.errors_by_call(each.plan_entries({"layer": "w8a8"}))
    np.testing.assert_allclose(errors, errors.mean(), rtol=1e-4)


@using("trajectory")
def test_gains_are_beside_the_first_objective(script: ModuleType) -> None:
    pytest.importorskip("torch")
    rows = [
        ("a", "old", "weights only", 0.3, (40.0, 39.0, 35.0, 30.0)),
        ("a", "new", "weights only", 0.3, (41.0, 39.0, 34.0, 31.0)),
        ("b", "old", "weights only", 0.3, (50.0, 49.0, 45.0, 40.0)),
        ("b", "new", "weights only", 0.3, (50.0, 50.0, 45.5, 44.0)),
    ]
    last = script.summary(rows, ["old", "new"]).splitlines()[-1]
    assert last == "| new | +0.50 (1 of 2) | +0.50 (1 of 2) | -0.25 (1 of 2) | +2.50 (2 of 2) |"
