"""Which calls are measured, and the patches that weight gradients are taken from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional

from mpq_deploy.calls.recorded import RecordedCalls, dealt
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.sensitivity.measured_calls import Calls
from mpq_deploy.sensitivity.torch_projection import _patches
from tests.calls.sets import call_set
from tests.graphs import denoiser_graph
from tests.sensitivity.cases import setting

pytestmark = pytest.mark.torch


def calls_of(rows: list[int], count: int, steps: int, rotate: bool) -> Calls:
    case = setting(denoiser_graph(channels=16, size=8), (3, 8, 8), steps=1, calls=1)
    samples = np.zeros((steps, len(rows), 3, 8, 8), np.float32)
    samples[..., 0, 0, 0] = np.arange(len(rows))
    recorded = call_set(samples, np.arange(steps, dtype=np.float32), rows, case.spec)
    return Calls(case.graph, RecordedCalls(recorded, case.spec), count, rotate)


def test_rotating_calls_are_used_equally_often_and_mix_conditions() -> None:
    calls = calls_of([n % 4 for n in range(32)], 8, 6, rotate=True)
    assert calls.picked.shape == (6, 8)
    counts = np.bincount(calls.picked.reshape(-1), minlength=32)
    assert counts.min() == 1 and counts.max() == 2
    for step, row in enumerate(calls.picked):
        assert len(set(row)) == 8
        np.testing.assert_array_equal(np.bincount(row % 4), [2] * 4)
        fed = calls.feeds(step, slice(2, 5))["sample"]
        np.testing.assert_array_equal(fed[:, 0, 0, 0], row[2:5])
    # Two timesteps in a row share no call.
    assert not any(set(a) & set(b) for a, b in zip(calls.picked, calls.picked[1:], strict=False))


def test_without_rotation_or_spare_calls_every_timestep_sees_the_same() -> None:
    for rotate, count in ((False, 8), (True, 32)):
        calls = calls_of([n % 4 for n in range(32)], count, 3, rotate)
        assert (calls.picked == calls.picked[0]).all()
        assert (np.diff(calls.picked[0]) > 0).all()


@pytest.mark.parametrize("rotate", [False, True])
def test_turns_number_the_calls(rotate: bool) -> None:
    calls = calls_of([n // 8 for n in range(32)], 8, 5, rotate)
    # The same turn is the same call at every timestep, and any four turns in a row have four conditions.
    pairs = set(
        zip(calls.turns.reshape(-1).tolist(), calls.picked.reshape(-1).tolist(), strict=True)
    )
    assert len(pairs) == len({turn for turn, _ in pairs}) == len({call for _, call in pairs})
    by_turn = dict(pairs)
    if rotate:
        assert sorted(by_turn) == list(range(32))
        for first in range(0, 32, 4):
            assert {by_turn[first + i] // 8 for i in range(4)} == set(range(4))


def test_dealing_keeps_every_call_and_the_order_of_equal_conditions() -> None:
    rows = np.array([0, 0, 0, 1, 1, 2])
    order = dealt(rows, np.arange(6))
    assert sorted(order) == list(range(6))
    np.testing.assert_array_equal(rows[order], [0, 1, 2, 0, 1, 0])
    np.testing.assert_array_equal(order[rows[order] == 0], [0, 1, 2])


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("dilations", [(1, 1), (2, 1)])
@pytest.mark.parametrize("pads", [(0, 0), (1, 1), (2, 0)])
def test_patches_are_those_of_unfold(strides: Any, dilations: Any, pads: Any) -> None:
    layer = conv_layer()
    x = torch.randn(2, layer.weight_shape[1], 9, 11, generator=torch.Generator().manual_seed(1))
    # Also of a view that is not contiguous.
    x = x.transpose(2, 3)
    attributes = {"strides": strides, "dilations": dilations, "pads": (*pads, *pads)}
    expected = functional.unfold(x, layer.kernel, dilations, pads, strides).transpose(1, 2)
    torch.testing.assert_close(_patches(layer, attributes, x), expected, rtol=0, atol=0)


def conv_layer() -> Layer:
    graph = layer_graph(ir.from_proto(denoiser_graph(channels=16, size=8).model()))
    return next(n for n in graph.layers if n.op == "Conv" and n.kernel == (3, 3))
