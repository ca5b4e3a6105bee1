"""Which convolutions become products: always where there is no other form, else what takes less time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from mpq_deploy.engine.expected import ExpectedLayer
from mpq_deploy.engine.target import Target, load_target
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.latency.conv_products import Shapes, with_products
from mpq_deploy.latency.roofline import Rates, Traffic, bytes_moved, layer_seconds
from tests.graphs import GraphBuilder

W4 = SCHEMES["w4a16-b128"]


def conv_graph(size: int, channels: int = 640, **attributes: object) -> tuple[LayerGraph, Shapes]:
    """One 3x3 convolution on ``size`` x ``size``, and the shapes of its tensors at batch 2."""
    graph = GraphBuilder()
    weight = graph.weight("w", np.zeros((channels, channels, 3, 3), np.float32))
    x = graph.input("x", ["n", channels, size, size])
    y = graph.op("Conv", [x, weight], "conv", pads=[1] * 4, **attributes)
    graph.output(y, ["n", channels, size, size])
    found = layer_graph(ir.from_proto(graph.model()))
    (use,) = found.layers[0].uses
    shape = (2, channels, size, size)
    return found, {use.input: shape, use.output: shape}


def decided(target: Target, size: int, channels: int = 640) -> LayerGraph:
    graph, shapes = conv_graph(size, channels)
    return with_products(graph, target, shapes, shapes)


@pytest.mark.parametrize("name", ["tensorrt-10", "tensorrt-11", "jetson-orin-nano", "jetson-thor"])
@pytest.mark.parametrize("size", [8, 64])
def test_where_int4_convolutions_are_not_documented_all_become_products(
    name: str, size: int
) -> None:
    target = load_target(name)
    (layer,) = decided(target, size).layers
    assert layer.window is not None and layer.window.pads == (1, 1, 1, 1)
    assert target.refusal(layer, W4) == ""
    assert W4.multiplies(layer) and not SCHEMES["w8a8"].multiplies(layer)
    assert not SCHEMES["w4a8-b128"].multiplies(layer) and not SCHEMES["fp16"].multiplies(layer)


def test_rtx_takes_the_product_at_low_resolution_and_unpacks_at_high_ones() -> None:
    target, rates = load_target("rtx"), Rates.of(load_target("rtx"))
    assert rates is not None
    (low,), (high,) = decided(target, 8).layers, decided(target, 128).layers
    assert low.window is not None
    assert high.window is None and "estimated as faster" in high.no_product
    # Either way it is what takes less time.
    for size in (4, 8, 16, 32, 64, 128):
        graph, shapes = conv_graph(size)
        plain = graph.layers[0]
        (chosen,) = with_products(graph, target, shapes, shapes).layers
        traffic = Traffic(*(2 * 640 * size * size for _ in range(2)))
        product = replace(plain, window=low.window)
        times = {one: layer_seconds(one, W4, traffic, rates) for one in (plain, product)}
        stripped = replace(chosen, no_product="")
        assert times[stripped] == min(times.values())


def test_windows_count_as_traffic() -> None:
    target = load_target("jetson-orin-nano")
    (layer,) = decided(target, 16).layers
    traffic = Traffic(640 * 256, 640 * 256)
    columns = 256 * layer.reduction
    moved = bytes_moved(layer, W4, traffic) - W4.weight_bytes(layer)
    # Read, written as windows, read by the product; its output written, read, written again.
    assert moved == 2 * (traffic.inputs + 2 * columns + 3 * traffic.outputs)
    rates = Rates.of(target)
    assert rates is not None
    assert layer_seconds(layer, W4, traffic, rates) > moved / rates.bandwidth / 2


def test_targets_without_products_say_what_they_said_before() -> None:
    graph, shapes = conv_graph(16)
    for name in ("onnxruntime-cpu", "simulate"):
        assert with_products(graph, load_target(name), shapes, shapes) is graph
    jetson = load_target("jetson-orin-nano")
    without = jetson.model_copy(update={"conv_products": False})
    assert with_products(graph, without, shapes, shapes) is graph
    (product,) = with_products(graph, jetson, shapes, shapes).layers
    assert "no INT4 convolution" in without.refusal(product, W4)


def test_windows_that_do_not_fit_are_no_candidate() -> None:
    small = load_target("jetson-orin-nano").model_copy(deep=True)
    assert small.memory_bytes is not None
    figure = small.memory_bytes.model_copy(update={"value": 6e8})
    small = small.model_copy(update={"memory_bytes": figure})
    (layer,) = decided(small, 128).layers
    assert layer.window is None and "has 0.60 GB" in layer.no_product
    assert "its windows take" in small.refusal(layer, W4)


def test_groups_are_refused_with_the_reason() -> None:
    target = load_target("jetson-agx-orin")
    graph, shapes = conv_graph(16)
    grouped = replace(graph.layers[0], group=2)
    (layer,) = with_products(replace(graph, layers=(grouped,)), target, shapes, shapes).layers
    assert layer.window is None
    assert "as a matrix product: it has 2 groups" in target.refusal(layer, W4)


def test_low_rank_branches_stand_beside_convolutions_alone() -> None:
    graph, shapes = conv_graph(8)
    scheme = SCHEMES["w4a16-b128+lowrank8"]
    (product,) = with_products(graph, load_target("rtx"), shapes, shapes).layers
    assert "beside a convolution written as a product" in scheme.refusal(product)
    assert scheme.refusal(graph.layers[0]) == ""


def test_a_product_has_two_blocks_at_least_and_is_expected_as_one() -> None:
    (layer,) = decided(load_target("jetson-thor"), 8, channels=8).layers
    for block in (32, 64, 128, 256):
        scheme = SCHEMES[f"w4a16-b{block}"]
        expected = ExpectedLayer.of(layer, scheme)
        assert expected.blocks >= 2 and expected.op == "MatMul" and expected.kernel == ()
        assert scheme.weight.fuses(expected)
        assert scheme.stored_shape(layer) == (72, 8)
        assert scheme.unpacked_bytes(layer) == 0
    assert ExpectedLayer.of(layer, SCHEMES["w8a8"]).op == "Conv"
