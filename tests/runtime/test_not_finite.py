"""The node where a graph leaves the finite numbers is named, and harmless infinities are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpq_deploy.runtime.not_finite import first_not_finite
from tests.graphs import GraphBuilder


def masked(tmp_path: Path, factor: float) -> Path:
    """Scores with one column masked by -inf before a softmax, then scaled twice by ``factor``."""
    g = GraphBuilder()
    x = g.input("x", ["N", 4])
    mask = g.weight("mask", np.array([0, 0, 0, -np.inf], np.float32))
    weights = g.op("Softmax", [g.op("Add", [x, mask], "masked")], "weights", axis=-1)
    large = g.weight("large", np.float32(factor))
    g.op("Mul", [g.op("Mul", [weights, large], "once"), large], "twice")
    g.nodes[-1].output[0] = g.output("out", ["N", 4])
    return g.save(tmp_path / "model.onnx")


def test_an_infinite_mask_is_no_fault(tmp_path: Path) -> None:
    path = masked(tmp_path, 2.0)
    assert first_not_finite(path, {"x": np.ones((3, 4), np.float32)}) is None
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_first_of_the_nodes_that_overflow_is_named(tmp_path: Path) -> None:
    feeds = {"x": np.ones((3, 4), np.float32)}
    assert first_not_finite(masked(tmp_path, 1e30), feeds) == "'out', the output of the Mul 'twice'"
    assert (
        first_not_finite(masked(tmp_path, np.inf), feeds)
        == "'once_out', the output of the Mul 'once'"
    )
    one = {"x": np.full((1, 4), np.nan, np.float32)}
    assert (
        first_not_finite(masked(tmp_path, 1.0), one)
        == "'masked_out', the output of the Add 'masked'"
    )
