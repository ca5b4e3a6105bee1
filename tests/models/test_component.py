"""Parts of a pipeline without timesteps: a VAE's decoder and text encoders, with inputs as the pipeline makes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from mpq_deploy.errors import ModelError, UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.component import parted  # noqa: E402
from mpq_deploy.models.export import export_denoiser  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.recipe import Recipe  # noqa: E402
from mpq_deploy.stages.export import inputs as export_inputs  # noqa: E402
from tests.tiny_models import tiny_text_pipeline_folder  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_pipeline_folder(tmp_path_factory.mktemp("text"))


def test_a_decoder_gets_what_the_pipeline_decodes(text: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\n", encoding="utf-8")
    vae = open_denoiser(text, Additions(component="vae", component_samples=8, prompts=prompts))
    assert (
        vae.spec.timestep is None
        and vae.spec.calibration_rows == 6
        and vae.spec.pixel_range == (-1, 1)
    )
    rows = vae.conditions.arrays["z"]
    assert rows.shape == (8, 4, 8, 8) and "samples of the float denoiser" in vae.notes[0]
    assert len(np.unique(rows.reshape(8, -1), axis=0)) == 8
    assert set(vae.spec.labels) == {"abc", "def"}
    assert export_denoiser(vae, tmp_path / "export").max_relative_error < 1e-4
    # The scaling factor is not part of the graph: its input is what vae.decode takes.
    with torch.no_grad():
        expected = vae.network.module.decode(torch.from_numpy(rows[:2])).sample.numpy()  # type: ignore[attr-defined]
    np.testing.assert_allclose(vae.network.reference({"z": rows[:2]}), expected, atol=1e-6)


def test_a_decoder_gets_latents_of_the_recipes_steps(text: Path, tmp_path: Path) -> None:
    """A model of few steps ends in other latents than twenty steps of it."""
    rows = []
    for steps, call in ((2, {}), (20, {"num_inference_steps": 2})):
        content = [{"prompt": prompt, **call} for prompt in ("abc", "def")]
        (tmp_path / "calls.yaml").write_text(json.dumps(content), encoding="utf-8")
        wanted = Additions(component="vae", component_samples=2, call=tmp_path / "calls.yaml")
        vae = open_denoiser(text, replace(wanted, component_steps=steps))
        rows.append(vae.conditions.arrays["z"])
    np.testing.assert_array_equal(rows[0], rows[1])
    settings = Recipe(model=str(text), component="vae")
    stage: Any = SimpleNamespace(recipe=settings, path=Path("run"))
    usual = export_inputs(stage)
    few = settings.calibrate.model_copy(update={"steps": 2})
    stage.recipe = settings.model_copy(update={"calibrate": few})
    assert {**usual, "recipe.calibrate.steps": 2} == export_inputs(stage)


def test_a_decoder_that_is_given_the_picture_it_repaints_has_an_output_of_its_own(
    text: Path, tmp_path: Path
) -> None:
    """Its inputs are called image and mask, as its output otherwise is."""
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)}
    kinds = {
        f"{one}_block_types": (f"{one.title()}{of}coderBlock2D",) * 2
        for one, of in (("down", "En"), ("up", "De"))
    }
    vae = diffusers.AsymmetricAutoencoderKL(**blocks, **kinds, norm_num_groups=4)
    parts = {**diffusers.StableDiffusionPipeline.from_pretrained(text).components, "vae": vae}
    pipeline = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "pipeline", safe_serialization=True)
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(tmp_path / "a.png")
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / "b.png")
    call = {"prompt": "abc", "image": "a.png", "mask_image": "b.png", "num_inference_steps": 2}
    (tmp_path / "call.yaml").write_text(
        json.dumps({**call, "height": 16, "width": 16}), encoding="utf-8"
    )
    wanted = Additions(component="vae", component_samples=2, call=tmp_path / "call.yaml")
    decoder = open_denoiser(tmp_path / "pipeline", wanted)
    assert [one.name for one in decoder.spec.inputs] == ["z", "image", "mask"]
    assert decoder.spec.output == "decoded_image"
    assert export_denoiser(decoder, tmp_path / "export").max_relative_error < 1e-4


def test_states_and_the_pooled_vector_are_one_output_and_two_more(tmp_path: Path) -> None:
    """Joined with equal weight, as transformers gives them."""
    import onnxruntime as ort

    folder = tiny_text_pipeline_folder(tmp_path, xl=True)
    (tmp_path / "prompts.txt").write_text("abc\ndef\nghi\n", encoding="utf-8")
    wanted = Additions(component="text_encoder_2", prompts=tmp_path / "prompts.txt")
    encoder = open_denoiser(folder, wanted)
    assert export_denoiser(encoder, tmp_path / "export").max_relative_error < 1e-4
    ids = encoder.conditions.arrays["input_ids"]
    with torch.no_grad():
        own = encoder.network.module(torch.from_numpy(ids), output_hidden_states=True)  # type: ignore[attr-defined]
    session = ort.InferenceSession(str(tmp_path / "export" / "model.onnx"))
    names = [one.name for one in session.get_outputs()]
    assert names == ["states_and_pooled", "hidden_states", "pooled"]
    both, states, pooled = session.run(None, {"input_ids": ids})
    np.testing.assert_allclose(states, own.hidden_states[-2].numpy(), atol=1e-5)
    np.testing.assert_allclose(pooled, own.text_embeds.numpy(), atol=1e-5)
    shares = np.square(both[:, : states[0].size]).sum(), np.square(both[:, states[0].size :]).sum()
    assert shares[0] == pytest.approx(shares[1], rel=0.02)
    parts = parted(
        torch.from_numpy(both), [own.hidden_states[-2], own.text_embeds], encoder.spec.pooled_factor
    )
    for one, other in zip(parts, (states, pooled), strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("xl", [False, True])
def test_a_text_encoder_gets_the_prompts(tmp_path: Path, xl: bool) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, xl=xl)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\nghi\n", encoding="utf-8")
    encoder = open_denoiser(folder, Additions(component="text_encoder", prompts=prompts))
    # Three prompts, and the empty one of guidance, for which SDXL takes zeros.
    assert len(encoder.spec.labels) == (3 if xl else 4) and set(encoder.spec.labels) == {
        "abc",
        "def",
        "ghi",
    }
    assert encoder.spec.sample.dtype == "int64" and encoder.spec.calibration_rows == (
        2 if xl else 3
    )
    assert export_denoiser(encoder, tmp_path / "export").max_relative_error < 1e-4
    # Its output is what the pipeline takes of it: the states that the denoiser is given.
    states = encoder.network.reference(encoder.conditions.arrays)
    given = open_denoiser(folder, Additions(prompts=prompts)).conditions.arrays
    of_unet = given["encoder_hidden_states"][1, :, : states.shape[-1]]
    assert min(float(np.abs(row - of_unet).max()) for row in states) < 1e-5


def test_a_text_encoder_is_opened_without_the_weights_of_the_denoiser(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("the denoiser's weights are loaded")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", refused)
    open_denoiser(text, Additions(component="text_encoder"))
    with pytest.raises(ModelError, match="the denoiser's weights are loaded"):
        open_denoiser(text, Additions(component="vae", component_samples=8))


def test_what_cannot_be_a_component_is_refused(text: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"has no component 'text_encoder_2'\. Did you mean 'text_encoder'",
    ):
        open_denoiser(text, Additions(component="text_encoder_2"))
    with pytest.raises(UsageError, match="Here: unet, vae, text_encoder"):
        open_denoiser(text, Additions(component="scheduler"))
    with pytest.raises(UsageError, match=r"has no model_index\.json"):
        open_denoiser(text / "unet", Additions(component="vae"))
