"""Tiny ONNX graphs, built node by node: what the peers crash on, and what the rooms are tested with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class GraphBuilder:
    """Collects nodes and weights; ``save`` writes a checked model. Values are named like their nodes."""

    opset: int = 21
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def input(self, name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: list[int | str] | None = None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def weight(self, name: str, value: Array | list[int]) -> str:
        if name not in {w.name for w in self.weights}:
            array = np.asarray(value)
            self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def random(self, name: str, *shape: int, scale: float | None = None) -> str:
        fan_in = int(np.prod(shape[1:])) or 1
        spread = fan_in**-0.5 if scale is None else scale
        return self.weight(name, (self.rng.standard_normal(shape) * spread).astype(np.float32))

    def op(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def conv(
        self,
        x: str,
        name: str,
        out: int,
        into: int,
        kernel: int = 3,
        group: int = 1,
        **attributes: Any,
    ) -> str:
        """A Conv with bias that keeps the spatial size unless told otherwise."""
        attributes.setdefault("pads", [kernel // 2] * 4)
        w = self.random(f"{name}.weight", out, into // group, kernel, kernel)
        b = self.random(f"{name}.bias", out, scale=0.1)
        return self.op(
            "Conv", [x, w, b], name, group=group, kernel_shape=[kernel, kernel], **attributes
        )

    def gemm(self, x: str, name: str, out: int, into: int, trans_b: int = 1) -> str:
        shape = (out, into) if trans_b else (into, out)
        w = self.random(f"{name}.weight", *shape, scale=into**-0.5)
        return self.op(
            "Gemm", [x, w, self.random(f"{name}.bias", out, scale=0.1)], name, transB=trans_b
        )

    def matmul(self, x: str, name: str, out: int, into: int) -> str:
        return self.op(
            "MatMul", [x, self.random(f"{name}.weight", into, out, scale=into**-0.5)], name
        )

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, self.weights)
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10
        )
        onnx.checker.check_model(made)
        return onnx.shape_inference.infer_shapes(made)

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(self.model(), path)
        return path


def denoiser_graph(
    channels: int = 32, size: int = 8, seed: int = 0, image_channels: int = 3
) -> GraphBuilder:
    """A small denoiser: sinusoidal timestep, two widths of time projections, convs of many kinds, attention.

    Inputs ``sample`` [N, image_channels, size, size] and ``timestep`` [N]; output ``out_sample``.
    """
    g = GraphBuilder(seed=seed)
    c = channels
    g.input("sample", ["N", image_channels, size, size])
    g.input("timestep", ["N"])
    column = g.op(
        "Unsqueeze", ["timestep", g.weight("axes1", np.array([1], np.int64))], "time/unsqueeze"
    )
    frequencies = np.exp(-np.log(10000) * np.arange(c // 2) / (c // 2)).astype(np.float32)[None]
    angle = g.op("Mul", [column, g.weight("time.frequencies", frequencies)], "time/angle")
    both = [g.op("Sin", [angle], "time/sin"), g.op("Cos", [angle], "time/cos")]
    embedding = g.op("Concat", both, "time/concat", axis=1)
    hidden = g.gemm(embedding, "time.linear_1", 4 * c, c)
    hidden = g.op("Mul", [hidden, g.op("Sigmoid", [hidden], "time/sigmoid")], "time/silu")
    # One embedding feeds Gemms of different widths: this crashes NVIDIA Model Optimizer's AWQ.
    shifts = [g.gemm(hidden, f"time.proj_{i}", width, 4 * c) for i, width in enumerate((c, 2 * c))]
    axes23 = g.weight("axes23", np.array([2, 3], np.int64))
    x = g.conv("sample", "conv_in", c, image_channels)
    x = g.op("Add", [x, g.op("Unsqueeze", [shifts[0], axes23], "shift_0")], "add_0")
    skip = g.conv(g.op("Relu", [x], "relu_0"), "down.conv1", c, c)
    x = g.conv(skip, "down.downsample", 2 * c, c, strides=[2, 2])
    x = g.op("Add", [x, g.op("Unsqueeze", [shifts[1], axes23], "shift_1")], "add_1")
    x = g.conv(g.op("Relu", [x], "relu_1"), "mid.conv1", 2 * c, 2 * c)
    x = _attention(g, x, 2 * c)
    x = g.conv(x, "mid.grouped", 2 * c, 2 * c, group=2)
    x = g.op(
        "Resize",
        [x, "", g.weight("scales", np.array([1, 1, 2, 2], np.float32))],
        "up/resize",
        mode="nearest",
    )
    x = g.conv(x, "up.conv1", c, 2 * c, kernel=1)
    x = g.op("Concat", [x, skip], "up/concat", axis=1)
    x = g.conv(x, "up.conv2", c, 2 * c)
    g.conv(g.op("Relu", [x], "relu_2"), "conv_out", image_channels, c)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", image_channels, size, size])
    return g


def _attention(g: GraphBuilder, x: str, width: int) -> str:
    """Self-attention over pixels: q, k, v share one input; the two products stay activations."""
    flat = g.op(
        "Reshape", [x, g.weight("flat_shape", np.array([0, width, -1], np.int64))], "attn/flat"
    )
    tokens = g.op("Transpose", [flat], "attn/tokens", perm=[0, 2, 1])
    q, k, v = (g.matmul(tokens, f"attn.to_{n}", width, width) for n in "qkv")
    scores = g.op("MatMul", [q, g.op("Transpose", [k], "attn/k_t", perm=[0, 2, 1])], "attn/scores")
    scores = g.op(
        "Mul", [scores, g.weight("attn.scale", np.asarray(width**-0.5, np.float32))], "attn/scaled"
    )
    mixed = g.op("MatMul", [g.op("Softmax", [scores], "attn/softmax", axis=-1), v], "attn/mixed")
    out = g.matmul(mixed, "attn.to_out", width, width)
    back = g.op("Transpose", [out], "attn/back", perm=[0, 2, 1])
    shaped = g.op("Reshape", [back, g.op("Shape", [x], "attn/shape")], "attn/shaped")
    return g.op("Add", [shaped, x], "attn/add")


def awkward_graph(seed: int = 0, opset: int = 21) -> GraphBuilder:
    """A denoiser of 3x7x9 samples made of what breaks quantizers; the timestep is one number for the whole batch.

    Inputs ``sample`` [N, 3, 7, 9] and ``timestep`` []; output ``out_sample``.
    """
    g = GraphBuilder(opset=opset, seed=seed)
    g.input("sample", ["N", 3, 7, 9])
    g.input("timestep", [])
    hidden = _awkward_time(g)
    axes23 = g.weight("axes23", np.array([2, 3], np.int64))
    # One tensor feeds Gemms of different widths, stored both ways round.
    shift16 = g.op("Unsqueeze", [g.gemm(hidden, "time.proj_16", 16, 67), axes23], "shift_16")
    shift24 = g.op(
        "Unsqueeze", [g.gemm(hidden, "time.proj_24", 24, 67, trans_b=0), axes23], "shift_24"
    )
    x = g.op("Conv", ["sample", g.random("conv_in.weight", 16, 3, 3, 3)], "conv_in", pads=[1] * 4)
    x = g.op("Relu", [g.op("Add", [x, shift16], "add_16")], "relu_in")
    first = x
    x = g.conv(x, "depthwise", 16, 16, group=16)
    x = g.op(
        "Relu", [g.op("Add", [g.conv(x, "grouped", 24, 16, group=4), shift24], "add_24")], "relu_24"
    )
    # One output channel of zeros, as pruning leaves it, in a 1x1 Conv.
    pointwise = g.rng.standard_normal((16, 24, 1, 1)).astype(np.float32) / 24**0.5
    pointwise[5] = 0
    g.weight("pointwise.weight", pointwise)
    x = g.conv(x, "pointwise", 16, 24, kernel=1)
    # A layer of zeros, as diffusion models initialise the last one of a block.
    g.weight("zero.weight", np.zeros((16, 16, 3, 3), np.float32))
    x = g.op("Add", [g.op("Add", [g.conv(x, "zero", 16, 16), x], "add_zero"), first], "add_first")
    down = g.conv(x, "down", 16, 16, strides=[2, 2])
    # One weight, two Convs.
    down = g.op(
        "Relu",
        [g.conv(g.op("Relu", [g.conv(down, "tied", 16, 16)], "relu_a"), "tied", 16, 16)],
        "relu_b",
    )
    g.nodes[-2].name = "tied_again"
    g.nodes[-2].output[0] = "tied_again_out"
    g.nodes[-1].input[0] = "tied_again_out"
    up = g.random("up.weight", 16, 16, 3, 3, scale=0.1)
    x = g.op(
        "Add", [g.op("ConvTranspose", [down, up], "up", strides=[2, 2], pads=[1] * 4), x], "add_up"
    )
    x = _awkward_tokens(g, g.conv(x, "to_20", 20, 16, kernel=1))
    g.conv(g.op("Relu", [x], "relu_out"), "conv_out", 3, 20)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 3, 7, 9])
    return g


def _awkward_time(g: GraphBuilder) -> str:
    """An embedding [1, 67] of the scalar timestep: a Gemm whose reduction of 20 is below every block."""
    column = g.op(
        "Unsqueeze", ["timestep", g.weight("axes01", np.array([0, 1], np.int64))], "time/unsqueeze"
    )
    frequencies = np.exp(-np.log(10000) * np.arange(10) / 10).astype(np.float32)[None]
    angle = g.op("Mul", [column, g.weight("time.frequencies", frequencies)], "time/angle")
    both = [g.op("Sin", [angle], "time/sin"), g.op("Cos", [angle], "time/cos")]
    hidden = g.gemm(g.op("Concat", both, "time/concat", axis=1), "time.linear_1", 67, 20)
    return g.op("Mul", [hidden, g.op("Sigmoid", [hidden], "time/sigmoid")], "time/silu")


def _awkward_tokens(g: GraphBuilder, x: str) -> str:
    """Products with reductions of 20, 100 and 67, and one weight [20, 20] that two products share."""
    flat = g.op(
        "Reshape", [x, g.weight("flat_shape", np.array([0, 20, 63], np.int64))], "tokens/flat"
    )
    tokens = g.op("Transpose", [flat], "tokens/in", perm=[0, 2, 1])
    wide = g.op("Relu", [g.matmul(tokens, "mlp.up", 100, 20)], "mlp/relu")
    narrow = g.matmul(g.matmul(wide, "mlp.middle", 67, 100), "mlp.down", 20, 67)
    shared = g.random("shared.weight", 20, 20)
    pair = [
        g.op("MatMul", [narrow, shared], "shared_a"),
        g.op("MatMul", [tokens, shared], "shared_b"),
    ]
    back = g.op("Transpose", [g.op("Add", pair, "tokens/add")], "tokens/out", perm=[0, 2, 1])
    shape = g.weight("image_shape", np.array([0, 20, 7, 9], np.int64))
    return g.op("Add", [g.op("Reshape", [back, shape], "tokens/image"), x], "tokens/skip")


def loud_graph(size: int = 8) -> GraphBuilder:
    """A denoiser whose values grow a hundredfold per convolution, as models trained in bfloat16 do, until a norm.

    Inputs ``sample`` [N, 3, size, size] and ``timestep`` [N]; output ``out_sample``. A product over
    pixels lies among the loud layers too.
    """
    g, c = GraphBuilder(seed=4), 32
    g.input("sample", ["N", 3, size, size])
    g.input("timestep", ["N"])
    column = g.op("Unsqueeze", ["timestep", g.weight("axes1", np.array([1], np.int64))], "column")
    late = g.op("Mul", [column, g.weight("slow", np.float32([[0.01]]))], "late")
    shift = g.gemm(late, "time.linear", c, 1)
    x = g.conv("sample", "conv_in", c, 3)
    axes23 = g.weight("axes23", np.array([2, 3], np.int64))
    x = g.op("Add", [x, g.op("Unsqueeze", [shift, axes23], "shift")], "shifted")
    for number in range(3):
        x = g.conv(g.op("Relu", [x], f"relu_{number}"), f"loud.{number}", c, c)
        x = g.op("Mul", [x, g.weight(f"gain.{number}", np.float32(100.0))], f"gained_{number}")
    flat = g.op("Reshape", [x, g.weight("flat_shape", np.array([0, c, -1], np.int64))], "flat")
    tokens = g.op("Transpose", [flat], "tokens", perm=[0, 2, 1])
    mixed = g.op("Transpose", [g.matmul(tokens, "loud.mix", c, c)], "mixed", perm=[0, 2, 1])
    x = g.op("Reshape", [mixed, g.op("Shape", [x], "shape")], "back")
    ones = g.weight("norm.weight", np.ones(c, np.float32))
    zeros = g.weight("norm.bias", np.zeros(c, np.float32))
    x = g.op("InstanceNormalization", [x, ones, zeros], "norm")
    g.conv(g.op("Relu", [x], "relu_out"), "conv_out", 3, c)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 3, size, size])
    return g
