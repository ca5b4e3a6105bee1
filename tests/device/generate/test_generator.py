"""Images of ``Generator`` beside those of diffusers' own pipelines, from the same noise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from typer.testing import CliRunner

from mpq_deploy.calls.pipeline_runs import open_picture
from mpq_deploy.cli import app
from mpq_deploy.delivery.generation import _class_defaults, write_generation
from mpq_deploy.device.generate.generator import Generator, Wish
from mpq_deploy.device.generate.graph_runner import PartMemoryError
from mpq_deploy.device.generate.image_arrays import read_picture
from mpq_deploy.errors import InputError, ModelError, UsageError
from mpq_deploy.system.progress import Talk
from tests.device.generate.folders import SameNoise, same_noise, written

pytestmark = [pytest.mark.slow, pytest.mark.torch]
PROMPT, NEGATIVE = "a cat", "b d"
CLOSE = 1e-3
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folders of a kind."""
    return cache(lambda kind: written(tmp_path_factory, kind)[:2])


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3", "flux"])
def folders(request: pytest.FixtureRequest, of_kind: Any) -> Any:
    return request.param, *of_kind(request.param)


@pytest.fixture(scope="module")
def plain(of_kind: Any) -> Path:
    """A Stable Diffusion folder, for what does not depend on the kind."""
    return of_kind("sd")[1]


def pipeline_of(folder: Path, config: dict[str, Any] | None, task: str = "") -> Any:
    kind = {
        "": diffusers.DiffusionPipeline,
        "image": diffusers.AutoPipelineForImage2Image,
        "paint": diffusers.AutoPipelineForInpainting,
    }[task]
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if config is not None:
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    return pipe


def generator_of(folder: Path, config: dict[str, Any] | None) -> Generator:
    generator = Generator(folder, threads=1)
    generator.noise_for = lambda seed: SameNoise()
    if config is not None:
        from mpq_deploy.device.generate.schedulers import scheduler_from_config

        generator.scheduler = scheduler_from_config(config)
    return generator


SCHEDULERS: list[dict[str, Any] | None] = [
    None,
    {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1, **BETAS},
    {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, **BETAS},
    {"_class_name": "UniPCMultistepScheduler", **BETAS},
    {"_class_name": "LCMScheduler", **BETAS},
]


def configs(kind: str) -> list[dict[str, Any] | None]:
    """The pipeline's own scheduler; others of its kind."""
    if kind in ("sd", "sdxl"):
        return SCHEDULERS
    dynamic = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    # Flux draws 1024 tokens at its default size: one scheduler is enough.
    return [None] if kind == "flux" else [None, dynamic]


def test_text_to_image_is_diffusers_own(folders: Any) -> None:
    kind, source, folder = folders
    for config in configs(kind):
        for negative in (None, NEGATIVE) if kind != "flux" else (None,):
            size = generator_of(folder, config).generation.sizes[0]
            given = {"negative_prompt": negative} if negative else {}
            with same_noise():
                pipe = pipeline_of(source, config)
                expected = pipe(
                    PROMPT,
                    num_inference_steps=4,
                    guidance_scale=4.0,
                    width=size[0],
                    height=size[1],
                    output_type="np",
                    num_images_per_prompt=2,
                    **given,
                ).images
            made = generator_of(folder, config)(
                PROMPT, negative=negative, steps=4, guidance=4.0, count=2, batch=2
            )
            for one, other in zip(made, expected, strict=True):
                np.testing.assert_allclose(one.array, other, atol=CLOSE)
    assert np.ptp(expected) > 0.05


