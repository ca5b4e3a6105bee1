"""Branches beside quantized bodies: the written graph computes what their weights say, in the planned bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.engine.builder import BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.branches.cols import Cols
from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.candidates import (
    LayerCandidates,
    choices_for,
    fold_matrix,
    round_candidates,
    weight_matrix,
    with_promoted_rows,
)
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.formats.sizes import FP16_BYTES, input_channels
from mpq_deploy.graph.layers import Layer, LayerGraph, layer_graph
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    fp16_bytes,
    write_quantized,
)
from mpq_deploy.graph.writers.prescale import foldable_inputs
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, bias_refusals, weight_array
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.runtime.ort import session_options
from mpq_deploy.system.progress import Talk
from tests.graphs import GraphBuilder

BRANCHES = (
    "w4a16+rows1",
    "w4a16+rows5",
    "w4a8+rows2",
    "w8a8+cols1",
    "w8a8+cols2",
    "w4a8+cols1",
    "w4a16+lowrank8",
    "w8a8+scale5",
    "w4a8+scale5",
)
# What a plan here chooses among, and the bodies that these branches lie beside.
CHOICES = tuple(
    s
    for s in SCHEMES.values()
    if not s.simulated and (not s.branch or f"{s.family}{s.branch.suffix}" in BRANCHES)
)
SCALE, SCALE_WITHOUT, SCALE_RESCALED = 0.03, 0.02, 0.025


def network() -> GraphBuilder:
    """A convolution with stride, one without bias, both forms of Gemm and a MatMul, each wide enough for branches."""
    g = GraphBuilder()
    g.input("sample", ["N", 4, 8, 8])
    x = g.conv("sample", "conv_in", 64, 4)
    x = g.conv(g.op("Relu", [x], "relu_1"), "conv", 96, 64, strides=[2, 2])
    g.nodes.append(
        onnx.helper.make_node(
            "Conv", [x, g.random("plain.weight", 64, 96, 1, 1)], ["plain_out"], name="plain"
        )
    )
    tokens = g.op(
        "Reshape", [g.op("Relu", ["plain_out"], "relu_2"), g.weight("shape", [-1, 64])], "tokens"
    )
    x = g.gemm(tokens, "gemm", 80, 64)
    x = g.gemm(g.op("Relu", [x], "relu_3"), "gemm_untransposed", 64, 80, trans_b=0)
    x = g.op("Reshape", [x, g.weight("three", [-1, 16, 64])], "three_axes")
    g.matmul(x, "matmul", 64, 64)
    g.output("matmul_out", ["N", 16, 64])
    return g


ROUNDED: dict[bytes, dict[str, LayerCandidates]] = {}


def candidates_of(graph: LayerGraph) -> dict[str, LayerCandidates]:
    """Round the weights of a graph, once for all tests."""
    key = ir.to_proto(graph.model).SerializeToString(deterministic=True)
    if key not in ROUNDED:
        ROUNDED[key] = rounded_candidates(graph)
    return ROUNDED[key]


def rounded_candidates(graph: LayerGraph) -> dict[str, LayerCandidates]:
    refusals = bias_refusals(graph.model, graph.layers)

    def refusal(layer: Layer, scheme: Scheme) -> str:
        return refusals[layer.name] if scheme.branch else ""

    found = {}
    for number, layer in enumerate(graph.layers):
        rng = np.random.default_rng(number)
        made = round_candidates(
            layer,
            choices_for(layer, CHOICES, refusal),
            weight_matrix(layer, weight_array(graph.model, layer)),
            InputMoments(
                np.eye(layer.reduction, dtype=np.float32)[None],
                (layer.reduction,),
                outliers=outlier_order(layer),
                factors=np.tile(factors_of(layer), (len(TENTHS), 1)),
            ),
            Rounding(gptq=True, damping=0.01),
        )
        found[layer.name] = with_promoted_rows(
            made, rng.permutation(layer.out_channels).astype(np.int32)
        )
    return found


def outlier_order(layer: Layer) -> np.ndarray:
    """The same for all layers that read one tensor, as calibration's is."""
    return (
        np.random.default_rng(input_channels(layer))
        .permutation(input_channels(layer))
        .astype(np.int32)
    )


def factors_of(layer: Layer) -> np.ndarray:
    """The same for all layers that read one tensor, as calibration's are."""
    return (
        np.random.default_rng(input_channels(layer))
        .uniform(0.5, 2, input_channels(layer))
        .astype(np.float16)
    )


def plan_for(graph: LayerGraph, wanted: str) -> dict[str, str]:
    """Give every layer the scheme of that family and branch, whatever its blocks are."""
    family, branch = wanted.split("+")
    plan = {}
    for name, candidate in candidates_of(graph).items():
        found = [
            s.name
            for s in candidate.schemes
            if s.branch and s.family == family and s.name.endswith(f"+{branch}")
        ]
        plan[name] = found[0] if found else "fp16"
    return plan


