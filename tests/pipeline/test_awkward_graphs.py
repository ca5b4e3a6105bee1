"""What crashes other quantizers goes through the whole pipeline: from the ONNX file to the engine.

Each case is checked alike: the bytes in the file are those of the plan, the output's error is finite and near the
prediction, and what stays in FP16 says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mpq_deploy.errors import InfeasibleBudgetError, ModelError
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.recipe import Recipe
from tests.graphs import GraphBuilder, awkward_graph, denoiser_graph
from tests.pipeline.runs import EVERY_SCHEME, Built, build, describe, recipe_for, save_denoiser

# The float model is evaluated at the timesteps that it was calibrated at: with so few, a time embedding of others
# is another model's.
ALIKE: dict[str, Any] = {
    "calibrate__samples": 8,
    "calibrate__timesteps": 4,
    "measure__samples": 4,
    "measure__batch_size": 4,
    "evaluate__samples": 4,
    "evaluate__steps": 4,
    "evaluate__timesteps": 4,
}
FAMILIES = ("w8a8", "w8a16", "w4a16", "w4a8")


def check(built: Built, factor: float = 4.0) -> dict[str, dict[str, Any]]:
    """Check sizes and errors of a finished run; return the report's layers by name."""
    report = built.report
    plan = json.loads((built.run / "allocate" / "plan.json").read_text(encoding="utf-8"))
    assert (
        constant_bytes(built.run / "quantize" / "model.onnx")
        == plan["size_bytes"]
        == report["size_bytes"]
    )
    assert report["size_bytes"] <= plan["budget_bytes"]
    measured = report["measured_nmse"]
    assert math.isfinite(measured)
    assert 0 < measured < 0.05
    assert 1 / factor < report["predicted_nmse"] / measured < factor
    return {row["name"]: row for row in report["layers"]}


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    folder = tmp_path_factory.mktemp("awkward")
    path = save_denoiser(folder, awkward_graph())
    return path, build(recipe_for(path, **ALIKE, **EVERY_SCHEME), folder / "run")


def test_everything_awkward_at_once(awkward: tuple[Path, Built]) -> None:
    layers = check(awkward[1])
    assert len(layers) == 16
    assert len({row["scheme"].split("-")[0] for row in layers.values()}) > 1


def test_what_stays_in_fp16_says_why(awkward: tuple[Path, Built]) -> None:
    report = awkward[1].report
    transposed = next(row for row in report["others"] if row["name"] == "up.weight")
    assert transposed["op"] == "ConvTranspose"
    assert "ConvTranspose" in transposed["reason"]
    layers = {row["name"]: row for row in report["layers"]}
    assert "w8a8" in layers["depthwise"]["refused"]
    assert "67" in layers["time.proj_16"]["refused"]["w4a16-b32"]
    # A reduction of 20 is one block whatever the nominal size: one candidate, the others say of which.
    assert "same blocks of 20 as w4a16-b32" in layers["time.linear_1"]["refused"]["w4a16-b64"]
    # 100 takes 25, 50 and 100.
    assert not {"w4a16-b32", "w4a16-b64", "w4a16-b128"} & set(layers["mlp.middle"]["refused"])


def test_a_shared_weight_is_one_layer(awkward: tuple[Path, Built]) -> None:
    built = awkward[1]
    names = [row["name"] for row in built.report["layers"]]
    assert names.count("tied") == names.count("shared") == 1
    model = onnx.load(built.run / "quantize" / "model.onnx", load_external_data=False)
    assert {"tied", "tied_again", "shared_a", "shared_b"} <= {
        node.name for node in model.graph.node
    }


def smallest_of(path: Path, run: Path, family: str) -> Any:
    """The recipe under which every layer that may takes ``family``, at the smallest budget."""
    rules = [{"layers": "*", "schemes": [family, "fp16"]}]
    # The controls are those of ``awkward``.
    given = {**ALIKE, "allocate__schemes": [family], "allocate__protect": rules}
    given["evaluate__controls"] = False
    with pytest.raises(InfeasibleBudgetError) as error:
        build(recipe_for(path, budget="1B", **given), run)
    return recipe_for(path, budget=f"{error.value.smallest}B", **given)


