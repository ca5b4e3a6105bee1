"""Latency through the stages: the plan, its limits, tables, and what users read about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.errors import UsageError
from mpq_deploy.latency.latency_table import LatencyTable
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import Talk
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import Built, recipe_for

Cli = Callable[..., Outcome]


def plan_of(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "allocate" / "plan.json").read_text(encoding="utf-8"))
    return read


def test_a_plan_says_what_it_is_estimated_to_take(finished: Built) -> None:
    latency = plan_of(finished.run)["latency"]
    assert latency["source"] == "estimated"
    assert "roofline" in latency["basis"] and "not confirmed" in latency["basis"]
    names = ("ours_ms", "fp16_ms", "int8_ms", "int4_ms")
    assert min(latency[name] for name in names) > latency["others_ms"] > 0
    # Layers of a few thousand weights: quantizing their inputs takes longer than INT8 saves.
    assert latency["slower_in_int8"]
    notes = finished.report["notes"]
    assert any("INT8 is expected to be slower than FP16 (estimated)" in note for note in notes)
    assert finished.report["expected_latency"]["ours_ms"] == latency["ours_ms"]
    for name in ("report.md", "report.html"):
        assert "Estimated, not measured:" in (finished.run / name).read_text(encoding="utf-8")


def test_the_plans_total_is_the_sum_of_its_parts(finished: Built, model: Path) -> None:
    with open_pipeline(recipe_for(model), finished.run, Talk()) as pipeline:
        solver = PlanSolver(pipeline.run)
        plan = solver.solve("0.4")
    from mpq_deploy.formats.scheme import SCHEMES

    assert solver.costs is not None and plan.latency is not None
    schemes = {name: SCHEMES[scheme] for name, scheme in plan.schemes.items()}
    assert plan.latency.ours_ms == pytest.approx(solver.costs.plan_ns(solver.layers, schemes) / 1e6)


def test_latency_as_the_objective_is_never_slower_and_holds_the_budget(run: Path, cli: Cli) -> None:
    default = plan_of(run)
    assert cli("allocate", run, "--objective", "latency").code == 0
    fastest = plan_of(run)
    assert fastest["latency"]["ours_ms"] <= default["latency"]["ours_ms"]
    assert fastest["size_bytes"] <= fastest["budget_bytes"]
    between = (default["latency"]["ours_ms"] + fastest["latency"]["ours_ms"]) / 2
    assert (
        cli("allocate", run, "--objective", "quality", "--max-latency", f"{between:.6f}ms").code
        == 0
    )
    limited = plan_of(run)
    assert limited["latency"]["ours_ms"] <= between
    assert limited["size_bytes"] <= limited["budget_bytes"]


def test_with_room_for_fp16_latency_leaves_layers_that_int8_slows_down_in_fp16(
    run: Path, cli: Cli
) -> None:
    assert cli("allocate", run, "--objective", "latency", "--budget", "1.0").code == 0
    plan = plan_of(run)
    assert plan["latency"]["slower_in_int8"]
    assert plan["latency"]["taken"] == []
    assert plan["latency"]["ours_ms"] <= min(plan["latency"]["fp16_ms"], plan["latency"]["int8_ms"])


def test_a_limit_too_small_names_the_least_which_then_works(run: Path, cli: Cli) -> None:
    refused = cli("allocate", run, "--max-latency", "1us")
    assert refused.code == 2
    least = refused.err.split("the fastest takes ")[1].split(" ms")[0]
    assert cli("allocate", run, "--max-latency", f"{least}ms").code == 0
    assert plan_of(run)["latency"]["ours_ms"] <= float(least)


def test_a_sweep_says_which_budgets_no_plan_is_fast_enough_for(run: Path, cli: Cli) -> None:
    least = cli("allocate", run, "--max-latency", "1us", "--budget", "1.0").err.split(
        "the fastest takes "
    )[1]
    limited = float(least.split(" ms")[0]) * 1.0001
    assert cli("allocate", run, "--max-latency", f"{limited}ms", "--budget", "1.0").code == 0
    swept = cli("sweep", run, "--budgets", "0.4,1.0")
    assert swept.code == 0, swept.err
    assert "no plan is fast enough" in swept.out


def test_a_target_without_figures_is_refused_where_latency_counts(run: Path, cli: Cli) -> None:
    recipe = (
        (run / "recipe.yaml")
        .read_text(encoding="utf-8")
        .replace("target: rtx", "target: onnxruntime-cpu")
    )
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    refused = cli("allocate", run, "--max-latency", "5ms")
    assert refused.code == 2
    assert "no figures" in refused.err


def test_a_limit_on_the_loss_needs_latency_as_the_objective(model: Path, tmp_path: Path) -> None:
    recipe = recipe_for(model, allocate__max_loss=0.1)
    with (
        pytest.raises(UsageError, match="max_loss"),
        open_pipeline(recipe, tmp_path / "run", Talk()),
    ):
        pass


def estimated_table(run: Path, cli: Cli, path: Path) -> LatencyTable:
    done = cli("profile", run, "--estimate", "-o", path)
    assert done.code == 0, done.err
    return LatencyTable.load(path)


def test_a_table_of_the_estimates_gives_the_estimates_back(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    before = plan_of(run)
    table = estimated_table(run, cli, tmp_path / "table.json")
    assert table.source == "estimated"
    assert cli("allocate", run, "--latency-table", tmp_path / "table.json").code == 0
    after = plan_of(run)
    assert after["latency"]["source"] == "estimated"
    assert "itself an estimate" in after["latency"]["basis"]
    for key in ("ours_ms", "fp16_ms", "int8_ms"):
        # A row is rounded up with its quantizer, in nanoseconds.
        assert after["latency"][key] == pytest.approx(before["latency"][key], abs=1e-5)


def test_measured_rows_are_taken_and_what_is_missing_is_counted_and_said(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    whole = estimated_table(run, cli, path)
    # INT8 on this device is ten times slower than anything else; one in three rows is missing.
    kept = {
        key: 10.0 if "a8" in key[1] else 0.01
        for number, key in enumerate(whole.entries)
        if number % 3
    }
    replace(
        whole, source="measured", device="a slow GPU", builder="a builder 1.0", entries=kept
    ).save(path)
    assert (
        cli(
            "allocate", run, "--latency-table", path, "--objective", "latency", "--budget", "1.0"
        ).code
        == 0
    )
    plan = plan_of(run)
    latency = plan["latency"]
    assert latency["source"] == "measured and estimated"
    assert latency["measured"] > 0 and latency["estimated"] > 0
    assert (
        f"{latency['measured']:,} of {latency['measured'] + latency['estimated']:,}"
        in latency["basis"]
    )
    assert "a slow GPU (a builder 1.0)" in latency["basis"]
    assert latency["ours_ms"] < 1.0 < latency["int8_ms"]


def test_another_date_makes_nothing_again_and_another_time_does(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    table = estimated_table(run, cli, path)
    cli("allocate", run, "--latency-table", path)
    replace(table, date="2030-01-01").save(path)
    assert "allocate   up to date" in cli("allocate", run).err
    key = next(iter(table.entries))
    replace(table, entries={**table.entries, key: 3.0}).save(path)
    assert "allocate   again: latency_table changed" in cli("allocate", run).err


def test_a_table_of_another_target_is_refused_before_anything_is_made(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    replace(estimated_table(run, cli, path), target="rtx-ada").save(path)
    before = (run / "allocate" / "plan.json").read_bytes()
    refused = cli("allocate", run, "--latency-table", path)
    assert refused.code == 2
    assert "rtx-ada, not of rtx" in refused.err
    assert (run / "allocate" / "plan.json").read_bytes() == before


def test_profiling_without_the_hardware_says_what_would_be_measured(
    run: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mpq_deploy.latency.profile.why_no_gpu", lambda: "No NVIDIA driver was found"
    )
    monkeypatch.setattr("mpq_deploy.latency.profile.find_trtexec", lambda: None)
    count = len(estimated_table(run, cli, tmp_path / "table.json").entries)
    refused = cli("profile", run, "-o", tmp_path / "measured.json")
    assert refused.code == 2
    assert f"no NVIDIA driver was found. A table takes {count} engines, of " in refused.err
    refused = cli("profile", run, "--target", "jetson-agx-orin", "-o", tmp_path / "measured.json")
    assert "trtexec is not on this machine" in refused.err
    assert not (tmp_path / "measured.json").exists()
