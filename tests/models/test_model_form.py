"""Samples that are no square images, arguments that never change, and timesteps under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mpq_deploy.calls.diffusers_sampler import DiffusersSampler  # noqa: E402
from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.export import export_denoiser, load_exported  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.models.spec import DenoiserSpec, InputSpec  # noqa: E402
from mpq_deploy.models.unet import sample_shape  # noqa: E402
from mpq_deploy.runtime.drop_in import RuntimeUNet  # noqa: E402
from mpq_deploy.runtime.ort import OrtDenoiser  # noqa: E402
from tests.tiny_models import randomize, tiny_flow_scheduler, tiny_scheduler, write_scheduler  # noqa: E402

pytestmark = pytest.mark.torch
ROWS, TOKENS = 3, 5


def saved(
    folder: Path, model: Any, scheduler: dict[str, Any], config: dict[str, Any], **arrays: Any
) -> tuple[Path, Additions]:
    """Write ``model`` with further entries in its configuration; return the arguments of ``open_denoiser``."""
    randomize(model).save_pretrained(folder / "model", safe_serialization=True)
    path = folder / "model" / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}), encoding="utf-8"
    )
    write_scheduler(folder, scheduler)
    if not arrays:
        return folder / "model", Additions(scheduler=folder)
    np.savez(folder / "c.npz", **arrays)
    return folder / "model", Additions(folder / "c.npz", folder)


def random(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def tiny_ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=16,
    )


def ltx(folder: Path, **entries: Any) -> tuple[Path, Additions]:
    video = {
        "sample_shape": [2 * 4 * 3, 8],
        "forward_arguments": {"num_frames": 2, "height": 4, "width": 3},
    }
    mask = np.ones((ROWS, TOKENS), np.float32)
    text = {"encoder_hidden_states": random(ROWS, TOKENS, 16), "encoder_attention_mask": mask}
    return saved(folder, tiny_ltx(), tiny_flow_scheduler(), {**video, **entries}, **text)


def test_tokens_with_arguments_that_never_change(tmp_path: Path) -> None:
    denoiser = open_denoiser(*ltx(tmp_path))
    assert denoiser.spec.sample.shape == (24, 8)
    assert export_denoiser(denoiser, tmp_path / "export").max_relative_error < 1e-3
    exported = load_exported(tmp_path / "export")
    given = {name: values[:2] for name, values in denoiser.conditions.arrays.items()}
    sample = random(2, 24, 8)
    found = OrtDenoiser(exported.model, exported.spec)(sample, 400.0, given)
    with torch.no_grad():
        expected = denoiser.network.module(  # type: ignore[attr-defined]
            torch.from_numpy(sample),
            timestep=torch.full((2,), 400.0),
            num_frames=2,
            height=4,
            width=3,
            return_dict=False,
            **{name: torch.from_numpy(values) for name, values in given.items()},
        )[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_an_argument_that_the_forward_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'frames'") as caught:
        open_denoiser(*ltx(tmp_path, forward_arguments={"frames": 2}))
    assert "num_frames" in caught.value.hint


def test_vectors(tmp_path: Path) -> None:
    model = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        embedding_dim=16,
        num_embeddings=TOKENS,
        additional_embeddings=4,
    )
    arrays = {"proj_embedding": random(ROWS, 16), "encoder_hidden_states": random(ROWS, TOKENS, 16)}
    arrays["attention_mask"] = np.ones((ROWS, TOKENS), bool)
    denoiser = open_denoiser(
        *saved(tmp_path, model, tiny_scheduler(), {"sample_shape": [16]}, **arrays)
    )
    assert denoiser.spec.sample.shape == (16,)
    assert export_denoiser(denoiser, tmp_path / "export").max_relative_error < 1e-3


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"_class_name": "UNet1DModel", "in_channels": 2, "sample_size": 64}, (2, 64)),
        ({"_class_name": "UNet2DModel", "sample_size": 8}, (3, 8, 8)),
        (
            {"_class_name": "UNet3DConditionModel", "in_channels": 4, "sample_size": [2, 8, 6]},
            (4, 2, 8, 6),
        ),
        (
            {"_class_name": "CogVideoXTransformer3DModel", "sample_shape": [2, 4, 8, 8]},
            (2, 4, 8, 8),
        ),
    ],
)
def test_the_shape_of_a_sample(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert sample_shape(config, Path("m")) == shape


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"_class_name": "UNet3DConditionModel", "in_channels": 4, "sample_size": 8},
            "names no frames",
        ),
        ({"_class_name": "UNet2DModel"}, "sample_size"),
        ({"_class_name": "UNet2DModel", "sample_shape": [4, 0]}, r"\[4, 0\]"),
        ({"_class_name": "UNet2DModel", "sample_shape": "4, 8, 8"}, "4, 8, 8"),
    ],
)
def test_a_shape_that_is_none_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        sample_shape(config, Path("m"))
    assert "[" in caught.value.hint


def test_a_timestep_of_another_name(tmp_path: Path) -> None:
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    model = diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=1,
        conditioning_dim=16,
        block_out_channels=(16,),
        num_attention_heads=(2,),
        down_num_layers_per_block=(1,),
        up_num_layers_per_block=(1,),
        down_blocks_repeat_mappers=(1,),
        up_blocks_repeat_mappers=(1,),
        block_types_per_layer=(blocks,),
        clip_text_pooled_in_channels=12,
        clip_seq=2,
        switch_level=(),
    )
    scheduler = {"_class_name": "DDPMWuerstchenScheduler"}
    text = random(ROWS, 1, 12)
    denoiser = open_denoiser(
        *saved(tmp_path, model, scheduler, {"sample_size": 4}, clip_text_pooled=text)
    )
    assert denoiser.spec.timestep_name == "timestep_ratio"
    # Its scheduler steps with one timestep per sample, and counts none of training.
    with pytest.raises(UsageError, match="DDPMWuerstchenScheduler") as caught:
        DiffusersSampler(scheduler, 4, 0)
    assert "--scheduler" in caught.value.hint


def test_what_gives_no_sample_is_named(tmp_path: Path) -> None:
    from mpq_deploy.errors import ModelError

    model = diffusers.ControlNetModel(
        in_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 4, 4, 4),
    )
    arrays = {
        "encoder_hidden_states": random(ROWS, TOKENS, 8),
        "controlnet_cond": random(ROWS, 3, 64, 64),
    }
    denoiser = open_denoiser(
        *saved(tmp_path, model, tiny_scheduler(), {"sample_size": 8}, **arrays)
    )
    with pytest.raises(ModelError, match="gives lists of tensors"):
        export_denoiser(denoiser, tmp_path / "export")


class Echo:
    """A backend that keeps what it is fed."""

    name, device = "echo", torch.device("cpu")

    def __call__(self, feeds: Any) -> Any:
        self.feeds = feeds
        return feeds["sample"]


def test_the_replacement_takes_the_timestep_by_the_models_own_name() -> None:
    spec = DenoiserSpec(
        name="m",
        source="m",
        sample=InputSpec(name="sample", shape=(4,)),
        timestep=InputSpec(name="timestep_ratio", shape=(1,)),
        scheduler={},
        config={"forward_arguments": {"num_frames": 2}},
    )
    backend = Echo()
    unet = RuntimeUNet(spec, backend)
    for named in ({"timestep_ratio": torch.tensor(0.5)}, {"timestep": torch.full((3,), 0.5)}):
        unet(torch.zeros(3, 4), num_frames=2, return_dict=False, **named)
        assert (
            backend.feeds["timestep_ratio"].tolist() == [[0.5]] * 3
            and "num_frames" not in backend.feeds
        )
