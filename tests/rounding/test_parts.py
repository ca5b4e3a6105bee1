"""Rows of a weight are rounded apart: in parts, some of them at once, as all together."""

from __future__ import annotations

import numpy as np
import pytest

from mpq_deploy.formats.candidates import choices_for, round_candidates
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import schemes_named
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding import quantizers
from mpq_deploy.rounding.quantizers import PART_ROWS, Rounding, lanes_of, row_parts
from mpq_deploy.rounding.row_grids import RowForm, plain, round_forms

LAYER = Layer("l", "Conv", "w", (200, 32, 3, 3), 0, 1, ())


def rounded(lanes: int) -> dict[tuple[str, str], Array]:
    """Return every array of every form of the layer, rounded ``lanes`` parts at once."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((600, LAYER.reduction), np.float32)
    weight = rng.standard_normal((200, LAYER.reduction), np.float32)
    moments = np.ascontiguousarray((rows.T @ rows / len(rows))[None])
    schemes = schemes_named(("w8a8", "w8a16", "w4a16", "w4a8"))
    plain = tuple(scheme for scheme in schemes if not scheme.branch)
    choices = choices_for(LAYER, plain, lambda layer, scheme: "")
    inputs = InputMoments(moments, (LAYER.reduction,))
    found = round_candidates(LAYER, choices, weight, inputs, Rounding(True, 0.05, 2, lanes=lanes))
    every = {form: matrix.arrays() for form, matrix in found.forms.items()}
    return {(form, name): array for form, own in every.items() for name, array in own.items()}


def test_parts_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rounded(1)
    assert len({form for form, _ in whole}) > 4
    monkeypatch.setattr(quantizers, "PART_WEIGHTS", PART_ROWS * LAYER.reduction)
    parts = row_parts(np.zeros((200, LAYER.reduction), np.float32))
    assert [part.start for part in parts] == [0, 64, 128, 192]
    in_turn, at_once = rounded(1), rounded(3)
    for key, expected in whole.items():
        np.testing.assert_array_equal(in_turn[key], at_once[key])
        assert in_turn[key].shape == expected.shape
        # Products of other shapes may add in another order, which moves values between two levels.
        assert np.mean(in_turn[key] == expected) > 0.999, key


def test_simulated_forms_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((400, 96), np.float32)
    weight, moments = rng.standard_normal((150, 96), np.float32), [rows.T @ rows / len(rows)]
    forms, how = [plain(2), plain(3), RowForm(1, 1)], Rounding(True, 0.05, 1)
    whole = round_forms(weight, forms, moments, how)
    monkeypatch.setattr(quantizers, "PART_WEIGHTS", PART_ROWS * 96)
    for form, matrix in round_forms(weight, forms, moments, how).items():
        assert np.mean(matrix.dequantize() == whole[form].dequantize()) > 0.99, form


def test_no_thread_is_idle_beside_a_large_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "TOGETHER_BYTES", 100)
    assert [lanes_of(needed, 8) for needed in (0, 1, 12, 30, 50, 51, 1000)] == [1, 1, 1, 2, 4, 8, 8]
    assert [lanes_of(1000, threads) for threads in (1, 2)] == [1, 2]
