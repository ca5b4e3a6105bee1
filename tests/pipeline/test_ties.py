"""Queries, keys and values under one scheme in the pipeline: the plan, the recipe's rules, other targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.runs import Built, build, recipe_for

NAMES = ["attn.to_q", "attn.to_k", "attn.to_v"]


def plan_of(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "allocate" / "plan.json").read_text(encoding="utf-8"))
    return read


def test_the_plan_gives_them_one_scheme_and_says_so(finished: Built) -> None:
    plan = plan_of(finished.run)
    assert plan["tied"] == [NAMES]
    assert len({plan["schemes"][name] for name in NAMES}) == 1
    # Each pays for its own weights, and all of them are in the sum.
    assert (
        sum(layer["bytes"] for layer in plan["layers"]) <= plan["size_bytes"] - plan["fixed_bytes"]
    )


@pytest.mark.parametrize(
    ("changes", "tied", "note"),
    [
        ({"allocate__tie_qkv": False}, [], ""),
        (
            {"allocate__protect": [{"layers": "attn.to_q", "schemes": ["fp16"]}]},
            [NAMES[1:]],
            "attn.to_q and attn.to_k",
        ),
        ({"allocate__protect": [{"layers": "attn.*", "schemes": ["w8a16"]}]}, [NAMES], ""),
        ({"target": "onnxruntime-cpu"}, [], ""),
    ],
    ids=["off", "one protected", "all protected", "no engine"],
)
def test_the_recipes_rules_come_first(
    run: Path, model: Path, changes: dict[str, Any], tied: list[list[str]], note: str
) -> None:
    build(recipe_for(model, **changes), run, "allocate")
    plan = plan_of(run)
    assert plan["tied"] == tied
    assert any(text.endswith(note) and "not tied" in text for text in plan["notes"]) == bool(note)
    if note:
        assert plan["schemes"]["attn.to_q"] == "fp16"
        assert plan["schemes"]["attn.to_k"] == plan["schemes"]["attn.to_v"]
