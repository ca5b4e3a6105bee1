"""Parts of a pipeline without timesteps: a VAE's decoder and text encoders, with inputs as the pipeline makes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.export import export_denoiser  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from tests.tiny_models import tiny_text_pipeline_folder, tiny_transformer_folder  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_pipeline_folder(tmp_path_factory.mktemp("text"))


def test_a_decoder_gets_samples_of_the_float_denoiser(text: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\n", encoding="utf-8")
    vae = open_denoiser(text, Additions(component="vae", component_samples=8, prompts=prompts))
    assert (
        vae.spec.timestep is None
        and vae.spec.calibration_rows == 6
        and vae.spec.pixel_range == (-1, 1)
    )
    rows = vae.conditions.arrays["latent_sample"]
    assert rows.shape == (8, 4, 8, 8) and "samples of the float denoiser" in vae.notes[0]
    assert len(np.unique(rows.reshape(8, -1), axis=0)) == 8
    assert export_denoiser(vae, tmp_path / "export").max_relative_error < 1e-4
    # The scaling factor is not part of the graph: its input is what vae.decode takes.
    with torch.no_grad():
        expected = vae.network.module.decode(torch.from_numpy(rows[:2])).sample.numpy()  # type: ignore[attr-defined]
    np.testing.assert_allclose(
        vae.network.reference({"latent_sample": rows[:2]}), expected, atol=1e-6
    )


def test_without_a_denoiser_it_gets_noise_and_says_so(text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text, tmp_path / "alone"))
    shutil.rmtree(folder / "unet")
    vae = open_denoiser(folder, Additions(component="vae", component_samples=8))
    assert "standard normal latents, as there is no denoiser" in vae.notes[0]
    # 0.18215: AutoencoderKL's scaling factor.
    assert abs(float(vae.conditions.arrays["latent_sample"].std()) * 0.18215 - 1) < 0.05


@pytest.mark.parametrize("xl", [False, True])
def test_a_text_encoder_gets_the_prompts(tmp_path: Path, xl: bool) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, xl=xl)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\nghi\n", encoding="utf-8")
    encoder = open_denoiser(folder, Additions(component="text_encoder", prompts=prompts))
    assert sorted(encoder.spec.labels) == ["(empty prompt)", "abc", "def", "ghi"]
    assert encoder.spec.sample.dtype == "int64" and encoder.spec.calibration_rows == 3
    assert ("last hidden layer but one" in encoder.notes[0]) == xl
    assert export_denoiser(encoder, tmp_path / "export").max_relative_error < 1e-4
    # The states are those that the denoiser is calibrated with.
    unet = open_denoiser(folder, Additions(prompts=prompts))
    states = encoder.network.reference(encoder.conditions.arrays)
    of_unet = unet.conditions.arrays["encoder_hidden_states"][..., : states.shape[-1]]
    for label, row in zip(encoder.spec.labels, states, strict=True):
        np.testing.assert_allclose(row, of_unet[unet.spec.labels.index(label)], atol=1e-5)


def test_what_cannot_be_a_component_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"'text_encoder_2' of .* cannot be quantized\. Did you mean 'text_encoder'",
    ):
        open_denoiser(text, Additions(component="text_encoder_2"))
    with pytest.raises(UsageError, match="Here: unet, vae, text_encoder"):
        open_denoiser(text, Additions(component="scheduler"))
    with pytest.raises(UsageError, match="has no vae/"):
        open_denoiser(
            tiny_transformer_folder(tmp_path, "DiTTransformer2DModel"), Additions(component="vae")
        )
    with pytest.raises(UsageError, match=r"has no model_index\.json"):
        open_denoiser(text / "unet", Additions(component="vae"))
