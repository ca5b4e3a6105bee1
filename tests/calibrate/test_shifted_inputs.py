"""Shifts of channels: taken only where steps are finer, wide enough for all that was calibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.calibrate.calibrate import summarise
from mpq_deploy.calibrate.observers import Observation
from mpq_deploy.calibrate.shifted_inputs import (
    save_shifted,
    shiftable_inputs,
    shifted_layers,
    shifts_within_fp16,
)
from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.shifts import FINER, SHIFT_FORMS, SHIFTABLE, middle_of
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.recipe import CalibrateSettings
from tests.graphs import GraphBuilder

SETTINGS = CalibrateSettings(reservoir=256)
FORMS = {s.activation_form: s for s in SCHEMES.values() if s.series == "w8a8" and s.activation}


def observation(values: np.ndarray) -> Observation:
    """What would be observed of ``values`` [K, N, C] of one tensor."""
    steps, count, channels = values.shape
    flat = values.reshape(-1, channels).astype(np.float64)
    drawn = np.random.default_rng(0).integers(0, flat.size, SETTINGS.reservoir)
    return Observation(
        ("x",),
        np.array([0, channels]),
        np.abs(flat).max(axis=0),
        np.square(flat).sum(axis=0),
        (flat**4).sum(axis=0),
        np.array([float(steps * count)]),
        np.maximum(values.max(axis=1), 0).astype(np.float32),
        np.minimum(values.min(axis=1), 0).astype(np.float32),
        np.arange(SETTINGS.reservoir, dtype=np.uint64),
        flat.ravel()[drawn][None].astype(np.float32),
        (drawn % channels)[None].astype(np.int32),
        SETTINGS.reservoir,
    )


def stats_of(values: np.ndarray, shifts: bool = True) -> ActivationStats:
    timesteps = np.linspace(0, 999, len(values)).astype(np.float32)
    shiftable = ("x",) if shifts else ()
    return summarise(observation(values), {}, SETTINGS, timesteps, shiftable).activations["x"]


def values_of(seed: int, skew: float, steps: int = 4) -> np.ndarray:
    """Normal values, below zero ``1 - skew`` times as large, wider from timestep to timestep."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((steps, 64, 6)) * np.exp2(rng.uniform(-2, 2, (steps, 1, 6)))
    return np.where(x < 0, (1 - skew) * x, x).astype(np.float32)


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 6))
def test_a_shifted_step_is_finer_and_holds_all_that_was_seen(
    seed: int, skew: float, steps: int
) -> None:
    values = values_of(seed, skew, steps)
    shifted, plain = stats_of(values), stats_of(values, shifts=False)
    for form in SHIFT_FORMS:
        scheme = FORMS[form]
        grid, before = scheme.input_grid(shifted), scheme.input_grid(plain)
        assert not before.zeros
        assert grid.scale <= (FINER if grid.zeros else 1) * before.scale
        if not grid.zeros or not scheme.range.moves:
            continue
        factors = scheme.branch.factors(shifted)
        seen = values * (1 if factors is None else factors.astype(np.float32))
        widest = np.abs(seen).max(axis=(1, 2), keepdims=True)
        codes = seen / (grid.scale * widest / widest.max()) - np.array(grid.zeros)
        # What FP16 makes of scales is up to a tenth of a code.
        assert np.abs(codes).max() <= 127.6 + 0.1
        assert np.isclose(grid.scale * 127 * grid.reach, widest.max(), rtol=1e-3)


def test_what_is_symmetric_is_left_as_it_is() -> None:
    one, plain = stats_of(values_of(1, 0.0)), stats_of(values_of(1, 0.0), shifts=False)
    assert not one.shift_scales.any()
    for scheme in FORMS.values():
        assert scheme.input_grid(one) == scheme.input_grid(plain)


