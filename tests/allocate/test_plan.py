"""A plan on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mpq_deploy.allocate.cross_terms import CrossTerms
from mpq_deploy.allocate.milp import SolverReport
from mpq_deploy.allocate.plan import BitProgram, PlannedLayer, PrecisionPlan
from mpq_deploy.graph.layers import OtherWeight
from mpq_deploy.latency.costs import PlanLatency

LAYER = PlannedLayer(
    "conv", "Conv", "w8a8", 70, 128, 64, (8, 8, 1, 1), 1e-4, 0.003, {"w4a16-b32": "too narrow"}
)
PLAN = PrecisionPlan(
    budget_bytes=100,
    size_bytes=90,
    fp16_size_bytes=150,
    fixed_bytes=20,
    predicted_loss=1e-4,
    schemes={"conv": "w8a8"},
    layers=(LAYER,),
    others=(OtherWeight("table", "Gather", 10, "Gather is not a Conv, Gemm or MatMul"),),
    solver=SolverReport("Optimal", 0.0, 1e-4, 1e-4),
    notes=("a note",),
    cross_terms=CrossTerms(0.5, 1, True, 4, 1e-4, None, 9e-5, None),
    latency=PlanLatency(
        1.0, 2.0, 3.0, 0.5, 2, "estimated", "a roofline", 0, 4, ("conv",), (), "loss", None
    ),
)
WEIGHED = replace(
    PLAN,
    predicted_loss=None,
    layers=(replace(LAYER, predicted_loss=None, latency_ms=None, importance=0.5, linear_bits=6.5),),
    bit_program=BitProgram(3.0, 3.5),
    cross_terms=None,
    latency=None,
)


@pytest.mark.parametrize("plan", [PLAN, WEIGHED], ids=["predicted", "weighed"])
def test_a_plan_is_read_as_it_was_written(plan: PrecisionPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert PrecisionPlan.load(tmp_path / "plan.json") == plan
    (layer,) = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["layers"]
    assert ("importance" in layer) == ("linear_bits" in layer) == (plan.bit_program is not None)
