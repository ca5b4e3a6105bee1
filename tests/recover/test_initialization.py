"""The start from the quantization error: never worse than zero, and chosen where it helps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpq_deploy.recipe import RecoverSettings
from mpq_deploy.recover.batches import Batches
from mpq_deploy.recover.initialization import initialize_from_error
from mpq_deploy.recover.recover import RecoverTask
from mpq_deploy.recover.student import Student
from mpq_deploy.rounding.quantizers import QuantizedMatrix
from tests.recover.cases import Case

pytestmark = pytest.mark.torch


def layer_errors(student: Student, feeds: dict[str, torch.Tensor]) -> np.ndarray:
    """Squared error of each layer's output on float inputs."""
    errors = np.zeros(len(student.layer_weights))

    def add(number: int, node: str, inputs: list[torch.Tensor]) -> None:
        exact = student.graph.apply(node, inputs)
        found = student.graph.apply(
            node, student.rewired(node, student.layer_weights[number](), inputs, of_float=True)
        )
        errors[number] += float((found - exact).square().sum())

    student.observe(feeds, add)
    return errors


def coarse(task: RecoverTask) -> RecoverTask:
    """The same plan with codes whose lowest bits were cut off: errors that an adapter can see."""
    starts = []
    for start in task.starts:
        if isinstance(start.matrix, QuantizedMatrix):
            start = replace(
                start,
                matrix=replace(start.matrix, codes=(start.matrix.codes // 4 * 4).astype(np.int8)),
            )
        starts.append(start)
    return replace(task, starts=starts)


@pytest.mark.parametrize("margin", [0.0, 0.499])
@pytest.mark.parametrize("wanted", ["w4a16", "w4a8+rows1", "w8a8+cols1", "w8a8+scale5"])
def test_no_layer_is_worse_than_from_zero(case: Case, wanted: str, margin: float) -> None:
    task = case.planned(wanted)
    pool = case.recorder().record(4, 0, 0)
    calls = Batches(task.spec, 4).of(pool, np.arange(4), np.arange(4)).feeds
    made = [
        Student(
            task.model,
            task.spec,
            task.starts,
            task.stats,
            RecoverSettings(rank=8, margin=margin, seed=0),
        )
        for _ in range(2)
    ]
    zero, started = made
    feeds = zero.feed(calls)
    chosen = initialize_from_error(started, [feeds])
    assert sum(chosen.values()) == len(task.starts)
    assert np.all(layer_errors(started, feeds) <= layer_errors(zero, feeds) * (1 + 1e-6))


def test_large_errors_are_started_from(case: Case) -> None:
    task = coarse(case.planned("w8a16"))
    student = Student(
        task.model, task.spec, task.starts, task.stats, RecoverSettings(rank=8, seed=0)
    )
    pool = case.recorder().record(4, 0, 0)
    feeds = student.feed(Batches(task.spec, 4).of(pool, np.arange(4), np.arange(4)).feeds)
    before = layer_errors(student, feeds)
    chosen = initialize_from_error(student, [feeds])
    after = layer_errors(student, feeds)
    assert sum(count for gain, count in chosen.items() if gain) > 3
    assert after.sum() < 0.9 * before.sum()
