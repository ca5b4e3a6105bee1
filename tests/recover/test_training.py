"""Training: it helps, repeats, survives being cut short, and says why it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.recipe import RecoverSettings
from mpq_deploy.recover.checkpoint import restore_checkpoint, save_checkpoint
from mpq_deploy.recover.recover import RecoverTask, measured_error, recover, write_recovered
from mpq_deploy.recover.student import Student
from mpq_deploy.recover.train import HELD_OUT_ROUND, Trainer, error_factor
from mpq_deploy.system.memory import Room
from mpq_deploy.system.progress import Talk
from tests.calls.sets import samples_of
from tests.recover.cases import Case

pytestmark = pytest.mark.torch
OPTIONS = RecoverSettings(
    steps=12,
    batch_size=4,
    trajectories=4,
    round_steps=5,
    held_out=4,
    check_every=4,
    rank=4,
    warmup=2,
)
ALL_LOSSES = {"output": 1.0, "relation": 0.01, "memory": 0.1}


def trainer_of(case: Case, task: RecoverTask, options: RecoverSettings) -> Trainer:
    student = Student(
        task.model, task.spec, task.starts, task.stats, options.replace(rank=4, seed=0)
    )
    return Trainer(student, case.recorder(), task.spec, options, Talk())


def test_training_lowers_the_error_that_the_written_graph_has(case: Case, tmp_path: Path) -> None:
    task = case.planned("w4a16")
    recovered = recover(
        task, OPTIONS.replace(steps=40), case.recorder(), Talk(), tmp_path / "checkpoint", "key"
    )
    recovery = recovered.recovery
    assert recovery.improved and recovery.after < 0.9 * recovery.before
    (tmp_path / "out").mkdir()
    write_recovered(task, recovered, tmp_path / "out")
    found = measured_error(tmp_path / "out" / SIMULATED, task, recovered.held_out)
    assert found == pytest.approx(recovery.after, rel=1e-3)
    assert recovery.before == pytest.approx(recovery.curve[0].held_out_nmse)
    assert f"{100 * recovery.removed:.0f} % removed" in recovery.summary()


def test_held_out_noise_is_never_trained_on(case: Case) -> None:
    recorder = case.recorder()
    rounds = [recorder.record(3, 0, number) for number in (0, 1, HELD_OUT_ROUND)]
    starts = np.concatenate([samples_of(r.calls)[0].reshape(r.calls.count, -1) for r in rounds])
    assert len(np.unique(starts.round(5), axis=0)) == len(starts)
    again = case.recorder().record(3, 0, 1)
    np.testing.assert_array_equal(samples_of(again.calls), samples_of(rounds[1].calls))


def test_the_last_rounds_are_drawn_from(case: Case) -> None:
    options = OPTIONS.replace(trajectories=3, round_steps=2, replay=2)
    trainer, later = (trainer_of(case, case.planned("w4a16"), options) for _ in range(2))
    recorded = [case.recorder().record(3, options.seed, number) for number in range(4)]
    rounds = [samples_of(one.calls) for one in recorded]
    for step, expected in (
        (0, rounds[:1]),
        (1, rounds[:1]),
        (2, rounds[:2]),
        (4, rounds[1:3]),
        (6, rounds[2:]),
    ):
        np.testing.assert_array_equal(
            samples_of(trainer._trajectories(step).calls), np.concatenate(expected, axis=1)
        )
    # Training that continues from there draws from the same calls in the same order.
    mine, other = later._trajectories(6), trainer._trajectories(6)
    np.testing.assert_array_equal(mine.outputs, other.outputs)
    for step in range(len(mine.calls.timesteps)):
        for name in mine.calls.inputs:
            np.testing.assert_array_equal(
                mine.calls.values(name, step, slice(None)),
                other.calls.values(name, step, slice(None)),
            )


@pytest.mark.parametrize("losses", [{"output": 1.0}, ALL_LOSSES], ids=["output", "all"])
def test_interrupted_training_ends_as_if_it_had_not_been(
    case: Case, tmp_path: Path, losses: dict[str, float]
) -> None:
    task, options = case.planned("w4a8+rows1"), OPTIONS.replace(losses=losses)
    whole = trainer_of(case, task, options)
    whole.train()

    class Killed(Exception):
        pass

    first = trainer_of(case, task, options)

    def save() -> None:
        save_checkpoint(first, tmp_path / "state", "key")
        if first.progress.step == 8:
            raise Killed

    with pytest.raises(Killed):
        first.train(save)
    second = trainer_of(case, task, options)
    assert not restore_checkpoint(second, tmp_path / "state", "another key", Talk())
    assert restore_checkpoint(second, tmp_path / "state", "key", Talk())
    assert second.progress.step == 8
    second.train()
    assert second.progress.curve == whole.progress.curve
    assert second.progress.best_step == whole.progress.best_step
    for (name, one), (_, other) in zip(
        whole.student.named_parameters(), second.student.named_parameters()
    ):
        assert torch.equal(one, other), name


def test_an_altered_checkpoint_is_as_good_as_none(case: Case, tmp_path: Path) -> None:
    """One bit anywhere, in the header or the weights, or a file that ends early: said, and nothing is taken over."""
    trainer, state = trainer_of(case, case.planned("w4a16"), OPTIONS), tmp_path / "state"
    trainer.train()
    save_checkpoint(trainer, state, "key")
    whole = state.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = np.random.default_rng(0)
    damaged = [whole[:-1], whole[:header], whole[:4], b""]
    for place in (*places.integers(0, header, 40), *places.integers(header, len(whole), 10)):
        content = bytearray(whole)
        content[place] ^= 1 << int(places.integers(8))
        damaged.append(bytes(content))
    before = {name: value.detach().clone() for name, value in trainer.student.named_parameters()}
    for content in damaged:
        state.write_bytes(content)
        heard = Heard()
        assert not restore_checkpoint(trainer, state, "key", heard)
        assert heard.warnings == [f"{state} was truncated or altered: training starts over"]
    assert all(
        torch.equal(before[name], value) for name, value in trainer.student.named_parameters()
    )
    state.write_bytes(whole)
    assert restore_checkpoint(trainer, state, "key", Talk())


class Heard(Talk):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_nan_stops_with_step_and_loss_and_keeps_the_best(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpq_deploy.recover import losses

    real, calls = losses.relation_loss, []

    def broken(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(expected, found) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(losses, "relation_loss", broken)
    options = OPTIONS.replace(losses={"output": 1.0, "relation": 0.001})
    recovered = recover(
        case.planned("w4a16"), options, case.recorder(), Talk(), tmp_path / "state", "key"
    )
    assert recovered.recovery.stopped == "the loss 'relation' is nan at step 6"
    assert recovered.recovery.best_step in (0, 4)
    assert "step 6" in recovered.recovery.summary()
    for parameter in recovered.student.parameters():
        assert bool(torch.isfinite(parameter).all())


def test_without_improvement_the_plan_stays(case: Case, tmp_path: Path) -> None:
    """Rates so large that every state is worse than the plan."""
    options = OPTIONS.replace(scale_rate=3.0, constant_rate=3.0, adapter_rate=1e5)
    recovery = recover(
        case.planned("w8a16"), options, case.recorder(), Talk(), tmp_path / "state", "key"
    ).recovery
    assert not recovery.improved and recovery.after == recovery.before
    assert "those stay" in recovery.summary()


def test_learning_rates_follow_the_root_of_the_plan_s_error() -> None:
    assert error_factor(1e-3) == error_factor(0.2) == 1
    assert error_factor(4e-5) == pytest.approx(0.2)
    assert 0 < error_factor(0.0) < error_factor(1e-6)


def test_a_wrong_graph_is_noticed(case: Case, tmp_path: Path) -> None:
    task = case.planned("w4a16")
    recovered = recover(task, OPTIONS, case.recorder(), Talk(), tmp_path / "state", "key")
    other = replace(
        recovered, recovery=replace(recovered.recovery, after=2 * recovered.recovery.after)
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(MpqError, match="in ONNX Runtime"):
        write_recovered(task, other, tmp_path / "out")


def test_too_little_memory_is_refused_before_anything_is_made(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpq_deploy.recover import recover as module

    monkeypatch.setattr(module, "memory_room", lambda: Room(10 << 20, "this machine"))
    monkeypatch.setattr(module, "held_memory", lambda: 0)
    monkeypatch.setattr(module, "Student", None)
    with pytest.raises(
        UsageError,
        match=r"needs? about|would need about .* GB .* and this machine has 0\.0 GB free",
    ):
        recover(case.planned("w4a16"), OPTIONS, case.recorder(), Talk(), tmp_path / "state", "key")