@pytest.fixture
def picture(folders: Any) -> Image.Image:
    size = generator_of(folders[2], None).generation.sizes[0]
    values = np.random.default_rng(4).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def mask(picture: Image.Image) -> Image.Image:
    values = np.zeros(picture.size[::-1], np.uint8)
    values[: picture.height // 2] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("task", ["image", "paint"])
def test_images_from_images_are_diffusers_own(
    folders: Any, picture: Image.Image, mask: Image.Image, task: str, strength: float
) -> None:
    kind, source, folder = folders
    if kind not in ("sd", "sdxl"):
        pytest.skip("text to image alone")
    for config in SCHEDULERS[:4]:
        given = {"mask_image": mask} if task == "paint" else {}
        with same_noise():
            expected = pipeline_of(source, config, task)(
                PROMPT,
                image=picture,
                strength=strength,
                num_inference_steps=5,
                guidance_scale=3.0,
                output_type="np",
                **({"width": picture.width, "height": picture.height} if given else {}),
                **given,
            ).images
        made = generator_of(folder, config)(
            PROMPT,
            steps=5,
            guidance=3.0,
            image=picture,
            strength=strength,
            mask=mask if given else None,
        )
        np.testing.assert_allclose(made[0].array, expected[0], atol=CLOSE)


VAE_FIELDS = {
    "shift_factor": 0.3,
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 0.5, 3.0],
}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_latents_are_shifted_where_diffusers_does(kind: str, of_kind: Any, tmp_path: Path) -> None:
    """SDXL's pipelines look at mean and spread, but for what they paint into; others do not."""
    source, folder = (shutil.copytree(one, tmp_path / one.name) for one in of_kind(kind))
    for file in (source / "vae" / "config.json", folder / "generation.json"):
        read = json.loads(file.read_text(encoding="utf-8"))
        read.get("vae", read).update(VAE_FIELDS)
        file.write_text(json.dumps(read), encoding="utf-8")
    size = Generator(folder).generation.sizes[0]
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (*size, 3), np.uint8))
    mask = Image.fromarray(np.repeat(np.uint8([[0], [255]]), size[1] // 2, 0).repeat(size[0], 1))
    for task, given in (
        ("", {}),
        ("image", {"image": picture}),
        ("paint", {"image": picture, "mask_image": mask}),
    ):
        strength = {"strength": 0.6} if given else {}
        with same_noise():
            options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
            sides = {} if task == "image" else {"width": size[0], "height": size[1]}
            pipe = pipeline_of(source, None, task)
            expected = pipe(PROMPT, **given, **sides, **strength, **options).images
        ours = {key.removesuffix("_image"): one for key, one in given.items()}
        made = generator_of(folder, None)(PROMPT, steps=4, guidance=3.0, **ours, **strength)
        np.testing.assert_allclose(made[0].array, expected[0], atol=CLOSE)


def test_a_folder_may_have_another_scheduler(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """As a build with --scheduler, and defaults of the calls that it was given."""
    source, _, graphs = written(tmp_path_factory, "sd")
    files = {one.parent.name: one for one in graphs.glob("*/model.onnx")}
    lcm = {"_class_name": "LCMScheduler", **BETAS}
    made = write_generation(source, files, tmp_path / "out", {"steps": 4}, scheduler=lcm)
    assert made.scheduler["_class_name"] == "LCMScheduler"
    assert made.scheduler["beta_start"] == BETAS["beta_start"]
    assert (made.defaults["steps"], made.defaults["guidance"]) == (4, 7.5)


def test_defaults_are_those_of_the_class() -> None:
    """An inpainting UNet paints from noise alone; SDXL's image-to-image keeps most of its image."""
    of = [
        _class_defaults(one)
        for one in (
            diffusers.StableDiffusionPipeline,
            diffusers.StableDiffusionInpaintPipeline,
            diffusers.StableDiffusionXLImg2ImgPipeline,
        )
    ]
    assert of[0] == {"steps": 50, "guidance": 7.5}
    assert of[1] == {"steps": 50, "guidance": 7.5, "strength": 1.0}
    assert of[2] == {"steps": 50, "guidance": 5.0, "strength": 0.3}


def test_encoders_may_give_latents_themselves(plain: Path) -> None:
    """AutoencoderTiny gives no mean and variance: its latents are taken for each image as they are."""
    from mpq_deploy.models.pipeline_graphs import vae_networks

    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pixels = np.zeros((1, 3, 16, 16), np.float32)
    encoder = vae_networks(SimpleNamespace(vae=vae, vae_scale_factor=2), [(8, 8)], True)
    latents = encoder["vae_encoder"].reference({"sample": pixels})
    generator = Generator(plain)
    sampled = generator._sampled(latents, np.ones((2, 4, 8, 8), np.float32), False)
    factor = generator.generation.vae["scaling_factor"]
    np.testing.assert_allclose(sampled, np.repeat(latents, 2, 0) * factor, rtol=1e-5)


def test_one_by_one_parts_and_batches_make_the_same(plain: Path) -> None:
    generator = Generator(plain, threads=1)
    wish = {"steps": 2, "guidance": 3.0, "seed": 5, "count": 3}
    together = generator(PROMPT, batch=3, **wish)
    alone = Generator(plain, threads=1, one_at_a_time=True)(PROMPT, **wish)
    assert [one.seed for one in together] == [one.seed for one in alone] == [5, 6, 7]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.array, other.array, atol=1e-5)
    assert np.abs(together[0].array - together[1].array).max() > 1e-3
    assert not generator._open


def test_a_graph_of_one_row_makes_the_same_as_one_of_any(plain: Path) -> None:
    free, bound = Generator(plain, threads=1), Generator(plain, threads=1)
    part = bound.generation.parts["unet"]
    bound.generation.parts["unet"] = replace(part, largest_batch=1)  # type: ignore[index]
    wish = {"steps": 2, "guidance": 3.0}
    np.testing.assert_allclose(
        bound(PROMPT, **wish)[0].array, free(PROMPT, **wish)[0].array, atol=1e-5
    )


def test_memory_that_runs_out_in_a_batch_keeps_the_images_done(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, done = Generator(plain, threads=1), []
    decode = generator._decoded

    def decoded(latents: np.ndarray) -> np.ndarray:
        if len(done) == 2:
            raise MemoryError
        return decode(latents)

    monkeypatch.setattr(generator, "_decoded", decoded)
    with pytest.raises(PartMemoryError, match="at image 3 of 4; the 2 before it are kept"):
        for one in generator.generate(Wish(PROMPT, steps=1, count=4)):
            done.append(one)
    assert [one.seed for one in done] == [0, 1]
    assert not generator._open


@pytest.mark.parametrize("part", ["_denoised", "_decoded"])
def test_no_image_is_written_of_values_that_are_not_finite(
    plain: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    generator = Generator(plain)
    made = getattr(generator, part)
    monkeypatch.setattr(generator, part, lambda *given: np.nan * made(*given))
    with pytest.raises(ModelError, match=f"The {part[1:4]}[a-z]+'s output is not finite at seed 3"):
        generator(PROMPT, steps=1, seed=3)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a size outside": ({"size": (32, 16)}, "makes no images of 32x16"),
    "a mask alone": ({"mask": Image.new("L", (16, 16))}, "A mask needs an image"),
    "a mode": ({"image": Image.new("RGBA", (16, 16))}, "has the mode RGBA"),
    "a mask of another size": (
        {"image": Image.new("RGB", (16, 16)), "mask": Image.new("L", (8, 8))},
        "The mask has 8x8 pixels",
    ),
    "no steps": ({"image": Image.new("RGB", (16, 16)), "steps": 2, "strength": 0.2}, "are none"),
    "strength alone": ({"strength": 0.5}, "needs an image"),
    "steps": ({"steps": 0}, "--steps is 0"),
    "half a step": ({"steps": 2.5}, "--steps is 2.5"),
    "guidance in words": ({"guidance": "7"}, "--guidance is '7'"),
    "a size in words": ({"size": "16x16"}, "--size is '16x16'"),
    "half a pixel": ({"size": (16.5, 16)}, r"--size is \(16.5, 16\)"),
    "a name that diffusers has": ({"num_steps": 2}, "takes no 'num_steps'. Did you mean 'steps'"),
    "a list of negatives": ({"negative": ["blurry"]}, "The negative is a list"),
    "bytes that are no text": ({"negative": "\udcff"}, "not valid Unicode"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_made_is_refused(plain: Path, name: str) -> None:
    wishes, message = WRONG[name]
    with pytest.raises(UsageError, match=message):
        Generator(plain)(PROMPT, **wishes)


def test_a_size_may_be_a_list(plain: Path) -> None:
    made = Generator(plain)(PROMPT, steps=1, size=[16, 16])
    assert np.array_equal(made[0].array, Generator(plain)(PROMPT, steps=1)[0].array)


def test_threads_may_share_a_generator(plain: Path) -> None:
    wishes = [{"steps": 1 + seed, "seed": seed, "count": 2} for seed in range(3)]
    alone = [[one.array for one in Generator(plain, threads=1)(PROMPT, **w)] for w in wishes]
    shared = Generator(plain, threads=1)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda wish: shared(PROMPT, **wish), wishes))
    for own, made in zip(alone, together):
        assert np.array_equal(own, [one.array for one in made])


def test_one_lora_may_be_a_text(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Generator, "use_loras", lambda self, *loras: asked.extend(loras))
    Generator(plain, loras="style.safetensors")
    assert asked == ["style.safetensors"]


@pytest.fixture
def broken(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "broken")
    return tmp_path / "broken"


def change(folder: Path, **values: Any) -> None:
    file = folder / "generation.json"
    read = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**read, **values}), encoding="utf-8")


