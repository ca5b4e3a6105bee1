"""A run in the place of a diffusers UNet: the same calls, the same images, clear words for what it cannot take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mpq_deploy  # noqa: E402
from mpq_deploy.errors import ModelError, UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.export import export_denoiser  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.runtime.drop_in import RuntimeUNet, load  # noqa: E402
from mpq_deploy.system.progress import Talk  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    ONE_LEVEL,
    ONE_LEVEL_CLASSES,
    tiny_text_pipeline_folder,
    tiny_unet_folder,
)

TOLERANCE = 2e-4


def exported(folder: Path, out: Path, **options: Any) -> RuntimeUNet:
    out.mkdir(parents=True)
    export_denoiser(open_denoiser(str(folder), Additions(**options)), out, Talk())
    return load(out / "model.onnx")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RuntimeUNet]:
    folder = tiny_unet_folder(tmp_path_factory.mktemp("classes"), **ONE_LEVEL_CLASSES)
    return folder, exported(folder, tmp_path_factory.mktemp("run") / "export")


@pytest.mark.parametrize("xl", [False, True])
def test_a_text_pipeline_gives_the_same_images(tmp_path: Path, xl: bool) -> None:
    pytest.importorskip("transformers")
    folder = tiny_text_pipeline_folder(tmp_path, xl=xl, **ONE_LEVEL)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\n", encoding="utf-8")
    replaced = exported(folder, tmp_path / "run" / "export", prompts=prompts)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def images() -> Any:
        size = {"height": 16, "width": 16}
        generator = torch.Generator().manual_seed(5)
        return pipe(
            "abc", generator=generator, num_inference_steps=3, output_type="np", **size
        ).images

    before = images()
    assert np.ptp(before) > 0.1
    pipe.unet = replaced
    np.testing.assert_allclose(images(), before, atol=TOLERANCE)
    pipe.to("cpu", torch.float32)
    # Another prompt is another image: the conditions arrive.
    replaced.eval()
    assert not np.allclose(
        pipe("xyz", num_inference_steps=3, output_type="np", height=16, width=16).images, before
    )


def test_an_unconditional_pipeline_gives_the_same_images(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path, num_class_embeds=None, **ONE_LEVEL_CLASSES)
    pipe = diffusers.DDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    before, after = (
        pipe(
            batch_size=2,
            generator=torch.Generator().manual_seed(5),
            num_inference_steps=4,
            output_type="np",
        ).images
        for pipe.unet in (pipe.unet, exported(folder, tmp_path / "run" / "export"))
    )
    assert np.ptp(before) > 0.1
    np.testing.assert_allclose(after, before, atol=TOLERANCE)


def test_it_answers_like_the_unet(classes: tuple[Path, RuntimeUNet]) -> None:
    folder, replaced = classes
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    for key in ("in_channels", "sample_size", "num_class_embeds"):
        assert getattr(replaced.config, key) == getattr(unet.config, key)
    sample, label = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    times = torch.tensor([10, 400, 900])
    with torch.no_grad():
        expected = unet(sample, 400, class_labels=label).sample
        each = unet(sample, times, class_labels=label).sample
    assert torch.allclose(
        replaced(sample, 400, class_labels=label).sample, expected, atol=TOLERANCE
    )
    tensor = replaced(sample, torch.tensor(400), class_labels=label, return_dict=False)[0]
    assert torch.allclose(tensor, expected, atol=TOLERANCE)
    assert torch.allclose(replaced(sample, times, class_labels=label)[0], each, atol=TOLERANCE)
    # Strided input, half precision: cast on the way in and out.
    turned = sample.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.allclose(
        replaced(turned, 400, class_labels=label).sample, expected, atol=TOLERANCE
    )
    half = replaced(sample.half(), 400, class_labels=label).sample
    assert half.dtype == torch.float16 and torch.allclose(half.float(), expected, atol=2e-2)
    assert replaced.to(torch.float16).dtype == torch.float16
    # As pipelines of latent diffusion ask for it.
    assert next(replaced.parameters()).dtype == torch.float16
    assert replaced.to("cpu", dtype=torch.float32).dtype == torch.float32
    assert replaced.in_channels == unet.config.in_channels


def test_inputs_that_it_does_not_take_or_lacks(classes: tuple[Path, RuntimeUNet]) -> None:
    _, replaced = classes
    sample, label = torch.randn(1, 3, 8, 8), torch.tensor([0])
    replaced(sample, 7, class_labels=label, cross_attention_kwargs=None, added_cond_kwargs={})
    with pytest.raises(UsageError, match="takes no 'mid_block_additional_residual'"):
        replaced(sample, 7, class_labels=label, mid_block_additional_residual=sample)
    with pytest.raises(UsageError, match="needs 'class_labels'"):
        replaced(sample, 7)


@pytest.mark.parametrize(
    ("sample", "timestep", "label", "message"),
    [
        ((2, 3, 16, 16), 7, [0, 1], r"not built for samples of the shape \[3, 16, 16\]"),
        ((0, 3, 8, 8), 7, [], r"The sample has the shape \[0, 3, 8, 8\]"),
        ((2, 3, 8, 8), 7, [0, 1, 2], r"'class_labels' has the shape \[3\]; of 2 samples"),
        ((2, 3, 8, 8), 7, [0, 1.5], "'class_labels' is int64, and 1.5 is not a whole number"),
        ((2, 3, 8, 8), 7, "fox", "'class_labels' is a str: 'fox'"),
        (
            (2, 3, 8, 8),
            torch.tensor([7, 8, 9]),
            [0, 1],
            r"'timestep' has the shape \[3\]; of 2 samples",
        ),
        ((2, 3, 8, 8), "late", [0, 1], "'timestep' is a str"),
        (None, 7, [0, 1], "The sample is a ndarray"),
    ],
)
def test_inputs_that_do_not_fit(
    classes: tuple[Path, RuntimeUNet], sample: Any, timestep: Any, label: Any, message: str
) -> None:
    given = np.zeros((2, 3, 8, 8), np.float32) if sample is None else torch.zeros(sample)
    labels = torch.tensor(label) if isinstance(label, list) else label
    with pytest.raises(UsageError, match=message):
        classes[1](given, timestep, class_labels=labels)


def test_what_onnx_runtime_cannot_run_is_our_error(classes: tuple[Path, RuntimeUNet]) -> None:
    with pytest.raises(ModelError, match="ONNX Runtime failed on inputs of shapes"):
        classes[1](torch.zeros(1, 3, 8, 8), 7, class_labels=torch.tensor([999]))


def test_what_cannot_be_opened_says_why(classes: tuple[Path, RuntimeUNet], tmp_path: Path) -> None:
    folder, _ = classes
    with pytest.raises(UsageError, match="There is no"):
        mpq_deploy.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="says what it takes"):
        mpq_deploy.load(folder)
    with pytest.raises(UsageError, match="no backend 'onnxruntim'"):
        mpq_deploy.load(folder, backend="onnxruntim")
