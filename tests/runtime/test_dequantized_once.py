"""On a GPU sessions dequantize constants when they are opened, as the CPU does: no kernel of the GPU is asked for it.

The option that ``start_session`` sets there is the one of ``fake_quant_only``, so what it does is
seen on the CPU. ONNX Runtime's CUDA provider has kernels for INT8 per tensor and channel, INT4 and
FP8 per tensor, none for INT8 in blocks and FP4 (its sources, version 1.31).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mpq_deploy.formats.scheme import FORMATS, SCHEMES
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.runtime.ort import session_options
from mpq_deploy.system.compute import CPU_PROVIDER
from tests.engine.float_plans import write_floats
from tests.engine.plans import write_plan
from tests.graph.writers.test_branches import BRANCHES, network, plan_for, write
from tests.graphs import denoiser_graph

# Every format without a branch that a target takes, and the branches beside some.
BODIES = [scheme.name for scheme in FORMATS if scheme.name != "fp16"]
FLOAT, LEVEL = onnx.TensorProto.FLOAT, ort.GraphOptimizationLevel
QUANTIZED = ("QuantizeLinear", "DequantizeLinear")


def written(scheme: str, folder: Path) -> Path:
    if "+" in scheme:
        exported = network().save(folder / "exported.onnx")
        graph = layer_graph(load_model(exported))
        write(exported, graph, plan_for(graph, scheme), folder / "made")
        return folder / "made" / SIMULATED
    (folder / "made").mkdir()
    exported = denoiser_graph(size=8).save(folder / "exported.onnx")
    if SCHEMES[scheme].weight.generation:
        write_floats(exported, folder / "made", lambda *_: scheme)
    else:
        write_plan(folder / "made", lambda *_: scheme)
    return folder / "made" / SIMULATED


def optimized(model: Path) -> onnx.ModelProto:
    """What the session computes."""
    options = session_options(1, fake_quant_only=True)
    options.graph_optimization_level = LEVEL.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(model.with_name("optimized.onnx"))
    ort.InferenceSession(str(model), options, providers=[CPU_PROVIDER])
    return onnx.load(model.with_name("optimized.onnx"), load_external_data=False)


@pytest.mark.parametrize("scheme", [*BODIES, *BRANCHES])
def test_no_constant_is_dequantized_again(scheme: str, tmp_path: Path) -> None:
    model = written(scheme, tmp_path)
    stored = onnx.load(model, load_external_data=False).graph
    names = {tensor.name for tensor in stored.initializer}
    assert any(n.op_type in QUANTIZED and n.input[0] in names for n in stored.node), "not quantized"
    graph = optimized(model).graph
    names = {tensor.name for tensor in graph.initializer}
    constant = [n.name for n in graph.node if n.input and all(i in names for i in n.input if i)]
    assert constant == []
    assert not [n.name for n in graph.node if n.op_type in QUANTIZED and n.input[0] in names]
    # What is left is of activations, in types that CUDA has kernels for, one scale per tensor.
    for node in graph.node:
        if node.op_type in QUANTIZED:
            assert not any(a.name == "block_size" and a.i for a in node.attribute), node.name


@pytest.mark.parametrize("scheme", [*BODIES, *BRANCHES])
def test_dequantizing_early_changes_no_bit(scheme: str, tmp_path: Path) -> None:
    """Every value that constants alone decide, as each node's kernel computes it and as it is folded."""
    path = written(scheme, tmp_path)
    model = onnx.load(path)
    constant = {tensor.name for tensor in model.graph.initializer}
    asked = []
    for node in model.graph.node:
        if node.input and all(name in constant for name in node.input if name):
            constant |= set(node.output)
            asked += node.output
    model = onnx.shape_inference.infer_shapes(model)
    types = {value.name: value for value in model.graph.value_info}
    asked = [name for name in asked if types[name].type.tensor_type.elem_type == FLOAT]
    assert len(asked) > 3
    model.graph.output.extend(types[name] for name in asked)
    found = []
    for level in (LEVEL.ORT_DISABLE_ALL, LEVEL.ORT_ENABLE_ALL):
        options = session_options(1, fake_quant_only=True)
        options.graph_optimization_level = level
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU_PROVIDER])
        feeds = {}
        for value in session.get_inputs():
            shape = [n if isinstance(n, int) else 2 for n in value.shape]
            feeds[value.name] = np.ones(shape, np.float32 if "float" in value.type else np.int64)
        found.append(session.run(asked, feeds))
    for name, kernel, folded in zip(asked, *found, strict=True):
        np.testing.assert_array_equal(kernel.view(np.uint32), folded.view(np.uint32), name)
