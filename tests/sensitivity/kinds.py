"""The graphs that several sensitivity tests measure."""

from __future__ import annotations

from tests.graphs import GraphBuilder


def kinds() -> GraphBuilder:
    """Convs (plain, strided, grouped, depthwise, 1x1), Gemms both ways, MatMul on tokens, a shared weight and input."""
    g = GraphBuilder(seed=3)
    g.input("sample", ["N", 4, 7, 6])
    g.input("timestep", ["N"])
    axes = g.weight("axes", [1])
    time = g.op("Unsqueeze", ["timestep", axes], "time")
    time = g.op(
        "Sin", [g.op("Mul", [time, g.random("frequency", 1, 8, scale=0.01)], "angle")], "sin"
    )
    a, b = g.gemm(time, "time.a", 8, 8, trans_b=1), g.gemm(time, "time.b", 8, 8, trans_b=0)
    shift = g.op("Unsqueeze", [g.op("Mul", [a, b], "ab"), g.weight("axes23", [2, 3])], "shift")
    x = g.op("Add", [g.conv("sample", "conv_in", 8, 4), shift], "add")
    x = g.op("Tanh", [g.conv(x, "grouped", 16, 8, group=2)], "tanh")
    x = g.conv(x, "depthwise", 16, 16, group=16)
    x = g.conv(x, "strided", 8, 16, strides=[2, 1], pads=[0, 1, 2, 1])
    tokens = g.op("Reshape", [x, g.weight("shape", [0, 8, -1])], "tokens")
    tokens = g.op("Transpose", [tokens], "tokens_last", perm=[0, 2, 1])
    q, k = g.matmul(tokens, "to_q", 8, 8), g.matmul(tokens, "to_k", 8, 8)
    again = g.op("MatMul", [g.op("Tanh", [q], "tanh_q"), "to_k.weight"], "again")
    x = g.op("Add", [k, again], "k_again")
    x = g.op("Transpose", [x], "back", perm=[0, 2, 1])
    x = g.op("Reshape", [x, g.weight("shape4", [0, 8, -1, 6])], "image")
    g.conv(x, "conv_out", 2, 8, kernel=1)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 2, 4, 6])
    return g


def linear() -> GraphBuilder:
    """Two Gemms in a row and nothing else: the output is linear in every local error."""
    g = GraphBuilder(seed=1)
    g.input("sample", ["N", 12])
    g.input("timestep", ["N"])
    hidden = g.gemm("sample", "first", 40, 12)
    g.gemm(hidden, "second", 6, 40, trans_b=0)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 6])
    return g
