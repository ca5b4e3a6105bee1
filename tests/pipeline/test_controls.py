"""The controls are uniform whatever the plan may choose from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

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


@pytest.mark.parametrize("target", ["rtx-ada", "jetson-thor-jp7"])
def test_fp8_and_fp4_are_evaluated_beside_int8_where_the_target_takes_them(
    tmp_path: Path, target: str
) -> None:
    model = save_denoiser(tmp_path / "model")
    # Whatever the plan may choose from.
    recipe = recipe_for(model, allocate__schemes=["fp16", "w4a16"], budget=0.6, target=target)
    built = build(recipe, tmp_path / "run")
    controls = built.report["controls"]
    newer = {"fp8"} if target == "rtx-ada" else {"fp8", "fp4", "nvidia"}
    assert set(controls) - {"int8", "int8-static", "int4"} == newer
    folder, layers = built.run / "controls", len(built.report["layers"])
    for name in newer:
        files = operators(folder / name / "model.onnx")
        assert bool(files["TRT_FP4DynamicQuantize"]) is (name != "fp8")
        assert controls[name]["measured_nmse"] > 0 and controls[name]["psnr_db"] > 0
        assert sum(controls[name]["layers"].values()) == layers
        assert controls[name]["title"].endswith(", simulated") is (name != "fp8")
        # Times are of what an engine computes.
        assert built.report["expected_latency"]["controls_ms"][name] > 0
    assert controls["fp8"]["layers"].keys() <= {"f8a8", "fp16"}
    for page in ("report.md", "report.html"):
        text = (built.run / page).read_text(encoding="utf-8")
        assert "Everything FP8" in text and ("NVIDIA" in text) is ("nvidia" in newer)