def write(path: Path, graph: LayerGraph, plan: dict[str, str], folder: Path) -> int:
    folder.mkdir()
    candidates = candidates_of(graph)
    rewrites = [
        LayerRewrite(
            n,
            SCHEMES[plan[n.name]],
            candidates[n.name].forms.get(SCHEMES[plan[n.name]].weight_form),
        )
        for n in graph.layers
    ]
    scales = {t + form: s for t in graph.activations for form, s in (("", SCALE), *without())}
    return write_quantized(FloatGraph(path, "timestep", "sample"), rewrites, scales, folder)


def without() -> list[tuple[str, float]]:
    return [*((f"+cols{share}", SCALE_WITHOUT) for share in (1, 2)), ("+scale5", SCALE_RESCALED)]


def reference(path: Path, graph: LayerGraph, plan: dict[str, str]) -> bytes:
    """The float graph with each weight replaced by the deployed one, and each input by what its body and branch see."""
    model = onnx.load(path)
    candidates = candidates_of(graph)
    layers = {layer.weight: layer for layer in graph.layers}
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in layers:
            layer = layers[tensor.name]
            matrix = candidates[layer.name].weight_matrix(SCHEMES[plan[layer.name]].weight_form)
            array = fold_matrix(layer, matrix)
        elif array.dtype == np.float32:
            array = array.astype(np.float16).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), tensor.name))
    by_node = {use.node: layer for layer in graph.layers for use in layer.uses}
    nodes = []
    for node in model.graph.node:
        layer = by_node.get(node.name)
        if layer is not None and SCHEMES[plan[layer.name]].activation:
            nodes += rounded_input(model, node, layer, SCHEMES[plan[layer.name]])
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def rounded_input(
    model: onnx.ModelProto, node: onnx.NodeProto, layer: Layer, scheme: Scheme
) -> list[onnx.NodeProto]:
    """Div, Round, Clip, Mul in float, and Where for the channels that stay as they are."""
    x, name = node.input[0], node.name
    step = np.float16(dict(without()).get(scheme.activation_form, SCALE)).astype(np.float32)
    if scheme.branch.rescales:
        # Rounding x f in steps of s is rounding x in steps of s / f.
        factors = factors_of(layer).astype(np.float32)
        step = step / factors.reshape(1, -1, 1, 1) if layer.op == "Conv" else step / factors
    kept = np.zeros(input_channels(layer), bool)
    taken = scheme.branch.columns(layer) if isinstance(scheme.branch, Cols) else 0
    kept[outlier_order(layer)[:taken]] = True
    mask = kept.reshape(1, -1, 1, 1) if layer.op == "Conv" else kept
    constants = {"step": step, "low": np.float32(-128), "high": np.float32(127), "kept": mask}
    for key, value in constants.items():
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.asarray(value), f"{name}/{key}")
        )
    chain = [
        ("Div", [x, f"{name}/step"]),
        ("Round", [f"{name}/Div"]),
        ("Clip", [f"{name}/Round", f"{name}/low", f"{name}/high"]),
        ("Mul", [f"{name}/Clip", f"{name}/step"]),
        ("Where", [f"{name}/kept", x, f"{name}/Mul"]),
    ]
    node.input[0] = f"{name}/Where"
    return [
        onnx.helper.make_node(op, given, [f"{name}/{op}"], name=f"{name}/{op}")
        for op, given in chain
    ]


def run(source: bytes | Path) -> np.ndarray:
    feeds = {"sample": np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)}
    session = ort.InferenceSession(
        source if isinstance(source, bytes) else str(source),
        session_options(1, fake_quant_only=True),
    )
    return np.asarray(
        session.run(
            None, {k: v for k, v in feeds.items() if k in {i.name for i in session.get_inputs()}}
        )[0]
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return network().save(tmp_path / "model.onnx")


def planned_bytes(model: Path, graph: LayerGraph, plan: dict[str, str]) -> int:
    choices = []
    for n in graph.layers:
        name = plan[n.name]
        sizes = {name: SCHEMES[name].weight_bytes(n)}, {}, {name: SCHEMES[name].input_bytes(n)}
        choices.append(LayerChoice(n.name, n.inputs, *sizes))
    fixed = fp16_bytes(ir.load(model), "timestep", "sample") - FP16_BYTES * sum(
        n.weights for n in graph.layers
    )
    return Problem(choices, fixed, 0, foldable_inputs(graph)).plan_bytes(plan)


@pytest.mark.parametrize("scheme", BRANCHES)
def test_body_and_branch_compute_what_their_weights_say_in_the_planned_bytes(
    model: Path, tmp_path: Path, scheme: str
) -> None:
    graph = layer_graph(ir.load(model))
    plan = plan_for(graph, scheme)
    assert sum("+" in s for s in plan.values()) >= 5
    written = write(model, graph, plan, tmp_path / "out")
    assert written == planned_bytes(model, graph, plan)
    onnx.checker.check_model(str(tmp_path / "out" / SIMULATED), full_check=True)

    found, expected = run(tmp_path / "out" / SIMULATED), run(reference(model, graph, plan))
    assert found.shape == expected.shape
    # A value on a rounding boundary may fall to either side.
    assert np.sum((found - expected) ** 2) <= 1e-4 * np.sum(expected**2)
    if scheme.startswith("w4a16"):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.rtx
@pytest.mark.parametrize("scheme", BRANCHES)
def test_every_branch_builds_into_a_verified_engine(
    model: Path, tmp_path: Path, scheme: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = layer_graph(ir.load(model))
    plan = plan_for(graph, scheme)
    written = write(model, graph, plan, tmp_path / "out")
    expected = ExpectedLayers.of(graph.layers, {n: SCHEMES[s] for n, s in plan.items()}, written)
    # Each branch's products are layers of their own to the verification.
    assert len(expected.layers) > len(graph.layers) or "+scale" in scheme
    record = build_engine(
        BuildRequest(
            tmp_path / "out" / DEPLOYED,
            load_target("rtx").build_target,
            BatchProfile(1, 2, 4, {"sample": (4, 8, 8)}),
        ),
        tmp_path / "engine",
        expected,
        Talk(),
    )
    record.require_verified()


def test_a_shared_bias_or_weight_keeps_a_layer_whole(tmp_path: Path) -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 64, 8, 8])
    bias = g.random("shared.bias", 64)
    for name in ("first", "second"):
        g.nodes.append(
            onnx.helper.make_node(
                "Conv",
                ["sample", g.random(f"{name}.weight", 64, 64, 1, 1), bias],
                [name],
                name=name,
            )
        )
    tied = g.random("tied.weight", 64, 64, 1, 1)
    for name, x in (("tied_a", "first"), ("tied_b", "second")):
        g.nodes.append(onnx.helper.make_node("Conv", [x, tied], [name], name=name))
    g.op("Add", ["tied_a", "tied_b"], "sum")
    graph = layer_graph(ir.load(g.save(tmp_path / "model.onnx")))
    reasons = bias_refusals(graph.model, graph.layers)
    assert "bias is shared" in reasons["first"] and "bias is shared" in reasons["second"]
    assert "share its weight" in reasons["tied"]


