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

    def conv(self, x: str, name: str, out: int, into: int, kernel: int = 3, group: int = 1, **attributes: Any) -> str:
        """A Conv with bias that keeps the spatial size unless told otherwise."""
        attributes.setdefault("pads", [kernel // 2] * 4)
        w = self.random(f"{name}.weight", out, into // group, kernel, kernel)
        b = self.random(f"{name}.bias", out, scale=0.1)
        return self.op("Conv", [x, w, b], name, group=group, kernel_shape=[kernel, kernel], **attributes)

    def gemm(self, x: str, name: str, out: int, into: int, trans_b: int = 1) -> str:
        shape = (out, into) if trans_b else (into, out)
        w = self.random(f"{name}.weight", *shape, scale=into**-0.5)
        return self.op("Gemm", [x, w, self.random(f"{name}.bias", out, scale=0.1)], name, transB=trans_b)

    def matmul(self, x: str, name: str, out: int, into: int) -> str:
        return self.op("MatMul", [x, self.random(f"{name}.weight", into, out, scale=into**-0.5)], name)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.checker.check_model(made)
        return onnx.shape_inference.infer_shapes(made)

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(self.model(), path)
        return path


def denoiser_graph(channels: int = 32, size: int = 8, seed: int = 0, image_channels: int = 3) -> GraphBuilder:
    """A small denoiser: sinusoidal timestep, two widths of time projections, convs of many kinds, attention.

    Inputs ``sample`` [N, image_channels, size, size] and ``timestep`` [N]; output ``out_sample``.
    """
    g = GraphBuilder(seed=seed)
    c = channels
    g.input("sample", ["N", image_channels, size, size])
    g.input("timestep", ["N"])
    column = g.op("Unsqueeze", ["timestep", g.weight("axes1", np.array([1], np.int64))], "time/unsqueeze")
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
    x = g.op("Resize", [x, "", g.weight("scales", np.array([1, 1, 2, 2], np.float32))], "up/resize", mode="nearest")
    x = g.conv(x, "up.conv1", c, 2 * c, kernel=1)
    x = g.op("Concat", [x, skip], "up/concat", axis=1)
    x = g.conv(x, "up.conv2", c, 2 * c)
    g.conv(g.op("Relu", [x], "relu_2"), "conv_out", image_channels, c)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", image_channels, size, size])
    return g


def _attention(g: GraphBuilder, x: str, width: int) -> str:
    """Self-attention over pixels: q, k, v share one input; the two products stay activations."""
    flat = g.op("Reshape", [x, g.weight("flat_shape", np.array([0, width, -1], np.int64))], "attn/flat")
    tokens = g.op("Transpose", [flat], "attn/tokens", perm=[0, 2, 1])
    q, k, v = (g.matmul(tokens, f"attn.to_{n}", width, width) for n in "qkv")
    scores = g.op("MatMul", [q, g.op("Transpose", [k], "attn/k_t", perm=[0, 2, 1])], "attn/scores")
    scores = g.op("Mul", [scores, g.weight("attn.scale", np.asarray(width**-0.5, np.float32))], "attn/scaled")
    mixed = g.op("MatMul", [g.op("Softmax", [scores], "attn/softmax", axis=-1), v], "attn/mixed")
    out = g.matmul(mixed, "attn.to_out", width, width)
    back = g.op("Transpose", [out], "attn/back", perm=[0, 2, 1])
    shaped = g.op("Reshape", [back, g.op("Shape", [x], "attn/shape")], "attn/shaped")
    return g.op("Add", [shaped, x], "attn/add")
