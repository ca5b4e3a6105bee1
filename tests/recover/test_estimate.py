"""The memory estimate: near what a tiny training takes is not measurable, so its parts are counted by hand."""

from __future__ import annotations

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.recover.estimate import FIXED_BYTES, estimate_memory
from mpq_deploy.system.memory import Room


def test_the_parts_are_counted() -> None:
    found = estimate_memory(
        [(64, 576), (10, 20)], rank=32, value_bytes=1000, batch_size=8, segments=1
    )
    assert found.weights == 4 * 8 * (64 * 576 + 10 * 20)
    assert found.adapters == 4 * 5 * (32 * (64 + 576) + 10 * 30)
    assert found.values == 2 * 1000 * 8
    assert estimate_memory([(64, 576)], 0, 1000, 8, 1).adapters == 4 * 5 * 64 * 576
    assert found.trajectories == 0
    assert found.total > found.weights + found.adapters + found.values
    more = estimate_memory([(64, 576), (10, 20)], 32, 1000, 8, 1, pool_bytes=500)
    assert more.total - found.total == more.trajectories == 1000


def test_segments_hold_fewer_values_and_nothing_else() -> None:
    one, ten = (estimate_memory([(64, 64)], 4, 10**6, 4, segments) for segments in (1, 10))
    assert ten.values == one.values // 5 and ten.weights == one.weights


def test_a_unet_of_860_million_parameters_is_refused_on_a_small_machine() -> None:
    shapes = [(1280, 11520)] * 58  # 860 M weights
    estimate = estimate_memory(shapes, 32, 2 << 30, 4, 1)
    assert 30e9 < estimate.total < 60e9
    figures = r"about \d\d\.\d GB of memory \(\d\d\.\d for weights.*has 16\.0 GB free"
    with pytest.raises(UsageError, match=figures) as caught:
        estimate.refuse_too_large(Room(16 * 10**9, "this machine"))
    assert "recover.segments" in caught.value.hint
    estimate.refuse_too_large(Room(80 * 10**9, "this machine"))
    almost = Room(estimate.total - FIXED_BYTES, "this machine")
    estimate.refuse_too_large(almost, held=FIXED_BYTES)
    with pytest.raises(UsageError):
        estimate.refuse_too_large(almost, held=FIXED_BYTES - 1)
