"""Work side by side: in order, bounded, and with errors in their turn."""

from __future__ import annotations

import threading
import time

import pytest

from mpq_deploy.system import lanes as module
from mpq_deploy.system.lanes import LARGEST_SHARED_BYTES, MOST_LANES, Lanes, in_lanes, lanes_for


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_results_come_in_order_and_no_more_than_asked_for_run_at_once(lanes: int) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002 * (7 - item))
        with lock:
            running -= 1
        return item**2

    assert list(in_lanes(work, range(7), lanes)) == [item**2 for item in range(7)]
    assert most == lanes


def test_an_error_comes_in_its_turn_and_stops_what_follows() -> None:
    done: list[int] = []
    stopped: list[bool] = []

    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        done.append(item)
        return item

    results = in_lanes(work, range(100), 2, lambda: stopped.append(True))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert stopped and len(done) < 10


def test_large_models_and_gpus_have_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runtime_threads", lambda: 12)
    assert lanes_for(1) == Lanes(MOST_LANES, 12 // MOST_LANES)
    assert lanes_for(LARGEST_SHARED_BYTES // 2) == Lanes(2, 6)
    assert lanes_for(LARGEST_SHARED_BYTES // 2 + 1) == Lanes()
    monkeypatch.setenv("MPQ_DEPLOY_DEVICE", "0,0")
    assert lanes_for(1) == Lanes()