def test_what_comes_out_of_a_silu_has_nearly_half_the_step() -> None:
    x = values_of(2, 0.0) * 4
    one = stats_of(x / (1 + np.exp(-x)))
    grid = SCHEMES["w8a8-timestep"].input_grid(one)
    assert 0.5 <= grid.scale * 127 / one.amax.max() <= 0.7
    # Others share a quantizer that nothing is taken off.
    assert not SCHEMES["w8a8"].input_grid(one).zeros


def network() -> GraphBuilder:
    """Inputs read by one Conv, by two that pad alike, by two that do not, by a grouped one, by a product."""
    g = GraphBuilder()
    g.input("sample", ["N", 8, 8, 8])
    x = g.op("Relu", ["sample"], "alone")
    x = g.op("Relu", [g.conv(x, "a", 8, 8)], "alike")
    x = g.op("Add", [g.conv(x, "b", 8, 8), g.conv(x, "c", 8, 8)], "sum1")
    x = g.op("Relu", [x], "unlike")
    x = g.op("Add", [g.conv(x, "d", 8, 8), g.conv(x, "e", 8, 8, kernel=1)], "sum2")
    x = g.op("Relu", [x], "grouped")
    weight = g.random("f.weight", 8, 4, 1, 1)
    g.nodes.append(onnx.helper.make_node("Conv", [x, weight], ["f_out"], name="f", group=2))
    g.output(g.matmul("f_out", "h", 8, 8), ["N", 8, 8, 8])
    return g


def test_a_shift_that_fp16_does_not_hold_is_not_taken(tmp_path: Path) -> None:
    graph = layer_graph(ir.load(network().save(tmp_path / "model.onnx")))
    tensor = next(layer.uses[0].input for layer in graph.layers if layer.name == "a")
    weight = graph.model.graph.initializers["a.weight"].const_value.numpy()
    values = np.abs(values_of(2, 1.0))[..., [0, 1, 2, 3, 4, 5, 0, 1]]
    plain = stats_of(values)
    taken = int((plain.shift_scales[:, 0] > 0).sum())
    assert taken
    for size, left in ((1.0, taken), (1e4, None), (1e6, 0), (1e10, 0)):
        one = stats_of(values * np.float32(size))
        kept = shifts_within_fp16(CalibrationStats({tensor: one}), graph).activations[tensor]
        counts = int((kept.shift_scales[:, 0] > 0).sum())
        assert left is None or counts == left
        for row, (form, (_, exponent)) in enumerate(SHIFTABLE.items()):
            shift = middle_of(kept.shifts[row], kept.shift_scales[row, 0])
            assert np.isfinite(shift).all(), form
            factors = 1 if exponent is None else kept.factors[exponent]
            product = np.einsum("ockl,c->o", weight.astype(np.float64), shift / factors)
            assert np.isfinite(product.astype(np.float16)).all(), form


def test_layers_know_which_of_their_inputs_are_shifted(tmp_path: Path) -> None:
    graph = layer_graph(ir.load(network().save(tmp_path / "model.onnx")))
    by_layer = {layer.name: layer.uses[0].input for layer in graph.layers}
    found = shiftable_inputs(graph)
    assert set(found) == {by_layer["a"], by_layer["b"]}
    one = stats_of(values_of(2, 1.0))
    stats = CalibrationStats({by_layer["a"]: one, by_layer["h"]: stats_of(values_of(1, 0.0))})
    save_shifted(stats, graph, tmp_path)
    stats.save(tmp_path / "stats.npz")
    read = CalibrationStats.load(tmp_path / "stats.npz").activations[by_layer["a"]]
    np.testing.assert_array_equal(read.shifts, one.shifts)
    layers = {layer.name: layer for layer in shifted_layers(graph, tmp_path).layers}
    assert layers["a"].shifted and layers["a"].pads == (1, 1, 1, 1)
    assert not any(layers[name].shifted for name in "bcdefh")
    scheme = SCHEMES["w8a8-dynamic"]
    assert scheme.shifts(layers["a"]) and not SCHEMES["w8a8"].shifts(layers["a"])
    assert shifted_layers(graph, tmp_path / "none").layers == graph.layers
