"""Attention in FP8: a choice of the solver whose loss is what the written graph shows."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.engine.build_log import parse_engine_log
from mpq_deploy.engine.plan_engine import expected_layers
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.engine.verify import verify
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.recipe_check import check_recipe
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.parallel.processes import Processes
from mpq_deploy.system.progress import Talk
from tests.graphs import GraphBuilder, denoiser_graph
from tests.pipeline.runs import build, recipe_for, save_denoiser

pytestmark = pytest.mark.torch
NAME = "attn/mixed"
FP8: dict[str, Any] = {
    "target": "rtx-ada",
    "budget": 0.9,
    "allocate__attention": "fp8",
    "allocate__objective": "latency",
    "allocate__schemes": ["fp16", "w8a16"],
    # The loss is a mean over random directions.
    "measure__probes": 48,
}


def denoiser() -> GraphBuilder:
    """The tiny denoiser with an attention that looks at some pixels more than at others."""
    graph = denoiser_graph(channels=16, size=8)
    for weight in graph.weights:
        if weight.name.startswith(("attn.to_q", "attn.to_k")):
            array = onnx.numpy_helper.to_array(weight)
            weight.CopyFrom(onnx.numpy_helper.from_array(3 * array, weight.name))
    return graph


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and its run with attention in FP8 as far as the graphs."""
    folder = tmp_path_factory.mktemp("attention")
    model = save_denoiser(folder / "model", denoiser())
    build(recipe_for(model, **FP8), folder / "run", "quantize")
    return model, folder / "run"


def test_the_plan_has_it_in_fp8_and_the_file_its_four_scales(built: tuple[Path, Path]) -> None:
    plan = json.loads((built[1] / "allocate" / "plan.json").read_text(encoding="utf-8"))
    assert plan["schemes"][NAME] == "f8a8"
    assert "1 of 1 attentions that may compute in FP8 do so (allocate.attention)" in plan["notes"]
    graph = onnx.load(built[1] / "quantize" / "model.onnx").graph
    made = {name: node for node in graph.node for name in node.output}
    for product in ("attn/scores", NAME):
        (node,) = (node for node in graph.node if node.name == product)
        assert [made[name].op_type for name in node.input] == ["DequantizeLinear"] * 2
    types = Counter(value.data_type for value in graph.initializer)
    assert types[onnx.TensorProto.INT8] and not types[onnx.TensorProto.FLOAT8E4M3FN]


def test_the_loss_of_rounding_it_is_that_of_the_written_graph(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    table = json.loads((built[1] / "measure" / "table.json").read_text(encoding="utf-8"))
    losses = table["losses"][NAME]
    with open_pipeline(recipe_for(built[0], **FP8), built[1], Talk()) as pipeline:
        run, outputs = pipeline.run, {}
        layers = {layer.name: "fp16" for layer in run.exported.graph.layers}
        for scheme in ("fp16", "f8a8"):
            (tmp_path / scheme).mkdir()
            write_plan(run, {**layers, NAME: scheme}, tmp_path / scheme)
            path = tmp_path / scheme / "model.fp32.onnx"
            model = OrtDenoiser(path, run.exported.spec, fake_quant_only=True)
            calls = RecordedCalls(run.calibration.inputs, run.exported.spec)
            outputs[scheme] = [model.run(batch.feed) for batch in calls.batches(4)]
    by_step = [
        np.square(changed - plain).sum() / np.square(plain).sum()
        for plain, changed in zip(outputs["fp16"], outputs["f8a8"], strict=True)
    ]
    assert losses["fp16"] == 0
    assert losses["f8a8"] == pytest.approx(float(np.mean(by_step)), rel=0.2)


def test_workers_calibrate_and_measure_the_same(built: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(built[1], tmp_path / "run"))
    for stage in ("calibrate", "measure", "allocate"):
        shutil.rmtree(run / stage)
    with open_pipeline(recipe_for(built[0], **FP8), run, Talk(), Processes(2)) as pipeline:
        pipeline.run_until("allocate")
    for file in ("calibrate/stats.npz", "measure/table.json", "allocate/plan.json"):
        assert (run / file).read_bytes() == (built[1] / file).read_bytes()


@pytest.mark.rtx
@pytest.mark.slow
def test_the_engine_reads_fp8_in_both_products(built: tuple[Path, Path]) -> None:
    recipe = recipe_for(built[0], **FP8, engine__build=True)
    build(recipe, built[1], "engine")
    record = EngineRecord.load(built[1] / "engine" / "build.json")
    assert record.verified and not record.problems
    log = parse_engine_log((built[1] / "engine.log").read_text(encoding="utf-8"))
    with open_pipeline(recipe, built[1], Talk()) as pipeline:
        expected = expected_layers(pipeline.run)
    assert expected.fp8_attention == ("attn/scores", NAME)
    false = replace(expected, fp8_attention=("attn.to_out",))
    assert verify(log, expected) == [] and [one.layer for one in verify(log, false)] == [
        "attn.to_out"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "rtx"}, "the target rtx has no FP8 products"),
        ({"measure__method": "gain"}, "measure.method is gain"),
        ({"recover__steps": 5}, "recover.steps is 5"),
    ],
    ids=["target", "metric", "recovery"],
)
def test_it_is_refused_where_it_cannot_be(model: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_recipe(recipe_for(model, **{**FP8, **changes}))
