"""correction.json: whose it is, what it says between and outside the calibrated timesteps, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.evaluate.cache import model_digest
from mpq_deploy.runtime.correction import (
    Correction,
    CorrectionStep,
    load_correction,
    read_correction,
)
from tests.graphs import denoiser_graph
from tests.runtime.test_corrected_scheduler import identity


def step(
    timestep: float, slope: float = 0.1, bias: tuple[float, ...] = (0.2, 0.0), **values: Any
) -> CorrectionStep:
    given = {
        "residual_variance": 0.01,
        "applied": True,
        "heldout_nmse_before": 0.02,
        "heldout_nmse_fitted": 0.01,
    }
    return CorrectionStep(timestep=timestep, slope=slope, bias=bias, **{**given, **values})


def two_steps(models: dict[str, str] | None = None) -> Correction:
    refused = step(
        300, 0.0, (0.0, 0.0), residual_variance=0.03, applied=False, heldout_nmse_fitted=0.04
    )
    return Correction(
        models=models or {"model.onnx": "0" * 64},
        prediction_type="epsilon",
        channels=2,
        bias_per="channel",
        steps=(step(100), refused),
        calls=8,
        folds=4,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return denoiser_graph(channels=16, size=8).save(tmp_path / "model.onnx")


def test_survives_its_file_which_repeats_byte_for_byte(tmp_path: Path, model: Path) -> None:
    made = two_steps({"model.onnx": model_digest(model)})
    made.save(tmp_path / "a.json")
    load_correction(tmp_path / "a.json", model).save(tmp_path / "b.json")
    assert load_correction(tmp_path / "b.json", model) == made
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_interpolates_between_and_holds_outside() -> None:
    made = two_steps()
    halfway = made.at(200)
    assert halfway.slope == pytest.approx(0.05)
    assert halfway.bias == pytest.approx([0.1, 0.0])
    assert halfway.residual_variance == pytest.approx(0.02)
    assert (made.at(0).slope, made.at(999).slope) == (0.1, 0.0)


def test_the_corrected_output_undoes_slope_and_bias_and_leaves_a_learned_variance() -> None:
    clean = np.random.default_rng(0).standard_normal((3, 2, 4, 4)).astype(np.float32)
    bias = np.float32([0.2, 0.0]).reshape(2, 1, 1)
    found = two_steps().apply(1.1 * clean + bias, 100)
    np.testing.assert_allclose(found, clean, atol=1e-6)
    both = np.concatenate([1.1 * clean + bias, clean], axis=1)
    found = two_steps().apply(both, 100)
    np.testing.assert_allclose(found, np.concatenate([clean, clean], axis=1), atol=1e-6)
    np.testing.assert_array_equal(found[:, 2:], clean)


def test_where_it_does_not_help_the_output_is_the_same_object() -> None:
    output = np.ones((1, 2, 2, 2), np.float32)
    assert two_steps().apply(output, 500) is output
    assert identity(2).apply(output, 500) is output


def test_the_guided_output_has_the_same_slope_and_bias() -> None:
    rng = np.random.default_rng(1)
    bare, conditioned = (rng.standard_normal((2, 2, 4, 4)).astype(np.float32) for _ in range(2))
    made, scale = two_steps(), np.float32(7.5)
    after = made.apply(bare + scale * (conditioned - bare), 100)
    before = [made.apply(output, 100) for output in (bare, conditioned)]
    np.testing.assert_allclose(after, before[0] + scale * (before[1] - before[0]), atol=1e-5)


def test_heldout_errors_count_what_is_applied() -> None:
    assert two_steps().heldout_nmse() == (pytest.approx(0.02), pytest.approx(0.015))
    assert "1 of 2 timesteps" in two_steps().summary()


def test_another_models_correction_is_refused(tmp_path: Path, model: Path) -> None:
    two_steps().save(tmp_path / "correction.json")
    with pytest.raises(ModelError, match=r"another model.*model\.onnx 000000000000"):
        load_correction(tmp_path / "correction.json", model)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "correction.json"
    two_steps().save(path)
    whole = path.read_text(encoding="utf-8")
    for length in range(0, len(whole) - 2, 7):
        path.write_text(whole[:length], encoding="utf-8")
        with pytest.raises(ModelError, match="is not JSON"):
            read_correction(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", 2, "format 2; this version reads 1"),
        ("format", None, "format None"),
        ("channels", 3, "a bias does not have 3 values"),
        ("steps", [], "steps"),
        ("surprise", 1, "surprise"),
        ("method", "magic", "method"),
    ],
)
def test_damage_is_named(tmp_path: Path, key: str, value: Any, words: str) -> None:
    path = tmp_path / "correction.json"
    path.write_text(json.dumps({**two_steps().as_json(), key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match=words):
        read_correction(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slope": -0.9}, "slope"),
        ({"slope": float("nan")}, "slope"),
        ({"residual_variance": -1.0}, "residual_variance"),
        ({"timestep": 300.0}, "are not ascending"),
    ],
)
def test_a_damaged_step_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    values = two_steps().as_json()
    values["steps"][0].update(change)
    path = tmp_path / "correction.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match=words):
        read_correction(path)


def test_an_absent_file_and_one_that_is_no_object_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no correction"):
        read_correction(tmp_path / "correction.json")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ModelError, match="format None"):
        read_correction(tmp_path / "list.json")


def test_other_channels_are_refused() -> None:
    with pytest.raises(ModelError, match="3 channels"):
        two_steps().apply(np.zeros((1, 3, 2, 2), np.float32), 100)
