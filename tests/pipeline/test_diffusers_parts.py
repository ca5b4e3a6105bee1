"""Whole builds from diffusers folders: diffusion transformers, a text-conditional pipeline and its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mpq_deploy  # noqa: E402
from mpq_deploy.calls.recorded import CallSet  # noqa: E402
from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.models.spec import DenoiserSpec  # noqa: E402
from tests.pipeline.runs import FEW_SCHEMES, Built, build, recipe_for  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    ONE_LEVEL,
    tiny_text_pipeline_folder,
    tiny_transformer_conditions,
    tiny_transformer_folder,
)

pytestmark = pytest.mark.torch


def built(model: Path, run: Path, **changes: Any) -> Built:
    """Build ``model`` without an engine, and check what holds for every run."""
    found = build(recipe_for(model, target="onnxruntime-cpu", **FEW_SCHEMES, **changes), run)
    report = found.report
    assert report["size_bytes"] <= report["budget_bytes"]
    assert 0 < report["measured_nmse"] < report["controls"]["int4"]["measured_nmse"]
    return found


def test_a_flow_matching_transformer_builds(tmp_path: Path) -> None:
    folder = tiny_transformer_folder(tmp_path, "SD3Transformer2DModel")
    conditions = tiny_transformer_conditions(tmp_path / "c.npz", "SD3Transformer2DModel")
    found = built(folder, tmp_path / "run", conditions=str(conditions))
    spec = DenoiserSpec.load(tmp_path / "run" / "export" / "denoiser.json")
    assert spec.prediction_type == "flow_prediction" and spec.guidance_scale == 1
    assert "FlowMatchEulerDiscreteScheduler" in found.report["evaluation"]["sampler"]


def test_the_parts_of_a_text_pipeline_build(tmp_path: Path) -> None:
    """Its denoiser is built in test_text_to_image.py."""
    pytest.importorskip("transformers")
    folder = tiny_text_pipeline_folder(tmp_path, **ONE_LEVEL)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\nghi\njkl\nmno\npqr\nstu\n", encoding="utf-8")
    options = {"prompts": str(prompts), "component_samples": 8}
    decoder = built(folder, tmp_path / "vae", component="vae", **options)
    assert decoder.report["evaluation"]["image_kind"] == "pixels"
    assert any("samples of the float denoiser" in note for note in decoder.report["notes"])
    training = {"steps": 4, "check_every": 2, "batch_size": 2, "held_out": 4, "trajectories": 4}
    encoder = built(
        folder, tmp_path / "text", component="text_encoder", budget=0.7, recover=training, **options
    )
    recovery = encoder.report["recovery"]
    assert recovery["after"] <= recovery["before"]
    assert encoder.report["evaluation"]["image_kind"] == "features"
    # What was calibrated on is not what is compared on.
    calls = CallSet.load(tmp_path / "text" / "calibrate" / "calls")
    assert calls.rows.max() < 6 and len(calls.timesteps) == 1
    evaluation = json.loads(
        (tmp_path / "text" / "evaluate" / "evaluation.json").read_text(encoding="utf-8")
    )
    assert min(evaluation["rows"]) >= 6
    with pytest.raises(UsageError, match="component without timesteps"):
        mpq_deploy.load(tmp_path / "vae")
