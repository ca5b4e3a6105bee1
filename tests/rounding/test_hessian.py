"""Hessians against patches taken one by one in NumPy."""

from __future__ import annotations

from contextlib import closing
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.layers import Layer
from mpq_deploy.recipe import QuantizeSettings
from mpq_deploy.rounding import hessian as hessian_module
from mpq_deploy.rounding.hessian import (
    HessianPlan,
    block_widths,
    iterate_hessians,
    matrices_cap,
    matrix_bytes,
)
from mpq_deploy.system.compute import Compute, compute_on
from mpq_deploy.system.progress import Talk
from tests.calibrate.conftest import Case, case, denoiser_case, end, with_timestep
from tests.graphs import GraphBuilder


def bounds(**changed) -> QuantizeSettings:
    """Settings below what a recipe may ask for: rows and megabytes for tiny graphs."""
    return QuantizeSettings.model_construct(**{"hessian_rows": 10**9, "memory_mb": 1024, **changed})


ALL_ROWS = bounds()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "BATCH_SIZE", 2)


def calls_of(given: Case) -> RecordedCalls:
    return RecordedCalls(given.recorded, given.spec)


def hessians(given: Case, settings: QuantizeSettings = ALL_ROWS) -> dict:
    found = iterate_hessians(given.graph, calls_of(given), settings, Talk())
    return {h.layer.name: h for h in found}


def im2col(x: np.ndarray, node, kernel: tuple[int, ...], group: int) -> np.ndarray:
    """[1, C, H, W] -> [group, positions, C / group * kh * kw], by loops."""
    attributes = {a.name: a for a in node.attribute}
    strides = list(attributes["strides"].ints) if "strides" in attributes else [1, 1]
    dilations = list(attributes["dilations"].ints) if "dilations" in attributes else [1, 1]
    pads = list(attributes["pads"].ints) if "pads" in attributes else [0, 0, 0, 0]
    padded = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    high, wide = (
        (padded.shape[2 + d] - dilations[d] * (kernel[d] - 1) - 1) // strides[d] + 1 for d in (0, 1)
    )
    rows = []
    for i, j in product(range(high), range(wide)):
        taps = [
            padded[0, :, i * strides[0] + a * dilations[0], j * strides[1] + b * dilations[1]]
            for a, b in product(range(kernel[0]), range(kernel[1]))
        ]
        rows.append(np.stack(taps, axis=1).reshape(group, -1))
    return np.stack(rows, axis=1)


def brute_force(given: Case, layer: Layer) -> np.ndarray:
    nodes = {node.name: node for node in given.proto.graph.node}
    rows = []
    for use in layer.uses:
        for values in given.activations([use.input])[use.input]:
            for x in values:
                x = x.astype(np.float64)
                if layer.op == "Conv":
                    rows.append(im2col(x, nodes[use.node], layer.kernel, layer.group))
                else:
                    rows.append(x.reshape(1, -1, x.shape[-1]))
    stacked = np.concatenate(rows, axis=1)
    return stacked.transpose(0, 2, 1) @ stacked / stacked.shape[1]


def check(given: Case) -> None:
    found = hessians(given)
    assert list(found) == [layer.name for layer in given.graph.layers]
    for layer in given.graph.layers:
        expected = brute_force(given, layer)
        assert found[layer.name].blocks.shape == expected.shape
        np.testing.assert_allclose(
            found[layer.name].blocks,
            expected,
            rtol=2e-4,
            atol=1e-5 * np.abs(expected).max(),
            err_msg=layer.name,
        )


def test_every_layer_of_a_denoiser() -> None:
    check(denoiser_case())


