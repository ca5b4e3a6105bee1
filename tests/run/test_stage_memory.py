"""Batches follow the memory at hand, and only what takes too much even one by one is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import make_recipe
from mpq_deploy.run.memory_model import ModelSize
from mpq_deploy.run.pipeline import STAGES
from mpq_deploy.run.stage_memory import (
    batch_within_memory,
    check_memory,
    hessian_room,
    stage_memory,
)
from mpq_deploy.run.view import Run
from mpq_deploy.system import memory
from mpq_deploy.system.memory import Room
from mpq_deploy.system.parallel.processes import Processes
from mpq_deploy.system.parallel.work import Alone

# A sample's values take 100 MB.
SIZE = ModelSize(weights=10**9, largest=10**6, values=10**8, alive=10**8, outputs=10**7, nodes=100)

# Without guidance.
SPEC = SimpleNamespace(recorded=False, pipeline=None, guidance_scale=1, uncond_row=None)


class Said:
    """Keeps the lines of a talk."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def run_with(batch: int) -> tuple[Run, Said]:
    talk = Said()
    recipe = make_recipe({"calibrate": {"batch_size": batch}, "evaluate": {"batch_size": batch}})
    made = SimpleNamespace(
        exported=SimpleNamespace(size=SIZE, spec=SPEC), recipe=recipe, crew=None, talk=talk
    )
    return cast("Run", made), talk


def with_room(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "memory_room", lambda: Room(size, "this machine"))
    monkeypatch.setattr(memory, "held_memory", lambda: 0)


@pytest.mark.parametrize("stage", ["calibrate", "evaluate"])
@pytest.mark.parametrize(("left", "expected"), [(16, 16), (15, 8), (8, 8), (7.9, 4), (1, 1)])
def test_a_batch_is_halved_until_it_fits(
    monkeypatch: pytest.MonkeyPatch, stage: str, left: float, expected: int
) -> None:
    run, talk = run_with(16)
    one, two = (stage_memory(run, stage, batch).total for batch in (1, 2))
    with_room(monkeypatch, int(one + (left - 1) * (two - one)) + 16)
    check_memory(run, STAGES[stage])
    assert batch_within_memory(run, stage) == expected
    said = [f"{expected} instead of 16 samples at once" in line for line in talk.lines]
    assert said == ([True] if expected < 16 else [])


def test_what_does_not_fit_one_by_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_with(16)
    with_room(monkeypatch, stage_memory(run, "calibrate", 1).total - 1)
    with pytest.raises(UsageError, match="'calibrate' would need about"):
        check_memory(run, STAGES["calibrate"])


def test_a_batch_stays_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    run, talk = run_with(6)
    monkeypatch.setattr(memory, "memory_room", lambda: cast("Any", None))
    assert (batch_within_memory(run, "calibrate"), talk.lines) == (6, [])


def test_what_candidates_leave_free_is_for_more_hessians(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = run_with(6)
    run = cast("Any", made)
    run.crew = Alone()
    needed = stage_memory(run, "candidates").total
    with_room(monkeypatch, needed + 1000)
    assert hessian_room(run) == 500
    with_room(monkeypatch, needed - 1)
    assert hessian_room(run) == 0
    with_room(monkeypatch, needed + 1000)
    run.crew = Processes(2)
    assert hessian_room(run) == 0
    run.crew = Alone()
    monkeypatch.setattr(memory, "memory_room", lambda: cast("Any", None))
    assert hessian_room(run) == 0
