"""Losses: against formulas written out, and with gradients where they must have some."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import LOSSES, RecoverSettings
from mpq_deploy.recover.batches import Batches, draw_weights, drawn_timesteps, timestep_shares
from mpq_deploy.recover.losses import LossTerms, pixels_of, relation_loss, space_factor
from mpq_deploy.recover.pixel_memory import PixelMemory
from mpq_deploy.recover.student import Student
from tests.recover.cases import Case

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_reaches_the_adapters(case: Case, name: str) -> None:
    """MPQ-DM's published relation loss has no gradient: ours, and every other, must."""
    task = case.planned("w4a16")
    student = Student(
        task.model,
        task.spec,
        task.starts,
        task.stats,
        RecoverSettings(rank=4, margin=0.499, seed=0),
    )
    pool = case.recorder().record(4, 0, 0)
    options = RecoverSettings(losses={name: 1.0})
    terms = LossTerms(task.spec, options, pool.energy, 192)
    rng = np.random.default_rng(0)
    batch = Batches(task.spec, 4).draw(pool, np.full(4, 0.25), rng)
    terms.terms(student, batch, np.ones(4), rng)  # fills the memory
    found = terms.terms(student, batch, np.ones(4), rng)
    loss, weight = found[name]
    assert list(found) == [name] and weight == 1.0 and float(loss.detach()) > 0
    loss.backward()
    gradients = [w.adapter.up.grad for w in student.layer_weights]
    assert sum(g is not None and float(g.abs().max()) > 0 for g in gradients) > len(gradients) // 2


def test_the_output_loss_is_the_nmse_that_evaluation_measures(case: Case) -> None:
    task = case.planned("w4a16")
    student = Student(
        task.model,
        task.spec,
        task.starts,
        task.stats,
        RecoverSettings(rank=4, margin=0.499, seed=0),
    )
    pool = case.recorder().record(3, 0, 0)
    terms = LossTerms(task.spec, RecoverSettings(), pool.energy, 192)
    batches, expected, found = Batches(task.spec, 3), [], []
    for step in range(len(pool.calls.timesteps)):
        batch = batches.of(pool, np.full(3, step), np.arange(3))
        with torch.no_grad():
            found.append(
                float(
                    terms.terms(student, batch, np.ones(3), np.random.default_rng(0))["output"][0]
                )
            )
            output = student.run(student.feed(batch.feeds))["out_sample"].numpy()
        expected.append(
            np.sum((output - pool.outputs[step]) ** 2) / np.sum(pool.outputs[step] ** 2)
        )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("space", ["eps", "v", "sample"])
def test_errors_change_space_as_the_forward_process_says(prediction: str, space: str) -> None:
    rng = np.random.default_rng(0)
    a = np.array([0.9, 0.5, 0.01])
    x0, eps = rng.standard_normal((2, 3))
    x = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps

    def spaces(kind: str, output: np.ndarray) -> dict[str, np.ndarray]:
        if kind == "epsilon":
            e = output
            s = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
        elif kind == "sample":
            s = output
            e = (x - np.sqrt(a) * s) / np.sqrt(1 - a)
        else:
            s = np.sqrt(a) * x - np.sqrt(1 - a) * output
            e = np.sqrt(1 - a) * x + np.sqrt(a) * output
        return {"eps": e, "sample": s, "v": np.sqrt(a) * e - np.sqrt(1 - a) * s}

    one, other = (spaces(prediction, y)[space] for y in rng.standard_normal((2, 3)))
    rng = np.random.default_rng(0)
    rng.standard_normal((2, 3))
    y, z = rng.standard_normal((2, 3))
    np.testing.assert_allclose(
        np.abs(one - other), space_factor(prediction, space, a) * np.abs(y - z), rtol=1e-9
    )


def test_flow_models_have_no_noise_to_match(case: Case) -> None:
    spec = case.task.spec.model_copy(update={"prediction_type": "flow_prediction"})
    with pytest.raises(UsageError, match="predicts flow"):
        LossTerms(spec, RecoverSettings(losses={"v": 1.0}), np.ones(4), 1)


def test_relations_against_loops() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 2, 5, 3, 3)).astype(np.float32)
    total = 0.0
    for call in range(2):
        maps = []
        for feature in (one[call], other[call]):
            f = feature.reshape(5, 9) / np.linalg.norm(feature.reshape(5, 9), axis=0)
            r = np.exp(f.T @ f)
            maps.append(r / r.sum(1, keepdims=True))
        total += 100 * np.sum(maps[0] * np.log(maps[0] / maps[1]))
    found = relation_loss(*(pixels_of(torch.from_numpy(f), 1, 100) for f in (one, other)))
    assert float(found) == pytest.approx(total / 2, rel=1e-4)
    assert float(relation_loss(*[pixels_of(torch.from_numpy(one), 1, 100)] * 2)) == pytest.approx(
        0, abs=1e-4
    )


def test_large_maps_are_taken_on_a_grid() -> None:
    feature = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    assert pixels_of(feature, 1, 64).shape == (2, 64, 3)
    on_grid = pixels_of(feature, 1, 16)
    assert on_grid.shape == (2, 16, 3)
    torch.testing.assert_close(on_grid, pixels_of(feature[:, :, ::2, ::2], 1, 64))
    assert pixels_of(feature.movedim(1, -1), -1, 16).equal(on_grid)
    assert pixels_of(feature, 1, 20).shape[1] <= 20


def test_the_memory_forgets_the_oldest_and_never_shows_an_empty_slot() -> None:
    memory = PixelMemory(5)
    rng = np.random.default_rng(0)
    assert float(memory.loss(torch.ones(2, 3), torch.ones(2, 3), 4, rng)) == 0
    memory.enqueue(torch.full((3, 3), 1.0), np.array([9.0, 9.0, 1.0], np.float32))
    for _ in range(10):
        assert memory.anchors(4, rng).shape == (3, 3) and bool((memory.anchors(4, rng) == 1).all())
    memory.enqueue(torch.full((4, 3), 2.0), np.array([1.0] * 4, np.float32))
    assert memory.used == 5
    assert sorted(memory.pixels[:, 0].tolist()) == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert sorted(memory.timesteps.tolist()) == [1.0] * 5  # the two of timestep 9 were the oldest


def test_the_memory_draws_timesteps_alike() -> None:
    memory = PixelMemory(100)
    pixels = torch.cat([torch.full((90, 1), 0.0), torch.full((10, 1), 1.0)])
    memory.enqueue(pixels, np.repeat([5.0, 7.0], [90, 10]).astype(np.float32))
    rng = np.random.default_rng(0)
    rare = np.mean([float(memory.anchors(4, rng).mean()) for _ in range(300)])
    assert 0.4 < rare < 0.55  # by number alone it would be 0.1


def test_timesteps_are_drawn_by_error_and_weigh_the_same_in_the_mean() -> None:
    errors = np.array([1e-4, 4e-4, 1e-2, 0.0])
    shares = timestep_shares(errors, "sensitivity")
    assert (
        shares.sum() == pytest.approx(1) and shares.min() > 0.05 and np.all(np.diff(shares[:3]) > 0)
    )
    np.testing.assert_array_equal(timestep_shares(errors, "uniform"), np.full(4, 0.25))
    assert np.sum(shares * draw_weights(shares) * errors) == pytest.approx(errors.mean())
    drawn = np.concatenate(
        [drawn_timesteps(shares, 7, np.random.default_rng(i)) for i in range(2000)]
    )
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), shares, atol=0.01)
