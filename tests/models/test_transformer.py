"""Diffusion transformers: opened by their configuration, exported, and any other class by its signature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mpq_deploy.errors import ModelError, UsageError  # noqa: E402
from mpq_deploy.graph.layers import layer_graph  # noqa: E402
from mpq_deploy.graph.load import load_model  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.export import export_denoiser  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.runtime.ort import OrtDenoiser  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    CLASSES,
    TRANSFORMERS,
    tiny_transformer_conditions,
    tiny_transformer_folder,
)

pytestmark = pytest.mark.torch


# Those that our own sampler calls.
SAMPLED = [name for name in TRANSFORMERS if name != "FluxTransformer2DModel"]


def opened(tmp_path: Path, class_name: str, **options: Any) -> Any:
    """Open a tiny transformer with the conditions that it needs."""
    folder = tiny_transformer_folder(tmp_path, class_name, **options)
    if class_name == "DiTTransformer2DModel":
        return open_denoiser(folder)
    return open_denoiser(
        folder, Additions(conditions=tiny_transformer_conditions(tmp_path / "c.npz", class_name))
    )


@pytest.mark.parametrize("class_name", SAMPLED)
def test_the_export_gives_what_the_transformer_gives(tmp_path: Path, class_name: str) -> None:
    denoiser = opened(tmp_path, class_name)
    report = export_denoiser(denoiser, tmp_path / "export")
    assert report.max_relative_error < 1e-5
    layers = {
        layer.name for layer in layer_graph(load_model(tmp_path / "export" / "model.onnx")).layers
    }
    module = denoiser.network.module
    # Every linear and convolution of the module is a layer under its own name.
    linear = {
        n for n, m in module.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert layers == linear
    # Called as the class's own pipeline calls it.
    run = OrtDenoiser(tmp_path / "export" / "model.onnx", denoiser.spec)
    sample = np.random.default_rng(5).standard_normal((2, *denoiser.spec.sample.shape), np.float32)
    given = {name: values[:2] for name, values in denoiser.conditions.arrays.items()}
    arguments = {name: torch.from_numpy(values) for name, values in given.items()}
    time = torch.full((2,), 400.0)
    if class_name == "PixArtTransformer2DModel":
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        expected = module(torch.from_numpy(sample), timestep=time, **arguments, return_dict=False)[
            0
        ]
    found = run(sample, 400.0, given)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5 * float(expected.abs().max()))


def test_a_dit_has_one_row_per_class_and_one_for_none(tmp_path: Path) -> None:
    denoiser = open_denoiser(tiny_transformer_folder(tmp_path, "DiTTransformer2DModel"))
    assert len(denoiser.spec.labels) == CLASSES + 1 and denoiser.spec.guidance_scale == 1


def test_a_class_that_diffusers_has_renamed_is_the_present_one(tmp_path: Path) -> None:
    """Published DiT and PixArt are saved as a Transformer2DModel."""
    part = tiny_transformer_folder(tmp_path, "DiTTransformer2DModel") / "transformer"
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    old = {**config, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    (part / "config.json").write_text(json.dumps(old), encoding="utf-8")
    denoiser = open_denoiser(part, Additions(scheduler=part.parent / "scheduler"))
    assert denoiser.spec.config["_class_name"] == "DiTTransformer2DModel"
    assert list(denoiser.conditions.arrays) == ["class_labels"]


def test_a_class_whose_pipeline_may_scale_timesteps_is_refused_beside_it(tmp_path: Path) -> None:
    folder = tiny_transformer_folder(tmp_path, "SD3Transformer2DModel")
    arrays = tiny_transformer_conditions(tmp_path / "c.npz", "SD3Transformer2DModel")
    opened = Additions(conditions=arrays)
    index, config = folder / "model_index.json", folder / "transformer" / "config.json"
    index.write_text(json.dumps({"_class_name": "AuraFlowPipeline"}), encoding="utf-8")
    assert open_denoiser(folder, opened).spec.sampled
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("SD3Transformer", "AuraFlowTransformer"), encoding="utf-8")
    with pytest.raises(UsageError, match="does not know how AuraFlowPipeline calls its"):
        open_denoiser(folder, opened)


def test_pixart_takes_the_image_size_where_its_configuration_says_so(tmp_path: Path) -> None:
    # The three sizes share the width among them.
    sized = {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24}
    folder = tiny_transformer_folder(tmp_path, "PixArtTransformer2DModel", **sized)
    with pytest.raises(
        UsageError, match=r"resolution: float32 \[rows, 2\]; aspect_ratio: float32 \[rows, 1\]"
    ):
        open_denoiser(folder)
    text = dict(
        np.load(tiny_transformer_conditions(tmp_path / "c.npz", "PixArtTransformer2DModel"))
    )
    sizes = {
        "resolution": np.full((3, 2), 16, np.float32),
        "aspect_ratio": np.ones((3, 1), np.float32),
    }
    np.savez(tmp_path / "d.npz", **text, **sizes)
    denoiser = open_denoiser(folder, Additions(conditions=tmp_path / "d.npz"))
    assert export_denoiser(denoiser, tmp_path / "export").max_relative_error < 1e-5


def test_a_denoiser_that_nobody_listed_is_called_as_its_signature_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    model.save_pretrained(tmp_path / "aura", safe_serialization=True)
    folder = tiny_transformer_folder(tmp_path, "SD3Transformer2DModel")
    text = np.random.default_rng(0).standard_normal((3, 6, 12), np.float32)
    np.savez(tmp_path / "c.npz", encoder_hidden_states=text)
    denoiser = open_denoiser(
        tmp_path / "aura", Additions(scheduler=folder, conditions=tmp_path / "c.npz")
    )
    assert denoiser.spec.sample.shape == (4, 8, 8) and "signature" in denoiser.notes[0]
    assert [item.name for item in denoiser.spec.conditions] == ["encoder_hidden_states"]
    # The embedding takes the sine of 1000 times the timestep: a last digit of 1e6 shows.
    assert export_denoiser(denoiser, tmp_path / "export").max_relative_error < 1e-2
    np.savez(tmp_path / "d.npz", encoder_hidden_state=text)
    with pytest.raises(UsageError, match="not an input of the model"):
        open_denoiser(tmp_path / "aura", Additions(scheduler=folder, conditions=tmp_path / "d.npz"))
    # It calls its text optional, and fails without it.
    with pytest.raises(
        ModelError, match=r"AuraFlowTransformer2DModel cannot be run in PyTorch .*--conditions"
    ):
        export_denoiser(
            open_denoiser(tmp_path / "aura", Additions(scheduler=folder)), tmp_path / "without"
        )


def test_a_class_that_keeps_parts_in_float32_is_loaded_and_so_is_video(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 8,
        "ffn_dim": 32,
        "freq_dim": 32,
    }
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=4,
        out_channels=4,
        num_layers=1,
        rope_max_seq_len=16,
        **sizes,
    )
    assert model._keep_in_fp32_modules
    model.save_pretrained(tmp_path / "wan", safe_serialization=True)
    np.savez(
        tmp_path / "c.npz",
        encoder_hidden_states=np.random.default_rng(0).standard_normal((3, 6, 8), np.float32),
    )
    folder = tiny_transformer_folder(tmp_path, "SD3Transformer2DModel")
    with pytest.raises(UsageError, match="sample_size") as caught:
        open_denoiser(tmp_path / "wan", Additions(scheduler=folder, conditions=tmp_path / "c.npz"))
    assert "[frames, height, width]" in caught.value.hint
    config = tmp_path / "wan" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "sample_size": [2, 8, 8]}),
        encoding="utf-8",
    )
    denoiser = open_denoiser(
        tmp_path / "wan", Additions(scheduler=folder, conditions=tmp_path / "c.npz")
    )
    assert denoiser.spec.sample.shape == (4, 2, 8, 8)
    assert export_denoiser(denoiser, tmp_path / "export").max_relative_error < 1e-3


def test_linear_attention_keeps_what_it_adds_to_its_divisor(tmp_path: Path) -> None:
    """Sana divides by a sum of rectified products plus 1e-15: of few channels, some sums are 0."""
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 4, "num_attention_heads": 2, "num_cross_attention_heads": 2}
    sizes |= {"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8}
    model = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, sample_size=16, **sizes
    )
    model.save_pretrained(tmp_path / "sana", safe_serialization=True)
    folder = tiny_transformer_folder(tmp_path, "SD3Transformer2DModel")
    np.savez(
        tmp_path / "c.npz",
        encoder_hidden_states=np.random.default_rng(0).standard_normal((3, 6, 8), np.float32),
    )
    denoiser = open_denoiser(
        tmp_path / "sana", Additions(scheduler=folder, conditions=tmp_path / "c.npz")
    )
    assert export_denoiser(denoiser, tmp_path / "export").max_relative_error < 1e-4


def test_what_is_no_denoiser_is_refused(tmp_path: Path) -> None:
    folder = tiny_transformer_folder(tmp_path, "DiTTransformer2DModel", vae=True)
    with pytest.raises(
        UsageError, match=r"AutoencoderKL, which is not a denoiser.*take a sample and a timestep"
    ):
        open_denoiser(folder / "vae", Additions(scheduler=folder))
    config = folder / "transformer" / "config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace("DiTTransformer2DModel", "DiTTransformer2D"),
        encoding="utf-8",
    )
    with pytest.raises(UsageError, match="Did you mean 'DiTTransformer2DModel'"):
        open_denoiser(folder)
