"""Slots for LoRAs in written graphs: nothing while they are zero, the LoRA's own product when they are filled."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mpq_deploy.device.lora_inputs import is_slot
from mpq_deploy.engine.builder import BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import Layer, LayerGraph, layer_graph
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.graph.writers.lora_slots import (
    SLOTTED,
    SLOTTED_SIMULATED,
    require_slots,
    slot_bytes,
    slotted_layers,
    write_slotted,
)
from mpq_deploy.system.progress import Talk
from tests.graph.writers.test_branches import (
    attention,
    factors_of,
    network,
    plan_for,
    reference,
    write,
)
from tests.graphs import GraphBuilder

RANK = 4
Arrays = dict[str, np.ndarray]
SLOTS = ("gemm", "gemm_untransposed", "matmul", "plain")


def factors(layers: list[Layer], width: float = 0.3) -> Arrays:
    """What fills the slots of ``layers``."""
    rng, found = np.random.default_rng(5), {}
    for layer in layers:
        into = layer.weight_shape[1 - layer.out_axis]
        for end, shape in (("A", (RANK, into)), ("B", (layer.out_channels, RANK))):
            values = rng.standard_normal(shape) * width
            found[f"{layer.name}.lora_{end}"] = values.astype(np.float16)
    return found


def updated(source: bytes, layers: list[Layer], given: Arrays) -> bytes:
    """The float graph ``source`` with the LoRA as nodes with constants: convolutions for convolutions."""
    model = onnx.load_from_string(source)
    nodes = list(model.graph.node)
    for layer in layers:
        (use,) = layer.uses
        at = next(i for i, node in enumerate(nodes) if use.output in node.output)
        nodes[at].output[0] = f"{use.output}/before"
        down, up = (given[f"{layer.name}.lora_{end}"].astype(np.float32) for end in "AB")
        op = "Conv" if layer.op == "Conv" else "MatMul"
        weights = {
            f"{layer.name}/{label}": values[..., None, None] if op == "Conv" else values.T
            for label, values in (("down", down), ("up", up))
        }
        for name, values in weights.items():
            tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
            model.graph.initializer.append(tensor)
        first, second = weights
        nodes[at + 1 : at + 1] = [
            onnx.helper.make_node(op, [use.input, first], [f"{first}/y"]),
            onnx.helper.make_node(op, [f"{first}/y", second], [f"{second}/y"]),
            onnx.helper.make_node("Add", [f"{use.output}/before", f"{second}/y"], [use.output]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def run(source: bytes | Path, given: Arrays | None = None, plain: bool = False) -> np.ndarray:
    """The graph's output; ``given``: what its slots hold, None: zeros; ``plain``: ORT as it is written."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = 1
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(source if isinstance(source, bytes) else str(source), options)
    feeds = {}
    for one in session.get_inputs():
        kind = np.float16 if "float16" in one.type else np.float32
        if is_slot(one.name):
            feeds[one.name] = np.zeros(one.shape, kind) if given is None else given[one.name]
        else:
            shape = [3 if isinstance(size, str) else size for size in one.shape]
            feeds[one.name] = np.random.default_rng(0).standard_normal(shape).astype(kind)
    return np.asarray(session.run(None, feeds)[0], np.float32)


