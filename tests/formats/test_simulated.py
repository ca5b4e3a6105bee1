"""Simulated weights: grids against brute force, bits and bytes exact, shared bits never worse than even ones."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mpq_deploy.calibrate.scales import simulated_grid
from mpq_deploy.errors import InputError
from mpq_deploy.formats.branches.omq import outlier_steps
from mpq_deploy.formats.branches.zres import balanced_steps, with_residuals
from mpq_deploy.formats.candidates import (
    Choices,
    LayerCandidates,
    load_candidates,
    round_candidates,
    save_candidates,
)
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import FAMILIES, SCHEMES, nearest_scheme, schemes_named
from mpq_deploy.formats.simulated import (
    SIMULATED_BITS,
    row_kurtosis,
)
from mpq_deploy.graph.layers import Layer
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.rounding.row_grids import (
    RowForm,
    SimulatedMatrix,
    choose_grids,
    plain,
    round_forms,
    round_to_grids,
    row_errors,
)

SIMULATED = [s for s in SCHEMES.values() if s.simulated]
LAYER = Layer("fc", "Gemm", "fc.weight", (40, 24), 0, 1, ())


def weights(rows: int, columns: int, seed: int = 0, heavy: bool = True) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_t(3, (rows, columns)) if heavy else rng.standard_normal((rows, columns))
    return drawn.astype(np.float32)


def second_moments(columns: int, seed: int = 1) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((200, columns)) @ np.random.default_rng(
        2
    ).standard_normal((columns, columns))
    return (x.T @ x / len(x)).astype(np.float32)


def candidates_of(weight: np.ndarray, names: list[str], gptq: bool = True) -> LayerCandidates:
    columns = weight.shape[1]
    layer = replace(LAYER, weight_shape=weight.shape)
    moments = second_moments(columns)[None] if gptq else np.ones((columns, 1, 1), np.float32)
    return round_candidates(
        layer,
        Choices(tuple(SCHEMES[name] for name in names), {}),
        weight,
        InputMoments(
            moments, (columns,) if gptq else (1,) * columns, amax=np.linspace(1, 2, columns)
        ),
        Rounding(gptq, 0.05, 2),
    )


def test_every_name_says_that_it_is_simulated() -> None:
    bodies = [s for s in SIMULATED if not s.branch]
    assert {s.bits for s in bodies} == set(itertools.product(SIMULATED_BITS, (*SIMULATED_BITS, 16)))
    for scheme in SIMULATED:
        weight, activation = scheme.bits
        assert scheme.name.split("+")[0] == f"w{weight}a{activation}-sim"
    assert {s.name for s in schemes_named(["simulated"])} == {s.name for s in bodies}
    assert not any(s.simulated for s in schemes_named(list(FAMILIES)))


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("w2a4-sim", "w4a8"), ("w3a6-sim", "w4a8"), ("w4a16-sim", "w4a16"), ("w7a7-sim", "w8a8")],
)
def test_the_nearest_deployable_scheme(asked: str, nearest: str) -> None:
    plain = (s for s in SCHEMES.values() if s.quantized and not s.simulated and not s.branch)
    offered = tuple(s for s in plain if not s.weight.generation)
    assert nearest_scheme(SCHEMES[asked], offered).family == nearest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grids_are_as_good_as_brute_force(bits: int) -> None:
    weight, share = weights(6, 30), np.linspace(0.5, 2, 30).astype(np.float32)
    grids = choose_grids(weight, share, plain(bits))
    found = np.square(weight - round_to_grids(weight, grids).dequantize()) @ share
    levels = 2**bits
    for row, error in zip(weight, found):
        best = min(
            float(
                np.square(row - scale * np.clip(np.rint(row / scale), -below, levels - 1 - below))
                @ share
            )
            for scale in np.geomspace(0.02, 1.2, 300) * np.abs(row).max()
            for below in range(levels)
        )
        # Brute force has a grid of its own, so the search may find a little more.
        assert best * 0.97 <= error <= 1.15 * best


@pytest.mark.parametrize(
    "form", [plain(1), plain(2), plain(5), plain(8), RowForm(2, 2), RowForm(0, 3)], ids=str
)
def test_codes_stay_within_their_bits_and_rounding_beats_the_nearest(form: RowForm) -> None:
    weight, moments = weights(12, 32), [second_moments(32)]
    nearest = round_forms(weight, [form], moments, Rounding(False, 0.05, 0))[form]
    found = round_forms(weight, [form], moments, Rounding(True, 0.05, 2))[form]
    for matrix in (nearest, found):
        codes = matrix.codes - matrix.grids.low[:, None]
        assert codes.min() >= 0 and codes.max() < 2**form.bits
        assert (matrix.grid_bits == form.bits).all() and (matrix.orders == form.orders).all()
        assert set(np.unique(matrix.signs)) <= {-1, 1}
    before, after = (row_errors(weight, matrix, moments) for matrix in (nearest, found))
    assert (after <= before * (1 + 1e-3)).all() and after.sum() < before.sum()


def test_one_bit_is_sign_times_the_mean_size() -> None:
    weight = weights(5, 40)
    found = round_to_grids(
        weight, choose_grids(weight, np.ones(40, np.float32), plain(1))
    ).dequantize()
    expected = np.sign(weight) * np.abs(weight).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_residuals_are_the_formula_of_the_method() -> None:
    """W^ = q + sum alpha_o sign(R_o), R_{o+1} = R_o - alpha_o sign(R_o), alpha_o = mean |R_o|."""
    weight = weights(7, 50)
    matrix = round_to_grids(weight, choose_grids(weight, np.ones(50, np.float32), RowForm(2, 2)))
    scale = matrix.grids.scale.astype(np.float64)[:, None]
    rest = weight - matrix.codes * scale
    expected = matrix.codes * scale
    for order in range(2):
        size = np.abs(rest).mean(axis=1, keepdims=True)
        np.testing.assert_allclose(matrix.grids.residual[order], size[:, 0], rtol=2e-3)
        expected, rest = expected + size * np.sign(rest), rest - size * np.sign(rest)
    np.testing.assert_allclose(matrix.dequantize(), expected, atol=2e-3 * np.abs(weight).max())


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = weights(4, 16)
    weight[1] = 0
    found = round_forms(
        weight, [plain(2), RowForm(1, 1)], [np.eye(16, dtype=np.float32)], Rounding(True, 0.05, 1)
    )
    for matrix in found.values():
        assert np.abs(matrix.dequantize()[1]).max() < 1e-4


def test_balanced_steps_are_the_best_of_all() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        fewer, same, more = rng.random((3, 6))
        best = min(
            sum((fewer[i], same[i], more[i])[step + 1] for i, step in enumerate(steps))
            for steps in itertools.product((-1, 0, 1), repeat=6)
            if sum(steps) == 0
        )
        steps = balanced_steps(fewer, same, more)
        assert steps.sum() == 0
        assert np.choose(steps + 1, (fewer, same, more)).sum() == pytest.approx(best)


@pytest.mark.parametrize("channels", [7, 20, 43])
def test_outlier_steps_are_the_best_group_and_never_worse_than_none(channels: int) -> None:
    rng = np.random.default_rng(channels)
    kurtosis = rng.random(channels)
    more, same, fewer = np.sort(rng.random((3, channels)), axis=0)
    steps = outlier_steps(kurtosis, fewer, same, more)
    order, group = np.argsort(-kurtosis), channels // 10
    totals = {0: same.sum()}
    for m in range(group, channels // 2 + 1, group or channels):
        ends = more[order[:m]].sum() + fewer[order[channels - m :]].sum()
        totals[m] = ends + same[order[m : channels - m]].sum()
    assert np.choose(steps + 1, (fewer, same, more)).sum() == pytest.approx(min(totals.values()))
    m = int((steps > 0).sum())
    assert set(order[:m]) == set(np.flatnonzero(steps > 0)) and m == (steps < 0).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["omq", "zres"])
def test_shared_out_bits_keep_their_mean_and_are_never_worse_than_even_ones(
    bits: int, kind: str
) -> None:
    weight = weights(40, 24)
    weight[:6] *= np.random.default_rng(4).standard_t(2, (6, 24)).astype(np.float32)
    body = f"w{bits}a16-sim"
    made = candidates_of(weight, [body, f"{body}+{kind}"])
    even, shared = (made.forms[SCHEMES[name].weight_form] for name in (body, f"{body}+{kind}"))
    assert isinstance(even, SimulatedMatrix) and isinstance(shared, SimulatedMatrix)
    total = shared.grid_bits + shared.orders
    assert total.sum() == bits * 40 and set(total) <= {bits - 1, bits, bits + 1}
    if kind == "zres":
        assert (shared.orders - (shared.grid_bits == 0)).sum() <= 40
        assert ((shared.orders == 0) | (shared.grid_bits <= bits - 1)).all()
    moments = [second_moments(24)]
    assert row_errors(weight, shared, moments).sum() <= row_errors(weight, even, moments).sum() * (
        1 + 1e-9
    )


def test_residuals_are_chosen_by_heavy_tails_rather_than_by_uniform_weights() -> None:
    def share(weight: np.ndarray) -> float:
        matrix = candidates_of(weight, ["w3a16-sim+zres"], gptq=False).forms["sim3+zres"]
        assert isinstance(matrix, SimulatedMatrix)
        return float((matrix.orders > 0).mean())

    rng = np.random.default_rng(9)
    flat = rng.uniform(-1, 1, (40, 400)).astype(np.float32)
    assert share(rng.standard_t(2, (40, 400)).astype(np.float32)) > share(flat)


def test_forms_of_residuals_stand_on_a_base_of_one_bit_less() -> None:
    assert [with_residuals(4, order) for order in (1, 2)] == [RowForm(3, 1), RowForm(3, 2)]
    assert [with_residuals(2, order) for order in (1, 2)] == [RowForm(0, 2), RowForm(0, 3)]


def test_nominal_bytes_are_those_of_a_packed_form() -> None:
    layer = Layer(
        "fc", "Gemm", "fc.weight", (40, 25), 0, 1, ()
    )  # it has no use, so no input to count
    assert SCHEMES["w3a16-sim"].weight_bytes(layer) == 3 * 1000 // 8 + 40 * 3
    assert SCHEMES["w3a16-sim+omq"].weight_bytes(layer) == 375 + 40 * 3 + 2 * 40 // 8
    assert SCHEMES["w3a16-sim+zres"].weight_bytes(layer) == 375 + 40 * 3 + 3 * 40 // 8 + 2 * 40
    odd = Layer("fc", "Gemm", "fc.weight", (3, 3), 0, 1, ())
    assert SCHEMES["w5a16-sim"].weight_bytes(odd) == 6 + 9


def test_candidates_survive_their_file(tmp_path: Path) -> None:
    weight = weights(40, 24)
    made = candidates_of(
        weight, ["w2a4-sim", "w2a4-sim+omq", "w3a6-sim+zres", "w8a8-sim", "w4a16-b32"]
    )
    save_candidates(made, tmp_path / "a.safetensors")
    read = load_candidates(made.layer, weight, tmp_path / "a.safetensors")
    assert set(read.forms) == set(made.forms) and read.schemes == made.schemes
    for form in made.forms:
        np.testing.assert_array_equal(read.weight_matrix(form), made.weight_matrix(form))


@pytest.mark.parametrize("scheme", ["w2a4-sim", "w4a16-b32", "w8a8"])
def test_candidates_of_another_layer_are_refused(scheme: str, tmp_path: Path) -> None:
    weight = weights(40, 24)
    path = tmp_path / "a.safetensors"
    save_candidates(candidates_of(weight, [scheme]), path)
    other = candidates_of(weights(24, 40), [scheme])
    with pytest.raises(InputError, match=r"has the shape .* for a weight"):
        load_candidates(other.layer, other.weight, path)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("side", [1.0, -1.0, 0.0])
def test_activation_grids_are_as_good_as_brute_force(bits: int, side: float) -> None:
    x = np.random.default_rng(3).standard_normal(2000)
    x = x if side == 0 else side * np.abs(x)
    amax, levels = float(np.abs(x).max()), 2**bits - 1

    def error(scale: float, low: int) -> float:
        return float(np.mean(np.square(x - scale * np.clip(np.rint(x / scale), low, low + levels))))

    grid = simulated_grid(bits, x, amax, len(x))
    assert grid.quant_max - grid.quant_min == levels and grid.quant_min <= 0 <= grid.quant_max
    scales = np.geomspace(0.01, 1.5, 150) * amax
    best = min(
        error(s, -below) for s in scales for below in range(0, levels + 1, max(1, levels // 16))
    )
    assert error(grid.scale, grid.quant_min) <= 1.1 * best


def test_kurtosis_is_pearson_s_after_prescaling_and_dead_columns_do_no_harm() -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_t(3, (10, 40)).astype(np.float32)
    amax = rng.uniform(0.1, 5, 40)
    weight[:, 3] = 0
    amax[5] = 0
    delta = np.sqrt(np.abs(weight).max(0) / np.where(amax > 0, amax, 1))
    delta[[3, 5]] = 1
    expected = stats.kurtosis(weight.astype(np.float64) / delta, axis=1, fisher=False)
    np.testing.assert_allclose(row_kurtosis(weight, amax), expected, rtol=1e-9)
    assert row_kurtosis(np.ones((2, 4), np.float32), np.ones(4))[0] == 0