@pytest.mark.parametrize(
    ("size", "attributes", "group"),
    [
        ((7, 9), {"pads": [1, 0, 2, 1], "strides": [2, 1]}, 1),
        ((9, 8), {"pads": [2, 2, 2, 2], "dilations": [2, 3]}, 2),
        ((6, 6), {"pads": [1, 1, 1, 1]}, 8),
        ((5, 5), {"pads": [0, 0, 0, 0], "strides": [3, 2]}, 1),
    ],
)
def test_conv_geometry(size: tuple[int, int], attributes: dict, group: int) -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 8, *size])
    x = with_timestep(g, "sample", 8)
    end(g, g.conv(x, "odd.conv", 16, 8, group=group, **attributes))
    check(case(g, (8, *size)))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_pads_are_those_of_the_runtime(mode: str) -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 4, 6, 7])
    x = with_timestep(g, "sample", 4)
    w, b = g.random("auto.weight", 8, 4, 3, 3), g.random("auto.bias", 8)
    end(g, g.op("Conv", [x, w, b], "auto", auto_pad=mode, strides=[2, 2], kernel_shape=[3, 3]))
    given = case(g, (4, 6, 7))
    found = hessians(given)["auto"]
    # An independent way: outputs without bias have the second moment w H w^T, summed over positions.
    matrix = np.asarray(given.graph.model.graph.initializers["auto.weight"].const_value).reshape(
        8, -1
    )
    bias = np.asarray(given.graph.model.graph.initializers["auto.bias"].const_value)
    outputs = [
        y[0] - bias[:, None, None]
        for step in given.activations(["auto_out"])["auto_out"]
        for y in step
    ]
    measured = np.mean([np.square(y).mean(axis=(1, 2)) for y in outputs], axis=0)
    expected = np.einsum("ok,kl,ol->o", matrix, found.blocks[0], matrix)
    np.testing.assert_allclose(expected, measured, rtol=1e-3)


def test_products_of_two_three_and_four_dimensions() -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 4, 6, 8])
    x = with_timestep(g, "sample", 4)
    four = g.matmul(x, "four", 8, 8)
    three = g.matmul(
        g.op("Reshape", [four, g.weight("s3", np.array([0, 24, 8]))], "r3"), "three", 10, 8
    )
    two = g.op("Reshape", [three, g.weight("s2", np.array([-1, 10]))], "r2")
    end(g, g.gemm(two, "two.transposed", 12, 10, trans_b=1), rank=2)
    end(g, g.gemm(two, "two.plain", 7, 10, trans_b=0), rank=2)
    check(case(g, (4, 6, 8)))


def test_shared_weight_sums_over_its_uses() -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 8, 6, 6])
    x = with_timestep(g, "sample", 8)
    once = g.conv(x, "shared", 8, 8)
    pooled = g.op("AveragePool", [once], "pool", kernel_shape=[2, 2], strides=[2, 2])
    w, b = "shared.weight", "shared.bias"
    end(g, g.op("Conv", [pooled, w, b], "again", pads=[1, 1, 1, 1], kernel_shape=[3, 3]))
    given = case(g, (8, 6, 6))
    assert len(given.graph.layers[0].uses) == 2
    check(given)


def test_batch_axis_need_not_be_the_first() -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 4, 6, 8])
    x = with_timestep(g, "sample", 4)
    moved = g.op("Transpose", [x], "moved", perm=[2, 0, 1, 3])
    end(g, g.matmul(moved, "moved.product", 8, 8))
    check(case(g, (4, 6, 8)))


def test_timestep_without_batch_axis() -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 4, 6, 6])
    g.input("timestep", [])
    scaled = g.op(
        "Mul",
        [g.weight("f", np.linspace(0.001, 0.01, 8, dtype=np.float32)[None]), "timestep"],
        "angle",
    )
    shift = g.gemm(g.op("Sin", [scaled], "sin"), "time.proj", 4, 8)
    axes = g.weight("axes23", np.array([2, 3], np.int64))
    end(
        g,
        g.conv(g.op("Add", ["sample", g.op("Unsqueeze", [shift, axes], "u")], "add"), "conv", 4, 4),
    )
    check(case(g, (4, 6, 6), batched=False))


