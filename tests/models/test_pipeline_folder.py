"""Inputs beside text and classes: ControlNet's residuals, and the guidance that a consistency model is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.export import export_denoiser  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.runtime.drop_in import load  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    ONE_LEVEL,
    tiny_conditional_folder,
    tiny_text_pipeline_folder,
    tiny_unet_folder,
)

pytestmark = pytest.mark.torch
# What the level of the tiny UNet hands to the way up.
RESIDUALS = ((16, 8, 8), (16, 8, 8))
MIDDLE = (16, 8, 8)
MIDDLE_BLOCK = {**ONE_LEVEL, "mid_block_type": "UNetMidBlock2DCrossAttn"}


def test_residuals_of_a_controlnet_are_inputs(tmp_path: Path) -> None:
    folder = tiny_conditional_folder(tmp_path, **MIDDLE_BLOCK)
    rng = np.random.default_rng(0)
    arrays = {
        f"down_block_additional_residuals.{i}": rng.standard_normal((2, *s), np.float32)
        for i, s in enumerate(RESIDUALS)
    }
    arrays["mid_block_additional_residual"] = rng.standard_normal((2, *MIDDLE), np.float32)
    arrays["encoder_hidden_states"] = rng.standard_normal((2, 7, 12), np.float32)
    np.savez(tmp_path / "c.npz", **arrays)
    scheduler = tiny_unet_folder(tmp_path)
    denoiser = open_denoiser(folder, Additions(scheduler=scheduler, conditions=tmp_path / "c.npz"))
    assert len(denoiser.spec.conditions) == len(RESIDUALS) + 2
    assert export_denoiser(denoiser, tmp_path / "run" / "export").max_relative_error < 1e-4
    sample = torch.from_numpy(rng.standard_normal((2, 4, 8, 8), np.float32))
    down = [
        torch.from_numpy(arrays[f"down_block_additional_residuals.{i}"])
        for i in range(len(RESIDUALS))
    ]
    given = {
        "encoder_hidden_states": torch.from_numpy(arrays["encoder_hidden_states"]),
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": torch.from_numpy(arrays["mid_block_additional_residual"]),
    }
    replaced = load(tmp_path / "run" / "export" / "model.onnx")
    with torch.no_grad():
        expected = denoiser.network.module(sample, 300, **given).sample  # type: ignore[attr-defined]
    assert torch.allclose(replaced(sample, 300, **given).sample, expected, atol=1e-4)
    with pytest.raises(UsageError, match=r"needs 'down_block_additional_residuals\.1'"):
        replaced(sample, 300, **{**given, "down_block_additional_residuals": down[:1]})


def test_a_consistency_model_is_told_its_guidance(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tiny_text_pipeline_folder(tmp_path, time_cond_proj_dim=9)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n", encoding="utf-8")
    denoiser = open_denoiser(folder, Additions(prompts=prompts, guidance_scale=3.0))
    assert denoiser.spec.guidance_scale == 1.0
    pipeline = diffusers.LatentConsistencyModelPipeline
    expected = pipeline.get_guidance_scale_embedding(None, torch.tensor([2.0]), embedding_dim=9)
    np.testing.assert_allclose(
        denoiser.conditions.arrays["timestep_cond"][:1], expected.numpy(), atol=2e-4
    )