def with_slots(
    folder: Path, layers: list[Layer], folded: Arrays | None = None
) -> tuple[Path, Path]:
    """The deployed graph with slots, and its twin."""
    return (
        write_slotted(folder / DEPLOYED, SLOTTED, layers, RANK, folded or {}),
        write_slotted(folder / SIMULATED, SLOTTED_SIMULATED, layers, RANK, folded or {}),
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return network().save(tmp_path / "model.onnx")


def chosen(graph: LayerGraph, names: tuple[str, ...] = SLOTS) -> list[Layer]:
    return [layer for layer in graph.layers if layer.name in names]


@pytest.mark.parametrize(
    "scheme", ["fp16+", "w4a16+rows5", "w8a8+cols1", "w4a16+lowrank8", "w4a8+scale5"]
)
def test_filled_slots_are_the_lora_and_empty_ones_nothing(
    model: Path, tmp_path: Path, scheme: str
) -> None:
    graph = layer_graph(ir.load(model))
    layers, plan = chosen(graph), plan_for(graph, scheme)
    write(model, graph, plan, tmp_path / "out")
    before = constant_bytes(tmp_path / "out" / DEPLOYED)
    deployed, twin = with_slots(tmp_path / "out", layers)
    for path in (deployed, twin):
        onnx.checker.check_model(str(path), full_check=True)
    assert constant_bytes(deployed) == before

    given = factors(layers)
    assert sum(values.nbytes for values in given.values()) == slot_bytes(layers, RANK)
    found = run(twin, given)
    expected = run(updated(reference(model, graph, plan), layers, given))
    np.testing.assert_array_less(
        np.sum((found - expected) ** 2), 1e-4 * np.sum(expected**2) if "a8" in scheme else 1e-8
    )
    assert np.abs(found - run(twin)).max() > 0.1
    for path, source in ((deployed, DEPLOYED), (twin, SIMULATED)):
        without = run(tmp_path / "out" / source, plain=True)
        np.testing.assert_array_equal(run(path, plain=True), without)


def test_what_a_norm_multiplies_channels_by_is_undone(tmp_path: Path) -> None:
    source = attention(False).save(tmp_path / "model.onnx")
    graph = layer_graph(ir.load(source))
    layers = chosen(graph, ("q", "k", "v"))
    plan = {n.name: "w8a8+scale5" if n in layers else "fp16" for n in graph.layers}
    write(source, graph, plan, tmp_path / "out")
    before = constant_bytes(tmp_path / "out" / DEPLOYED)
    (tensor,) = {use.input for layer in layers for use in layer.uses}
    deployed, twin = with_slots(tmp_path / "out", layers, {tensor: factors_of(layers[0])})
    assert constant_bytes(deployed) - before == 2 * len(layers) * 64
    given = factors(layers)
    expected = run(updated(reference(source, graph, plan), layers, given))
    found = run(twin, given)
    assert np.sum((found - expected) ** 2) <= 1e-3 * np.sum(expected**2)
    assert np.abs(expected - run(twin)).max() > 1


@pytest.mark.rtx
@pytest.mark.parametrize("scheme", ["fp16+", "w8a8+scale5", "w4a16+lowrank8"])
def test_an_engine_with_slots_is_verified_and_copies_no_factor(
    model: Path, tmp_path: Path, scheme: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = layer_graph(ir.load(model))
    layers, plan = chosen(graph), plan_for(graph, scheme)
    written = write(model, graph, plan, tmp_path / "out")
    deployed, _ = with_slots(tmp_path / "out", layers)
    expected = ExpectedLayers.of(graph.layers, {n: SCHEMES[s] for n, s in plan.items()}, written)
    record = build_engine(
        BuildRequest(
            deployed,
            load_target("rtx").build_target,
            BatchProfile(1, 2, 4, {"sample": (4, 8, 8)}),
        ),
        tmp_path / "engine",
        expected,
        Talk(),
    )
    record.require_verified()
    kernels = (tmp_path / "engine" / "layers.txt").read_text(encoding="utf-8").splitlines()
    products = [line for line in kernels if re.search(r"ONNX Layer: \w+/lora/(down|up)\]", line)]
    factor = re.compile(r"Inputs: \[ \{ Name: \w+\.lora_[AB],[^{]*\]")
    assert products and not [line for line in kernels if factor.search(line)]


def test_blocks_that_attend_have_slots_and_others_none(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.input("sample", ["N", 8, 4, 4])
    block = "down_blocks.0.attentions.1"
    x = g.conv(x, "down_blocks.0.resnets.0.conv1", 8, 8)
    x = g.conv(x, f"{block}.proj_in", 8, 8, kernel=1)
    x = g.conv(x, f"{block}.wide", 8, 8)
    x = g.conv(x, f"{block}.strided", 8, 8, kernel=1, strides=[2, 2])
    for name in (f"{block}.transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"):
        x = g.matmul(x, name, 2, 2)
    for name in ("encoder.layers.0.self_attn.q_proj", "time_embedding.linear_1", "blocks_0.to_q"):
        x = g.matmul(x, name, 2, 2)
    g.output(x, ["N", 8, 2, 2])
    graph = layer_graph(ir.load(g.save(tmp_path / "model.onnx")))
    assert [layer.name for layer in slotted_layers(graph)] == [
        f"{block}.proj_in",
        f"{block}.transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.ff.net.2",
        "encoder.layers.0.self_attn.q_proj",
    ]


def test_a_model_without_such_blocks_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match=r"by names such as 'conv_in'\. Give the model as a diff"):
        require_slots(layer_graph(ir.load(model)))


def test_a_shared_weight_has_one_slot_for_all_its_nodes(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.input("sample", ["N", 16])
    weight = g.random("blocks.0.tied.weight", 16, 16)
    for name in ("first", "second"):
        x = g.op("Tanh", [g.op("MatMul", [x, weight], name)], f"{name}/tanh")
    g.output(x, ["N", 16])
    path = g.save(tmp_path / "model.onnx")
    (layer,) = require_slots(layer_graph(ir.load(path)))
    slotted = write_slotted(path, SLOTTED, [layer], RANK, {})
    given = factors([layer])
    down, up = (given[f"blocks.0.tied.lora_{end}"].astype(np.float32) for end in "AB")
    fused = onnx.load(path)
    tensor = fused.graph.initializer[0]
    whole = onnx.numpy_helper.to_array(tensor) + (up @ down).T
    tensor.CopyFrom(onnx.numpy_helper.from_array(whole, tensor.name))
    np.testing.assert_allclose(run(slotted, given), run(fused.SerializeToString()), atol=1e-5)
