"""What an engine's log shows of its products: kept with the run, in its report, and in the plans made after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.runs import build, recipe_for

pytestmark = pytest.mark.rtx

# FP8 products are assumed to stay apart. In an engine for Ada these two are one kernel (the keys, which are transposed
# at once, are not).
NAMES = ["attn.to_q", "attn.to_v"]
CHANGES: dict[str, Any] = {
    "target": "rtx-ada",
    "budget": 0.9,
    "allocate__protect": [{"layers": "*", "schemes": ["f8a8"]}],
    "allocate__schemes": ["fp16", "f8a8"],
    "allocate__branches": [],
    "allocate__ranges": [],
    "engine__build": True,
    "engine__batch_max": 2,
    "evaluate__controls": False,
}


def latency_of(run: Path) -> dict[str, Any]:
    plan = json.loads((run / "allocate" / "plan.json").read_text(encoding="utf-8"))
    return dict(plan["latency"])


def test_the_engines_log_counts_in_the_report_and_in_the_next_plan(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    run = tmp_path / "run"
    first = build(recipe_for(model, **CHANGES), run)
    record = json.loads((run / "engine" / "build.json").read_text(encoding="utf-8"))
    assert {"family": "f8a8", "layers": NAMES} in record["products"]
    planned, reported = latency_of(run), first.report["expected_latency"]
    assert planned["fusion"].endswith("is assumed: no engine was built here")
    shown = (
        f"1 of 1 groups as in the log of the engine for rtx-ada (tensorrt_rtx {record['version']})"
    )
    assert shown in reported["fusion"] and f"{planned['ours_ms']:.4g} ms" in reported["fusion"]
    # One launch of 3 us and one reading of the input less, and the same for other products of one input.
    joined = sum(len(one["layers"]) - 1 for one in record["products"])
    assert 0.003 * joined < planned["ours_ms"] - reported["ours_ms"] < 0.004 * joined
    assert shown in (run / "report.html").read_text(encoding="utf-8")

    # The engine was built after the plan: it does not make it out of date.
    again = build(recipe_for(model, **CHANGES), run)
    assert again.made == ["report"]
    assert again.report["expected_latency"] == reported

    next_plan = build(recipe_for(model, **{**CHANGES, "budget": 0.8}), run, "allocate")
    assert next_plan.made == ["allocate"]
    assert latency_of(run)["fusion"].endswith(shown)
    assert latency_of(run)["ours_ms"] == reported["ours_ms"]
    # An engine for other GPUs says nothing of this target's.
    other = {**CHANGES, "target": "rtx-blackwell"}
    build(recipe_for(model, **other), run, "allocate")
    assert latency_of(run)["fusion"].endswith("no engine was built here")