@pytest.fixture(scope="module")
def in_family(awkward: tuple[Path, Built], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what builds ``smallest_of`` a family once: its recipe and finished run."""

    def built(family: str) -> tuple[Recipe, Built]:
        run = tmp_path_factory.mktemp(family) / "run"
        recipe = smallest_of(awkward[0], run, family)
        return recipe, build(recipe, run)

    return cache(built)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_in_one_family(in_family: Any, family: str) -> None:
    """The smallest plan of each family: every layer that may take it does, and the file still agrees."""
    layers = check(in_family(family)[1], factor=8)
    for row in layers.values():
        refused = [name for name in row["refused"] if name.startswith(family)]
        took = row["scheme"].startswith(family)
        assert took or refused, row


@pytest.mark.rtx
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_holds_what_was_planned(in_family: Any, family: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    recipe, built = in_family(family)
    engine = recipe.engine.model_copy(update={"build": True})
    build(recipe.model_copy(update={"engine": engine}), built.run, "engine")
    record = json.loads((built.run / "engine" / "build.json").read_text(encoding="utf-8"))
    assert not [problem for problem in record["problems"] if problem["severity"] == "wrong"]


# --- one case each --------------------------------------------------------------------------------------------


def small(body: Callable[[GraphBuilder, str, str], str], opset: int = 21) -> GraphBuilder:
    """A denoiser around ``body``: (builder, image [N, 16, 7, 9], hidden [N, 32]) -> image [N, 16, 7, 9]."""
    g = GraphBuilder(opset=opset, seed=3)
    g.input("sample", ["N", 3, 7, 9])
    g.input("timestep", ["N"])
    column = g.op(
        "Unsqueeze", ["timestep", g.weight("axes1", np.array([1], np.int64))], "time/unsqueeze"
    )
    angle = g.op(
        "Mul",
        [column, g.weight("time.frequencies", np.geomspace(1, 1e-3, 16, dtype=np.float32)[None])],
        "a",
    )
    hidden = g.op(
        "Concat", [g.op("Sin", [angle], "sin"), g.op("Cos", [angle], "cos")], "time/concat", axis=1
    )
    x = body(g, g.conv("sample", "conv_in", 16, 3), g.gemm(hidden, "time.linear", 32, 32))
    g.conv(x, "conv_out", 3, 16)
    g.nodes[-1].output[0] = g.output("out_sample", ["N", 3, 7, 9])
    return g


def shifted(g: GraphBuilder, x: str, vector: str, name: str) -> str:
    axes = g.weight("axes23", np.array([2, 3], np.int64))
    return g.op(
        "Relu",
        [g.op("Add", [x, g.op("Unsqueeze", [vector, axes], f"{name}/image")], name)],
        f"{name}/relu",
    )


def different_widths(g: GraphBuilder, x: str, hidden: str) -> str:
    x = shifted(g, x, g.gemm(hidden, "proj_16", 16, 32), "first")
    return g.conv(
        shifted(g, g.conv(x, "wide", 24, 16), g.gemm(hidden, "proj_24", 24, 32), "second"),
        "back",
        16,
        24,
    )


def both_gemms(g: GraphBuilder, x: str, hidden: str) -> str:
    x = shifted(g, x, g.gemm(hidden, "as_it_is", 16, 32, trans_b=0), "first")
    return shifted(g, x, g.gemm(hidden, "transposed", 16, 32, trans_b=1), "second")


def depthwise(g: GraphBuilder, x: str, hidden: str) -> str:
    x = g.conv(
        shifted(g, x, g.gemm(hidden, "proj", 16, 32), "first"), "depthwise", 16, 16, group=16
    )
    return g.conv(g.conv(x, "grouped", 16, 16, group=4), "pointwise", 16, 16, kernel=1)


def zero_channel(g: GraphBuilder, x: str, hidden: str) -> str:
    weight = g.rng.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12
    weight[3] = 0
    weight[:, 7] = 0
    g.weight("pruned.weight", weight)
    return g.conv(shifted(g, x, g.gemm(hidden, "proj", 16, 32), "first"), "pruned", 16, 16)


def zero_layer(g: GraphBuilder, x: str, hidden: str) -> str:
    g.weight("fresh.weight", np.zeros((16, 16, 3, 3), np.float32))
    x = shifted(g, x, g.gemm(hidden, "proj", 16, 32), "first")
    return g.op("Add", [g.conv(x, "fresh", 16, 16), x], "residual")


def dead_input(g: GraphBuilder, x: str, hidden: str) -> str:
    """A layer whose input is zero at every call: it has no range, no Hessian."""
    zero = g.op(
        "Mul",
        [shifted(g, x, g.gemm(hidden, "proj", 16, 32), "first"), g.weight("zero", np.float32(0))],
        "dead",
    )
    return g.op("Add", [g.conv(zero, "unused", 16, 16), x], "residual")


def our_own_names(g: GraphBuilder, x: str, hidden: str) -> str:
    """A file that has the names which are given to scales and bodies here, for something else."""
    twice = g.op("Mul", [x, g.weight("pruned.weight//scale", np.float32(2))], "pruned.weight//body")
    return g.conv(shifted(g, twice, g.gemm(hidden, "proj", 16, 32), "first"), "pruned", 16, 16)


@pytest.mark.parametrize(
    "body",
    [our_own_names, different_widths, both_gemms, depthwise, zero_channel, zero_layer, dead_input],
)
def test_one_case(tmp_path: Path, body: Callable[[GraphBuilder, str, str], str]) -> None:
    path = save_denoiser(tmp_path, small(body))
    check(build(recipe_for(path, **{**ALIKE, "measure__samples": 2}), tmp_path / "run"), factor=10)


def test_an_embedding_that_is_one_vector(tmp_path: Path) -> None:
    """A scalar timestep's embedding without a batch axis: products of vectors, with salient rows too."""
    g = GraphBuilder(seed=3)
    g.input("sample", ["N", 3, 7, 9])
    g.input("timestep", [])
    frequencies = g.weight("time.frequencies", np.geomspace(1, 1e-3, 32, dtype=np.float32))
    hidden = g.op("Sin", [g.op("Mul", ["timestep", frequencies], "angle")], "sin")
    hidden = g.op("Relu", [g.matmul(hidden, "time.linear", 32, 32)], "relu")
    shift = g.matmul(hidden, "proj", 16, 32)
    shift = g.op("Reshape", [shift, g.weight("image", np.array([1, 16, 1, 1]))], "shift")
    x = g.op("Relu", [g.op("Add", [g.conv("sample", "conv_in", 16, 3), shift], "add")], "relu_in")
    g.conv(x, "conv_out", 3, 16)
    g.nodes[-1].output[0] = g.output("out_sample", ["N", 3, 7, 9])
    rules = [{"layers": "proj", "schemes": ["w4a16-b32+rows2"]}]
    recipe = recipe_for(save_denoiser(tmp_path, g), **ALIKE, allocate__protect=rules)
    check(build(recipe, tmp_path / "run"), factor=10)


def with_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights as Constant nodes, no declared shapes, nodes without names: as older exporters write them."""
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor, name="")
        for tensor in model.graph.initializer
    ]
    nodes = [*constants, *model.graph.node]
    for node in nodes:
        node.name = ""
    graph = helper.make_graph(nodes, "torch_jit", model.graph.input, model.graph.output)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)


def test_an_older_file_with_constant_nodes(tmp_path: Path) -> None:
    graph = denoiser_graph(channels=16, size=8)
    graph.opset = 17
    path = tmp_path / "model.onnx"
    onnx.save(with_constants(graph.model()), path)
    built = build(recipe_for(describe(path), **ALIKE), tmp_path / "run")
    layers = check(built)
    assert len(layers) == 15
    assert "down.conv1" in layers
    assert any("opset 17" in note for note in built.report["notes"])
    assert any("opset 17" in line for line in built.said)


def test_shared_initializers(tmp_path: Path) -> None:
    """One bias for many layers, and one weight that two layers read both ways round: dynamo's deduplication."""
    model = denoiser_graph(channels=16, size=8).model()
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    equal = [
        name for name, value in values.items() if name.endswith(".bias") and value.shape == (16,)
    ]
    first = "attn.to_q.weight"
    renamed = {
        **dict.fromkeys(equal, equal[0]),
        "attn.to_k.weight": first,
        "attn.to_v.weight": first,
    }
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    kept = [
        tensor
        for tensor in model.graph.initializer
        if renamed.get(tensor.name, tensor.name) == tensor.name
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    layers = check(build(recipe_for(describe(tmp_path / "model.onnx"), **ALIKE), tmp_path / "run"))
    assert len(layers) == 13
    assert "attn.to_q" in layers


@pytest.mark.torch
def test_exported_by_dynamo(tmp_path: Path) -> None:
    """A diffusers folder through torch.export: tied weights and equal biases come out as one initializer each."""
    from tests.tiny_models import ONE_LEVEL_CLASSES, tiny_unet_folder

    folder = tiny_unet_folder(tmp_path, **ONE_LEVEL_CLASSES)
    # Few samples of a model with conditions: the prediction is rough.
    check(build(recipe_for(folder, **ALIKE), tmp_path / "run"), factor=10)


def test_an_operator_that_no_target_takes_is_refused_before_any_work(tmp_path: Path) -> None:
    model = small(depthwise).model()
    place = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Relu")
    relu = model.graph.node[place]
    model.graph.node[place].CopyFrom(
        helper.make_node(
            "QuickGelu", list(relu.input), list(relu.output), name="gelu", domain="com.microsoft"
        )
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(
        ModelError, match=r"'gelu' \(QuickGelu\) cannot be deployed on rtx"
    ) as caught:
        build(recipe_for(describe(tmp_path / "model.onnx"), **ALIKE), tmp_path / "run")
    assert "plain ONNX operators" in caught.value.hint
    assert not (tmp_path / "run" / "calibrate" / "stats.npz").exists()


def test_a_file_without_declared_types_gives_a_whole_fp16_graph(tmp_path: Path) -> None:
    """Where FP32 meets FP16 a Cast stands, although the file says no type: ONNX Runtime opens the deployed graph."""
    import onnxruntime as ort

    model = small(both_gemms).model()
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "model.onnx")
    built = build(
        recipe_for(describe(tmp_path / "model.onnx"), **{**ALIKE, "measure__samples": 2}),
        tmp_path / "run",
    )
    check(built, factor=10)
    ort.InferenceSession(built.run / "quantize" / "model.onnx", providers=["CPUExecutionProvider"])