def test_a_missing_part_is_named_with_what_it_would_be(broken: Path) -> None:
    (broken / "components" / "vae_decoder" / "model.onnx").unlink()
    with pytest.raises(InputError, match="vae_decoder, what turns latents into the image"):
        Generator(broken)


def test_an_encoder_is_needed_for_an_image_alone(broken: Path) -> None:
    read = json.loads((broken / "generation.json").read_text(encoding="utf-8"))
    del read["parts"]["vae_encoder"]
    change(broken, parts=read["parts"])
    Generator(broken)(PROMPT, steps=1)
    with pytest.raises(InputError, match="no vae_encoder, what turns a given image") as caught:
        Generator(broken)(PROMPT, steps=2, image=Image.new("RGB", (16, 16)))
    assert "--call" in caught.value.hint


def test_a_folder_of_another_kind_is_named_with_what_to_do(tmp_path: Path) -> None:
    for file, hint in (
        ("recipe.yaml", "mpq-deploy sample FOLDER"),
        ("model_index.json", "mpq-deploy build FOLDER"),
        ("pipeline.json", f"FOLDER{os.sep}generation"),
    ):
        folder = tmp_path / file
        folder.mkdir()
        (folder / file).write_text("{}", encoding="utf-8")
        with pytest.raises(InputError) as caught:
            Generator(folder)
        assert hint.replace("FOLDER", str(folder)) in caught.value.hint