def test_wide_layers_become_block_diagonal() -> None:
    given = denoiser_case()
    full = hessians(given)
    name = max(full, key=lambda n: full[n].layer.reduction)
    cut = hessians(given, bounds(hessian_width=256))[name]
    assert full[name].layer.reduction > 256 and sum(cut.widths) == full[name].layer.reduction
    start = 0
    for number, width in enumerate(cut.widths):
        place = slice(start, start + width)
        np.testing.assert_allclose(
            cut.blocks[number, :width, :width],
            full[name].blocks[0, place, place],
            rtol=1e-4,
            atol=1e-6,
        )
        start += width


@pytest.mark.parametrize("group", [1, 2, 320])
def test_blocks_are_as_wide_as_the_memory_lets_them_be(group: int) -> None:
    """The widest layers of Stable Diffusion 1.5 (2,560 channels, 3x3), Flux and larger, by the default recipe."""
    for columns in (9, 320, 2880, 11520, 17280, 23040, 12288, 15360, 46080):
        settings = QuantizeSettings()
        widths = block_widths(columns, group, settings)
        assert sum(widths) == columns and max(widths) <= settings.hessian_width
        # No block of weights under one scale is cut in two.
        assert all(width % 256 == 0 for width in widths[:-1])
        fits = matrix_bytes(widths, group) <= matrices_cap(settings)
        assert fits or max(widths) == 256
        wider = settings.replace(memory_mb=1 << 20)
        unlimited = block_widths(columns, group, wider)
        assert len(unlimited) == -(-columns // settings.hessian_width)
        if matrix_bytes(unlimited, group) <= matrices_cap(settings):
            assert widths == unlimited
        else:
            fewer = 256 * -(-columns // (256 * (len(widths) - 1)))
            before = block_widths(columns, group, wider.replace(hessian_width=fewer))
            assert matrix_bytes(before, group) > matrices_cap(settings)


def test_a_layer_that_memory_is_short_for_is_cut_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "WIDTH_MULTIPLE", 16)
    given = denoiser_case()
    full = hessians(given)
    name = max(full, key=lambda n: full[n].layer.reduction)
    columns = full[name].layer.reduction
    # A whole matrix and a product take 8 bytes a cell: there is memory for half of them.
    short = bounds(memory_mb=4 / 3 * 4 * columns**2 / 2**20)
    cut = hessians(given, short)[name]
    assert len(cut.widths) > 1 and sum(cut.widths) == columns
    width = cut.widths[0]
    np.testing.assert_allclose(
        cut.blocks[0, :width, :width], full[name].blocks[0, :width, :width], rtol=1e-4, atol=1e-6
    )


def test_a_small_cap_means_more_passes_and_the_same_matrices() -> None:
    given = denoiser_case()
    bars: list[str] = []

    class Listening(Talk):
        def bar(self, what, total):
            bars.append(what)
            return super().bar(what, total)

    largest = 4 * 4 * max(layer.reduction for layer in given.graph.layers) ** 2
    settings = bounds(memory_mb=largest / 2**20)
    found = iterate_hessians(given.graph, calls_of(given), settings, Listening())
    once = hessians(given)
    for hessian in found:
        np.testing.assert_allclose(
            hessian.blocks, once[hessian.layer.name].blocks, rtol=1e-4, atol=1e-6
        )
    assert len(bars) > 1


def test_rows_that_were_gathered_elsewhere_give_the_same_bits(
    tmp_path: Path,
) -> None:
    """Timestep by timestep, the last one first, in plans of their own: as workers do it."""
    given = denoiser_case()
    largest = 4 * 4 * max(layer.reduction for layer in given.graph.layers) ** 2
    settings = bounds(hessian_rows=40, memory_mb=largest / 2**20)
    calls = (given.graph, calls_of(given), settings, Talk())
    here = list(iterate_hessians(*calls))
    plan, found = HessianPlan.of(*calls), []
    for number in range(len(plan)):
        elsewhere = HessianPlan.of(*calls).gathering(number)
        moved: list[int] = []
        steps = {
            step: list(elsewhere.at(step, moved.append)) for step in reversed(range(plan.timesteps))
        }
        assert sum(moved) == sum(plan.calls(step) for step in range(plan.timesteps))
        found += plan.hessians(
            number, (rows for step in range(plan.timesteps) for rows in steps[step])
        )
        assert {layer.name for layer in plan.layers(number)} <= {
            hessian.layer.name for hessian in found
        }
    assert len(plan) > 1 and [h.layer for h in found] == [h.layer for h in here]
    for one, other in zip(found, here):
        np.testing.assert_array_equal(one.blocks, other.blocks)
        assert (one.widths, one.rows) == (other.widths, other.rows)


def test_free_memory_means_fewer_passes_and_the_same_bits() -> None:
    given = denoiser_case()
    largest = 4 * 4 * max(layer.reduction for layer in given.graph.layers) ** 2
    calls = (
        given.graph,
        calls_of(given),
        bounds(hessian_rows=40, memory_mb=largest / 2**20),
        Talk(),
    )
    small, groups = HessianPlan.of(*calls), []
    for free in (1 << 17, 1 << 40):
        plan = HessianPlan.of(*calls, free=free)
        groups.append(len(plan))
        found = [one for number in range(len(plan)) for one in plan.hessians(number)]
        expected = (one for number in range(len(small)) for one in small.hessians(number))
        for one, other in zip(found, expected, strict=True):
            assert one.layer is other.layer
            np.testing.assert_array_equal(one.blocks, other.blocks)
    assert len(small) >= groups[0] > groups[1] == 1


def test_an_impossible_cap_names_the_layer_and_the_need() -> None:
    with pytest.raises(UsageError, match=r"'time.linear_1'.* bytes"):
        hessians(denoiser_case(), bounds(memory_mb=1e-5))


def test_layers_that_share_an_input_share_one_array() -> None:
    found = hessians(denoiser_case())
    assert found["attn.to_q"].blocks is found["attn.to_k"].blocks is found["attn.to_v"].blocks
    assert found["attn.to_q"].blocks is not found["attn.to_out"].blocks


def test_a_subset_of_rows_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "ROWS_PER_COLUMN", 0)
    given, few = denoiser_case(), {}
    for size in (1, 5):
        monkeypatch.setattr(hessian_module, "BATCH_SIZE", size)
        few[size] = hessians(given, bounds(hessian_rows=40))
    for name, hessian in few[1].items():
        assert hessian.rows == few[5][name].rows <= 45
        np.testing.assert_allclose(hessian.blocks, few[5][name].blocks, rtol=1e-4, atol=1e-5)


