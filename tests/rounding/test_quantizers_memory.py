"""Rounding a layer takes about as much memory as its estimate says."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from mpq_deploy.formats.candidates import choices_for, round_candidates
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import Scheme, schemes_named
from mpq_deploy.graph.layers import Layer
from mpq_deploy.rounding import quantizers
from mpq_deploy.rounding.quantizers import PART_WEIGHTS, Rounding, rounding_bytes


@pytest.mark.parametrize("names", [("w8a8",), ("w8a8", "w4a8"), ("w8a8", "w4a16", "w4a8")], ids=len)
@pytest.mark.parametrize(
    ("rows", "columns", "part"),
    [(16, 2048, PART_WEIGHTS), (512, 1024, PART_WEIGHTS), (1024, 1024, 1 << 17)],
    ids=["factor", "forms", "parts"],
)
def test_gptq_takes_about_its_estimate(
    names: tuple[str, ...], rows: int, columns: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizers, "PART_WEIGHTS", part)

    def refuse_none(layer: Layer, scheme: Scheme) -> str:
        return ""

    layer, rng = Layer("l", "MatMul", "w", (columns, rows), 1, 1, ()), np.random.default_rng(0)
    x = rng.standard_normal((2 * columns, columns), np.float32)
    moments, weight = (x.T @ x / len(x))[None], rng.standard_normal((rows, columns), np.float32)
    schemes = tuple(scheme for scheme in schemes_named(names) if not scheme.branch)
    choices = choices_for(layer, schemes, refuse_none)
    tracemalloc.start()
    inputs, how = InputMoments(moments, (columns,)), Rounding(True, 0.05, 2)
    found = round_candidates(layer, choices, weight, inputs, how)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        0.9 * peak < rounding_bytes(weight.size, columns, len(found.forms), gptq=True) < 1.3 * peak
    )
