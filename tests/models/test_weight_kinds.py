"""Weights that are quantized already, adapters that are not merged, and other names: refused by header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.errors import ModelError
from mpq_deploy.models.additions import Additions
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.models.weight_kinds import refuse_other_names, refuse_weights
from tests.tiny_models import tiny_text_pipeline_folder, tiny_unet_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


def no_class(*arguments: Any, **options: Any) -> None:
    raise AssertionError("a class was made")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline folder, after which no model may be made."""
    made = tiny_unet_folder(tmp_path)
    from diffusers import UNet2DModel

    monkeypatch.setattr(UNet2DModel, "from_pretrained", no_class)
    monkeypatch.setattr(UNet2DModel, "from_config", no_class)
    return made


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **entries}), encoding="utf-8")


def change_weights(folder: Path, **tensors: Any) -> None:
    """Add tensors; a name with two underscores for each dot."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    weights |= {name.replace("__", "."): values for name, values in tensors.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.torch
@pytest.mark.parametrize(
    "entries",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "torchao"}},
        {"compression_config": {"format": "int-quantized"}},
    ],
)
def test_a_configuration_that_says_so(folder: Path, entries: dict[str, Any]) -> None:
    change_config(folder / "unet", **entries)
    with pytest.raises(ModelError, match=r"already quantized: its config.json.*Give the float"):
        open_denoiser(folder)
    with pytest.raises(ModelError, match="already quantized"):
        open_denoiser(folder / "unet", Additions(scheduler=folder))


@pytest.mark.torch
def test_an_empty_entry_is_none(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    change_config(folder / "unet", quantization_config=None)
    assert open_denoiser(folder).spec.sample.shape == (3, 8, 8)


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    [
        *(
            "conv_in__weight_scale",
            "conv_in__scale_weight",
            "scaled_fp8",
            "conv_in__weight_scale_inv",
        ),
        *("conv_in__weight__absmax", "conv_in__weight__quant_map", "conv_in__qweight"),
        *(
            "conv_in__weight__quant_state__bitsandbytes__nf4",
            "conv_in__weight._data",
            "conv_in__SCB",
        ),
    ],
)
def test_scales_and_codes_by_name(folder: Path, name: str) -> None:
    import torch

    change_weights(folder / "unet", **{name: torch.ones(1)})
    with pytest.raises(ModelError, match=r"already quantized: 1 of its tensors") as caught:
        open_denoiser(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "uint8", "int8"])
def test_types_that_no_float_weight_has(folder: Path, kind: str) -> None:
    import torch

    change_weights(folder / "unet", conv_in__weight=torch.ones(8, 3, 3, 3).to(getattr(torch, kind)))
    with pytest.raises(ModelError, match=r"such as 'conv_in\.weight'"):
        open_denoiser(folder)


@pytest.mark.torch
def test_a_text_encoder_that_is_quantized(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path)
    change_config(folder / "text_encoder", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match=r"text_encoder is already quantized"):
        open_denoiser(folder)


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    [
        "conv_in__lora_A__default_0__weight",
        "conv_in__base_layer__weight",
        "mid_block__attentions__0__to_q__lora__down__weight",
        "conv_in__lora_magnitude_vector",
    ],
)
def test_an_unfused_lora(folder: Path, name: str) -> None:
    import torch

    change_weights(folder / "unet", **{name: torch.ones(1)})
    with pytest.raises(ModelError, match=r"hold an unfused LoRA: '.*fuse_lora.*save_pretrained"):
        open_denoiser(folder)


@pytest.mark.torch
def test_an_ip_adapter(folder: Path) -> None:
    import torch

    for index in range(3):
        name = f"down_blocks__{index}__attn2__processor__to_k_ip__0__weight"
        change_weights(folder / "unet", **{name: torch.ones(1)})
    with pytest.raises(ModelError, match=r"hold an IP-Adapter: '\S+' and others\. .*unload_ip"):
        open_denoiser(folder)


def test_float_weights_pass(tmp_path: Path) -> None:
    names = ["conv_in.weight", "scale_shift_table", "norm.scale", "explorative.lora_free.weight"]
    refuse_weights(dict.fromkeys(names, "BF16"), tmp_path)
    refuse_weights({"embeddings.position_ids": "I64", "mask": "BOOL"}, tmp_path)


@pytest.mark.parametrize(
    ("unexpected", "said"),
    [
        (["class_embedding.weight"], "does not take: 'class_embedding.weight'"),
        (["motion_modules.0.weight"], r"motion modules\).*AnimateDiff"),
        (["module.conv_in.weight", "module.conv_in.bias"], "Unwrap the model"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "from_single_file"),
    ],
)
def test_what_a_class_does_not_take(unexpected: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        refuse_other_names([], unexpected, "UNet2DModel", tmp_path)


def test_missing_and_unexpected_are_both_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"hold 2 tensors .*'a\.0\.w' and others, and lack 1 that it needs: 'b\.w'"
    ):
        refuse_other_names(["b.w"], ["a.0.w", "a.1.w"], "UNet2DModel", tmp_path)
    refuse_other_names([], [], "UNet2DModel", tmp_path)