def test_a_subset_of_rows_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "ROWS_PER_COLUMN", 0)
    given = denoiser_case()
    exact = np.trace(hessians(given)["up.conv2"].blocks[0])
    drawn = []
    for seed in range(20):
        monkeypatch.setattr(hessian_module, "SEED", seed)
        drawn.append(np.trace(hessians(given, bounds(hessian_rows=60))["up.conv2"].blocks[0]))
    assert abs(np.mean(drawn) / exact - 1) < 4 * np.std(drawn) / exact / np.sqrt(20) + 1e-3


def test_rows_stay_in_torch_s_tensors_where_both_libraries_compute_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    given = denoiser_case()
    expected = hessians(given)
    # The CPU stands for the GPU.
    monkeypatch.setattr(Compute, "torch_device", lambda self: torch.device("cpu"))
    monkeypatch.setattr(hessian_module, "shares_gpu", lambda session: True)
    with compute_on(Compute(None, 0)):
        found = hessians(given)
        plan = HessianPlan.of(given.graph, calls_of(given), ALL_ROWS, Talk())
        with closing(plan.gathering(0).at(0, lambda count: None)) as rows:
            assert all(torch.is_tensor(part) for part in next(rows))
    for name, hessian in expected.items():
        assert found[name].rows == hessian.rows
        np.testing.assert_allclose(found[name].blocks, hessian.blocks, rtol=1e-5, atol=1e-7)