def test_a_picture_is_turned_as_its_camera_says(plain: Path, tmp_path: Path) -> None:
    upright = Image.effect_noise((16, 16), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn it clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for read in (
        read_picture(tmp_path / "turned.png", "image"),
        open_picture(tmp_path / "turned.png"),
    ):
        assert np.array_equal(np.asarray(read), np.asarray(upright))
    # As diffusers reads pictures.
    theirs = diffusers.utils.load_image(str(tmp_path / "turned.png"))
    assert np.array_equal(np.asarray(theirs), np.asarray(upright))


def test_pictures_that_cannot_be_taken_are_refused(tmp_path: Path) -> None:
    """Damaged, of more pixels than Pillow opens, of 16 bits, or with a transparent colour."""
    file, noise = tmp_path / "given.png", Image.effect_noise((64, 64), 90)
    noise.save(file)
    whole = file.read_bytes()
    for cut in (20, 60, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="cannot be read"):
            read_picture(file, "image")
        with pytest.raises(UsageError, match="cannot be opened as an image"):
            open_picture(file)
    file.write_bytes(whole[:16] + (30_000).to_bytes(4, "big") * 2 + whole[24:])
    for read in (partial(read_picture, what="image"), open_picture):
        with pytest.raises((InputError, UsageError), match="cannot be"):
            read(file)
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(file)
    with pytest.raises(UsageError, match="the mode I;16"):
        read_picture(file, "image")
    with pytest.raises(UsageError, match="mode I;16, whose values would be cut"):
        open_picture(file)
    noise.convert("RGB").save(file, transparency=(1, 2, 3))
    with pytest.raises(UsageError, match="has a transparent colour"):
        read_picture(file, "image")


def test_a_tokenizer_of_another_vocabulary_is_refused(broken: Path) -> None:
    file = broken / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["another"])
    tokenizer.save(str(file))
    with pytest.raises(InputError, match="has 55 words, not the 54"):
        Generator(broken)(PROMPT, steps=1)


