"""The controls are uniform whatever the plan may choose from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from tests.pipeline.runs import build, recipe_for, save_denoiser


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def test_everything_int8_quantizes_activations_even_where_the_plan_may_not(tmp_path: Path) -> None:
    model = save_denoiser(tmp_path / "model")
    recipe = recipe_for(model, allocate__schemes=["fp16", "w4a16"], budget=0.5)
    built = build(recipe, tmp_path / "run", "controls")
    int8 = operators(built.run / "controls" / "int8" / "model.onnx")
    int4 = operators(built.run / "controls" / "int4" / "model.onnx")
    assert int8["QuantizeLinear"] > 5 and int8["DequantizeLinear"] > int8["QuantizeLinear"]
    assert int4["QuantizeLinear"] == 0 and int4["DequantizeLinear"] > 5
