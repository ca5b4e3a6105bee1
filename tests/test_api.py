"""The package from Python: one call builds, and what it returns can be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import yaml

import mpq_deploy
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.save import constant_bytes
from tests.pipeline.runs import RECIPE, save_denoiser


def test_build_returns_a_model_that_runs_and_a_report_that_is_true(tmp_path: Path) -> None:
    model = save_denoiser(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    result = mpq_deploy.build(
        model,
        budget=0.5,
        recipe=recipe,
        out=tmp_path / "run",
        settings={"evaluate.samples": 3},
        quiet=True,
    )
    assert (
        result.report["size_bytes"]
        == constant_bytes(result.model)
        <= 0.5 * result.report["fp16_size_bytes"]
    )
    assert result.report["evaluation"]["samples"] == 3
    assert any(
        "The deployed file computes in FP16: on 2 calls" in note for note in result.report["notes"]
    )
    assert result.engine is None and "engine.build" in result.report["engine_note"]
    session = ort.InferenceSession(str(result.model))
    sample = np.zeros((1, 3, 8, 8), np.float16)
    output = session.run(None, {"sample": sample, "timestep": np.array([500], np.float32)})[0]
    assert output.shape == sample.shape and np.isfinite(output).all()
    # Another call on the run goes on with its model, not with the bundled one.
    again = mpq_deploy.build(out=tmp_path / "run", quiet=True)
    assert again.report["model"] == result.report["model"]


def test_mistakes_are_our_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model"):
        mpq_deploy.build(
            "nosuch", out=tmp_path / "run", settings={"engine.build": False}, quiet=True
        )
    with pytest.raises(UsageError, match="Unknown key"):
        mpq_deploy.build(settings={"calibrate.sample": 3}, out=tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": 5}, "model is 5, a int"),
        ({"model": ["digits"]}, "model is .*, a list"),
        ({"recipe": {"budget": 0.3}}, "recipe is .*, a dict"),
        ({"out": 5}, "out is 5, a int"),
        ({"settings": [("budget", 0.3)]}, "settings is .*, a list"),
        ({"settings": {1: 2}}, "settings is .*, a dict"),
        ({"workers": "two"}, "workers is 'two', a str"),
        ({"workers": 1.5}, "workers is 1.5, a float"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_arguments_of_another_kind_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mpq_deploy.build(**{"model": "digits", **given})  # type: ignore[arg-type]


def test_so_are_those_of_load_and_record() -> None:
    for wrong in ({"source": None}, {"source": ".", "threads": "2"}, {"source": ".", "backend": 1}):
        with pytest.raises(UsageError, match=r"^(source|threads|backend) is"):
            mpq_deploy.load(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="folder is 5, a int"):
        mpq_deploy.record(None, 5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="folder is None"):
        mpq_deploy.Generator(None)  # type: ignore[arg-type]