# Where in generation.json a value stands that no folder has.
ODD: list[tuple[tuple[str | int, ...], Any]] = [
    (("defaults", "guidance"), None),
    (("parts", "text_encoder", "inputs"), {}),
    (("parts", "text_encoder", "inputs", "input_ids", "dtype"), None),
    (("parts", "text_encoder", "inputs", "input_ids", "shape"), "ab"),
    (("parts", "text_encoder", "vocabulary"), "x"),
    (("parts", "unet", "memory_bytes"), "x"),
    (("parts", "unet", "inputs", "sample", "shape"), []),
    (("sizes", 0, 0), -1),
    (("sizes", 0, 1), 10**30),
    (("tokenizers", "tokenizer", "length"), 0),
    (("tokenizers", "tokenizer", "pad"), 10**30),
    (("vae", "latent_channels"), True),
    (("vae", "scaling_factor"), "x"),
]


@pytest.mark.parametrize(("place", "value"), ODD)
def test_a_value_that_no_folder_has_is_refused(
    broken: Path, place: tuple[str | int, ...], value: Any
) -> None:
    read = json.loads((broken / "generation.json").read_text(encoding="utf-8"))
    inner = read
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    change(broken, **read)
    with pytest.raises(InputError):
        Generator(broken)


@pytest.mark.parametrize("wrong", [{"format": 99}, {"kind": "x"}, {"sizes": []}, {"vae": 3}])
def test_a_description_that_cannot_be_read_is_refused(broken: Path, wrong: dict[str, Any]) -> None:
    change(broken, **wrong)
    with pytest.raises(InputError):
        Generator(broken)


def test_a_long_prompt_is_cut_with_a_warning(plain: Path) -> None:
    said: list[str] = []
    talk = Talk()
    talk.warn = said.append  # type: ignore[method-assign]
    Generator(plain, talk=talk)("a b c d e f g h i", steps=1, guidance=1.0)
    assert said == ["the prompt is cut at 8 tokens; left out: g h i"]


def test_the_command_line_writes_images(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    arguments = ["generate", str(plain), "--prompt", "a cat", "--steps", "2", "-o", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--count", "2"])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "x-0.png").size == (16, 16)
    assert (tmp_path / "x-1.png").is_file()
    # A name without an ending is a PNG's; one that no picture has, or a folder, is refused before the work.
    for name, code in (("plain", 0), ("drawing.psd", 2), ("", 2)):
        named = [*arguments[:-1], str(tmp_path / name)]
        refused = CliRunner().invoke(app, named).exception
        assert (0 if refused is None else getattr(refused, "exit_code", 1)) == code
    assert Image.open(tmp_path / "plain.png").format == "PNG"


def test_no_torch_is_needed(plain: Path, tmp_path: Path) -> None:
    blocked = ("torch", "diffusers", "transformers", "onnx", "pydantic", "typer", "scipy")
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "from mpq_deploy import Generator\n"
        f"made = Generator({str(plain)!r})('a cat', steps=2)\n"
        f"made[0].image.save({str(tmp_path / 'x.png')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert Image.open(tmp_path / "x.png").size == (16, 16)
