"""Prompts through the T5 and CLIP encoders of transformer pipelines, against what diffusers' own pipelines make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from mpq_deploy.errors import ModelError, UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    TEXT_PIPELINES,
    tiny_text_transformer_folder,
    tiny_transformer_folder,
    write_t5,
)

pytestmark = pytest.mark.torch
PROMPTS = ("a bc", "Defghi J")
PIXART, SD3, FLUX = TEXT_PIPELINES


def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def opened(folder: Path, **options: Any) -> Any:
    return open_denoiser(folder, Additions(prompts=prompts_file(folder.parent), **options))


def of_the_pipeline(folder: Path) -> dict[str, Any]:
    """What the pipeline's own encode_prompt makes of the prompts and the empty one, by the denoiser's inputs."""
    absent = (
        {}
        if (folder / "text_encoder_3").is_dir()
        else {"text_encoder_3": None, "tokenizer_3": None}
    )
    three = "text_encoder_3" in (folder / "model_index.json").read_text(encoding="utf-8")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **(absent if three else {}))
    texts = [*PROMPTS, ""]
    with torch.no_grad():
        if "PixArt" in type(pipe).__name__:
            # As its call does, which leaves cleaning out where its two libraries are not installed.
            made = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": made[0], "encoder_attention_mask": made[1]}
        if isinstance(pipe, diffusers.FluxPipeline):
            states, pooled, _ = pipe.encode_prompt(texts)
        else:
            made = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
            states, pooled = made[0], made[2]
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


# Only Stable Diffusion 3 runs without its T5.
@pytest.mark.parametrize(
    ("class_name", "t5"), [(PIXART, True), (SD3, True), (SD3, False), (FLUX, True)]
)
def test_the_conditions_are_those_of_the_pipeline(
    tmp_path: Path, class_name: str, t5: bool
) -> None:
    folder = tiny_text_transformer_folder(tmp_path, class_name, t5=t5)
    denoiser = opened(folder)
    arrays, expected = denoiser.conditions.arrays, of_the_pipeline(folder)
    for name, values in expected.items():
        np.testing.assert_allclose(arrays[name], values.float().numpy(), atol=1e-5, err_msg=name)
    assert set(arrays) - set(expected) == ({"guidance"} if class_name == FLUX else set())
    assert denoiser.spec.labels == (*PROMPTS, "(empty prompt)")
    # A tokenizer's own limit does not shorten T5's tokens; CLIP's are limited by it.
    tokens = {PIXART: 300, SD3: 8 + 256, FLUX: 512}[class_name]
    assert arrays["encoder_hidden_states"].shape[1] == tokens
    # Prompts are told apart.
    states = arrays["encoder_hidden_states"]
    assert not np.allclose(states[0], states[1]) and not np.allclose(states[0], states[2])


def test_pixart_alpha_has_fewer_tokens_than_sigma(tmp_path: Path) -> None:
    folder = tiny_text_transformer_folder(tmp_path, PIXART, pipeline="PixArtAlphaPipeline")
    arrays, expected = opened(folder).conditions.arrays, of_the_pipeline(folder)
    assert arrays["encoder_hidden_states"].shape[1] == 120
    for name, values in expected.items():
        np.testing.assert_allclose(arrays[name], values.float().numpy(), atol=1e-5, err_msg=name)


def test_pixart_is_told_the_images_size_in_pixels(tmp_path: Path) -> None:
    sized = {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24}
    folder = tiny_text_transformer_folder(tmp_path, PIXART, **sized)
    arrays = opened(folder).conditions.arrays
    # 8 x 8 latents, of which the decoder makes 16 x 16 pixels.
    np.testing.assert_array_equal(arrays["resolution"], np.full((3, 2), 16))
    np.testing.assert_array_equal(arrays["aspect_ratio"], np.ones((3, 1)))


def test_flux_is_told_a_guidance_and_is_not_guided_again(tmp_path: Path) -> None:
    folder = tiny_text_transformer_folder(tmp_path, FLUX)
    usual, chosen = opened(folder), opened(folder, guidance_scale=2.0)
    np.testing.assert_array_equal(usual.conditions.arrays["guidance"], np.full(3, 3.5))
    np.testing.assert_array_equal(chosen.conditions.arrays["guidance"], np.full(3, 2.0))
    assert usual.spec.guidance_scale == chosen.spec.guidance_scale == 1.0
    # Without the guidance's embedding (schnell) there is no such input.
    plain = tiny_text_transformer_folder(tmp_path / "plain", FLUX, guidance_embeds=False)
    assert {item.name for item in opened(plain).spec.conditions} == {
        "encoder_hidden_states",
        "pooled_projections",
    }


def test_encoders_that_do_not_fit_their_denoiser_are_named(tmp_path: Path) -> None:
    folder = tiny_text_transformer_folder(tmp_path, SD3)
    write_t5(folder, "_3", 16, 0)
    with pytest.raises(ModelError, match=r"T5 of .* gives 16 values per token, not 12"):
        opened(folder)
    flux = tiny_text_transformer_folder(tmp_path, FLUX, t5=False)
    with pytest.raises(
        UsageError,
        match=r"no CLIP text encoder, or no T5.*pooled_projections: float32 \[rows, 10\]",
    ):
        opened(flux)
    bare = tiny_transformer_folder(tmp_path / "bare", SD3)
    with pytest.raises(UsageError, match=r"Missing: conditions: --conditions FILE.npz"):
        opened(bare)