def attention(group_norm: bool) -> GraphBuilder:
    """Three products that share a normalised input, as attention has it, and the sum of what they give."""
    g = GraphBuilder()
    g.input("sample", ["N", 4, 8, 8])
    x = g.op(
        "Reshape", [g.conv("sample", "conv_in", 64, 4), g.weight("flat", [0, 64, 64])], "flattened"
    )
    if group_norm:
        groups = g.op("Reshape", [x, g.weight("groups", [0, 8, 512])], "grouped")
        ones, zeros = (
            g.weight("ones", np.ones(8, np.float32)),
            g.weight("zeros", np.zeros(8, np.float32)),
        )
        x = g.op(
            "Reshape",
            [g.op("InstanceNormalization", [groups, ones, zeros], "norm"), "flat"],
            "ungrouped",
        )
        x = g.op("Mul", [x, g.random("gain", 64, 1)], "scaled")
        x = g.op(
            "Transpose",
            [g.op("Add", [x, g.random("shift", 64, 1)], "shifted")],
            "tokens",
            perm=[0, 2, 1],
        )
    else:
        x = g.op("Transpose", [x], "tokens", perm=[0, 2, 1])
        x = g.op("LayerNormalization", [x, g.random("gain", 64), g.random("shift", 64)], "norm")
    outputs = [g.matmul(x, name, 64, 64) for name in ("q", "k", "v")]
    g.op("Sum", outputs, "sum")
    g.output("sum_out", ["N", 64, 64])
    return g


@pytest.mark.parametrize("group_norm", [True, False])
@pytest.mark.parametrize("readers", [("q", "k", "v"), ("q", "v")])
def test_a_norm_takes_the_factors_where_all_its_readers_want_them(
    tmp_path: Path, group_norm: bool, readers: tuple[str, ...]
) -> None:
    model = attention(group_norm).save(tmp_path / "model.onnx")
    graph = layer_graph(ir.load(model))
    assert len(foldable_inputs(graph)) == 1
    plan = {n.name: "w8a8+scale5" if n.name in readers else "fp16" for n in graph.layers}
    assert sum("scale" in s for s in plan.values()) == len(readers)
    written = write(model, graph, plan, tmp_path / "out")
    assert written == planned_bytes(model, graph, plan)
    names = [
        node.name
        for node in onnx.load(tmp_path / "out" / SIMULATED, load_external_data=False).graph.node
    ]
    assert any("prescale" in name for name in names) == (len(readers) < 3)
    found, expected = run(tmp_path / "out" / SIMULATED), run(reference(model, graph, plan))
    # The folded gain is rounded to FP16 once more than a factor beside it is, so a few values change their code.
    assert np.sum((found - expected) ** 2) <= 3e-4 * np.sum(expected**2)


def test_what_else_reads_a_norm_keeps_its_gain(tmp_path: Path) -> None:
    g = attention(False)
    tokens = next(node.output[0] for node in g.nodes if node.op_type == "LayerNormalization")
    g.op("Relu", [tokens], "other")
    assert not foldable_inputs(layer_graph(ir.load(g.save(tmp_path / "other.onnx"))))
    g = attention(True)
    g.op("Relu", ["shifted_out"], "other")
    assert not foldable_inputs(layer_graph(ir.load(g.save(tmp_path / "between.onnx"))))
