"""Several sizes of one pipeline: images of each beside those of diffusers, and one outside refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mpq_deploy.cli import app
from mpq_deploy.delivery.generation import write_generation
from mpq_deploy.models.pipeline_graphs import export_pipeline
from mpq_deploy.system.quantities import ImageSize, ImageSizes
from tests.device.generate.folders import same_noise, tiny_folder
from tests.device.generate.test_generator import CLOSE, PROMPT, generator_of, pipeline_of

pytestmark = [pytest.mark.slow, pytest.mark.torch]
SIZES = ImageSizes.parse("16x16,24x16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Stable Diffusion, and its generation folder of two sizes."""
    place = tmp_path_factory.mktemp("sizes")
    folder = tiny_folder(place, "sd")
    files = export_pipeline(folder, "sd", place / "graphs", images=True, sizes=SIZES)
    write_generation(folder, files, place / "generation", sizes=SIZES)
    return folder, place / "generation"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("task", ["", "image"])
def test_images_of_each_size_are_diffusers_own(
    folders: tuple[Path, Path], size: ImageSize, task: str
) -> None:
    source, folder = folders
    values = np.random.default_rng(4).integers(0, 256, (size.height, size.width, 3), np.uint8)
    picture = Image.fromarray(values)
    shape = {"width": size.width, "height": size.height}
    theirs: dict[str, Any] = {"image": picture, "strength": 0.6} if task else shape
    ours = {
        **({"image": picture, "strength": 0.6} if task else {}),
        "size": (size.width, size.height),
    }
    with same_noise():
        expected = pipeline_of(source, None, task)(
            PROMPT, num_inference_steps=5, guidance_scale=4.0, output_type="np", **theirs
        ).images
    (made,) = generator_of(folder, None)(PROMPT, steps=5, guidance=4.0, **ours)
    assert made.array.shape == (size.height, size.width, 3)
    np.testing.assert_allclose(made.array, expected[0], atol=CLOSE)
    assert np.ptp(expected) > 0.05


def test_a_range_makes_every_size_in_its_steps(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = folders
    sizes = ImageSizes.parse("16x16:32x16:8")
    files = export_pipeline(source, "sd", tmp_path / "graphs", sizes=sizes)
    folder = tmp_path / "generation"
    written = write_generation(source, files, folder, sizes=sizes)
    assert (written.size_step, written.sizes) == (8, ((16, 16), (32, 16)))
    with same_noise():
        (expected,) = pipeline_of(source, None, "")(
            PROMPT, num_inference_steps=5, guidance_scale=4.0, output_type="np", width=24, height=16
        ).images
    (made,) = generator_of(folder, None)(PROMPT, steps=5, guidance=4.0, size=(24, 16))
    np.testing.assert_allclose(made.array, expected, atol=CLOSE)
    for size in ("20x16", "40x16", "24x24"):
        options = ["-p", "a", "--size", size, "-o", str(tmp_path / "a.png")]
        found = CliRunner().invoke(app, ["generate", str(folder), *options])
        said = f"{found.exception} {getattr(found.exception, 'hint', '')}"
        assert found.exit_code != 0 and f"makes no images of {size}" in said
        assert "every size from 16x16 to 32x16 in steps of 8" in said


def test_images_of_packed_latents_have_the_positions_of_their_size(tmp_path: Path) -> None:
    source, sizes = tiny_folder(tmp_path, "flux"), ImageSizes.parse("16x16,32x16,16x32")
    files = export_pipeline(source, "flux", tmp_path / "graphs", sizes=sizes)
    write_generation(source, files, tmp_path / "generation", sizes=sizes)
    generator = generator_of(tmp_path / "generation", None)
    pipe, images = pipeline_of(source, None, ""), []
    for size in sizes.listed[1:]:
        with same_noise():
            (expected,) = pipe(
                *(PROMPT,),
                num_inference_steps=3,
                output_type="np",
                width=size.width,
                height=size.height,
            ).images
        (made,) = generator(PROMPT, steps=3, size=(size.width, size.height))
        np.testing.assert_allclose(made.array, expected, atol=CLOSE)
        images.append(made.array)
    assert np.abs(images[0].transpose(1, 0, 2) - images[1]).max() > 10 * CLOSE


def test_another_size_is_refused_with_the_list(folders: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["-p", "a", "--size", "16x24", "-o", str(tmp_path / "a.png")]
    found = CliRunner().invoke(app, ["generate", str(folders[1]), *options])
    assert found.exit_code != 0 and not (tmp_path / "a.png").exists()
    assert "makes no images of 16x24" in found.stderr + str(found.exception)
    assert "16x16, 24x16" in found.stderr + str(found.exception) + str(
        getattr(found.exception, "hint", "")
    )
