"""The roofline: monotone in what it is made of, and by hand where that is easy."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import Layer, LayerUse
from mpq_deploy.latency.others import node_seconds
from mpq_deploy.latency.roofline import (
    LAUNCH_SECONDS,
    Rates,
    Traffic,
    bytes_moved,
    layer_seconds,
    quantizer_seconds,
)

RATES = Rates("a device", 100e9, 10e12, 20e12, fp8=20e12, fp4=40e12)
DEPLOYABLE = tuple(s for s in SCHEMES.values() if not s.simulated)


def conv(channels: int = 64, kernel: int = 3) -> Layer:
    use = LayerUse("node", "x", "y")
    return Layer("conv", "Conv", "w", (channels, channels, kernel, kernel), 0, 1, (use,))


def matmul(k: int = 512, n: int = 512) -> Layer:
    return Layer("mm", "MatMul", "w", (k, n), 1, 1, (LayerUse("node", "x", "y"),))


def fitting(layer: Layer) -> tuple[str, ...]:
    return tuple(s.name for s in DEPLOYABLE if s.body.weight.block(layer))


@pytest.mark.parametrize("layer", [conv(), matmul()], ids=["conv", "matmul"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_more_bandwidth_or_a_faster_unit_never_takes_longer_and_more_values_never_less(
    layer: Layer, data: st.DataObject
) -> None:
    scheme = SCHEMES[data.draw(st.sampled_from(fitting(layer)))]
    positions, factor = data.draw(st.integers(1, 4096)), data.draw(st.floats(1.01, 50))
    inputs = layer.weight_shape[1 - layer.out_axis] * positions
    traffic = Traffic(inputs, layer.out_channels * positions)
    plain = layer_seconds(layer, scheme, traffic, RATES)
    for field in ("bandwidth", "fp16", "int8", "fp8", "fp4"):
        faster = replace(RATES, **{field: getattr(RATES, field) * factor})
        assert layer_seconds(layer, scheme, traffic, faster) <= plain * (1 + 1e-12)
    more = Traffic(2 * traffic.inputs, 2 * traffic.outputs)
    assert layer_seconds(layer, scheme, more, RATES) > plain
    assert quantizer_seconds(2 * inputs, scheme, RATES) >= quantizer_seconds(inputs, scheme, RATES)


def test_a_product_that_moves_more_than_it_computes_takes_as_long_as_its_bytes() -> None:
    # 512 x 512 by one row: 524,288 bytes of weights and 2 x 1,024 of activations at 100 GB/s.
    seconds = layer_seconds(matmul(), SCHEMES["fp16"], Traffic(512, 512), RATES)
    assert seconds == pytest.approx((524_288 + 2_048) / 100e9 + LAUNCH_SECONDS)


def test_a_product_that_computes_more_than_it_moves_takes_as_long_as_its_operations() -> None:
    layer, positions = conv(256), 4 * 1024
    traffic = Traffic(256 * positions, 256 * positions)
    operations = 2 * positions * 256 * 256 * 9
    assert layer_seconds(layer, SCHEMES["fp16"], traffic, RATES) == pytest.approx(
        operations / 10e12 + LAUNCH_SECONDS
    )
    assert layer_seconds(layer, SCHEMES["w8a8"], traffic, RATES) == pytest.approx(
        operations / 20e12 + LAUNCH_SECONDS
    )


def test_int4_of_a_convolution_saves_memory_and_moves_more_bytes_than_fp16() -> None:
    layer, traffic = conv(), Traffic(64, 64)
    # Per weight: half a byte and a sixty-fourth of a scale read, 2 written, 2 read; FP16 reads 2.
    assert SCHEMES["w4a16-b64"].unpacked_bytes(layer) == 2 * layer.weights
    assert SCHEMES["w4a8-b64"].unpacked_bytes(layer) == layer.weights
    assert bytes_moved(layer, SCHEMES["w4a16-b64"], traffic) > 2.2 * bytes_moved(
        layer, SCHEMES["fp16"], traffic
    )
    assert bytes_moved(layer, SCHEMES["w8a8"], traffic) < 0.6 * bytes_moved(
        layer, SCHEMES["fp16"], traffic
    )


def test_int4_of_a_product_is_unpacked_in_its_kernel() -> None:
    assert (
        SCHEMES["w4a16-b64"].unpacked_bytes(matmul())
        == SCHEMES["w8a16"].unpacked_bytes(matmul())
        == 0
    )
    small = Traffic(512, 512)
    int4, fp16 = (layer_seconds(matmul(), SCHEMES[s], small, RATES) for s in ("w4a16-b64", "fp16"))
    assert int4 < fp16


@pytest.mark.parametrize("branch", ["rows1", "lowrank8"])
@pytest.mark.parametrize("layer", [conv(), matmul()], ids=["conv", "matmul"])
def test_a_branch_costs_at_least_its_kernels(layer: Layer, branch: str) -> None:
    traffic = Traffic(layer.weight_shape[1 - layer.out_axis] * 16, layer.out_channels * 16)
    body, whole = (
        layer_seconds(layer, SCHEMES[s], traffic, RATES)
        for s in ("w4a16-b128", f"w4a16-b128+{branch}")
    )
    assert whole > body + 1.9 * LAUNCH_SECONDS


def test_a_small_layer_is_slower_in_int8_once_its_input_must_be_quantized() -> None:
    layer, traffic = conv(16, 1), Traffic(16 * 64, 16 * 64)
    int8 = layer_seconds(layer, SCHEMES["w8a8"], traffic, RATES) + quantizer_seconds(
        16 * 64, SCHEMES["w8a8"], RATES
    )
    assert int8 > layer_seconds(layer, SCHEMES["fp16"], traffic, RATES)


def test_a_simulated_scheme_has_no_latency() -> None:
    with pytest.raises(ValueError, match="simulated"):
        layer_seconds(conv(), SCHEMES["w4a4-sim"], Traffic(64, 64), RATES)


def test_rates_say_which_figures_are_unconfirmed_and_need_all_three() -> None:
    rates = Rates.of(load_target("jetson-agx-orin"))
    assert rates is not None
    assert (rates.bandwidth, rates.int8) == (204.8e9, 85.0e12)
    assert rates.unconfirmed == ("bandwidth", "FP16 rate")
    assert Rates.of(load_target("tensorrt-10")) is None


def test_attention_in_fp8_reads_operands_in_one_byte_at_twice_the_rate() -> None:
    shapes = {"q": (2, 64, 32), "k": (2, 32, 64), "scores": (2, 64, 64), "out": (2, 64, 32)}
    values = {
        n: ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT)) for n in ("q", "k", "scores")
    }
    first = ir.node("MatMul", [values["q"], values["k"]], num_outputs=1)
    first.outputs[0].name = "scores"
    second = ir.node("MatMul", [values["scores"], values["q"]], num_outputs=1)
    second.outputs[0].name = "out"
    slow = Rates("a device", 100.0, 1e30, 1e30, fp8=1e30)
    # The scores are never written: queries and keys are read, or values read and the output written.
    size = 2 * 64 * 32
    for node, half in ((first, 4 * size), (second, 4 * size)):
        assert node_seconds(node, shapes, slow) == pytest.approx(half / 100 + LAUNCH_SECONDS)
    assert node_seconds(first, shapes, slow, True) == pytest.approx(2 * size / 100 + LAUNCH_SECONDS)
    assert node_seconds(second, shapes, slow, True) == pytest.approx(
        3 * size / 100 + LAUNCH_SECONDS
    )
    fast = replace(RATES, bandwidth=1e30)
    operations = 2 * 2 * 64 * 64 * 32
    expected = operations / 20e12 + LAUNCH_SECONDS
    assert node_seconds(first, shapes, fast, True) == pytest.approx(expected)
