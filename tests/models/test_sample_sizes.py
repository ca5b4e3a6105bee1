"""One graph of several sizes: the same outputs as the model at each, and what is said where it takes one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mpq_deploy.errors import ModelError, UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.export import _between, export_denoiser, load_exported  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.models.spec import DenoiserSpec, FloatModel, InputSpec  # noqa: E402
from mpq_deploy.runtime.drop_in import load  # noqa: E402
from mpq_deploy.runtime.ort import make_session  # noqa: E402
from mpq_deploy.system.quantities import ImageSizes  # noqa: E402
from tests.exported_networks import Form  # noqa: E402
from tests.oracle.pipelines import save_case  # noqa: E402
from tests.pipeline.runs import describe  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    ONE_LEVEL,
    tiny_text_pipeline_folder,
    tiny_text_transformer_folder,
    tiny_transformer_folder,
    tiny_unet_folder,
)

pytestmark = [pytest.mark.slow, pytest.mark.torch]
SIZES = ImageSizes.parse("8x8,16x12")
SHAPES = [(4, 8, 8), (4, 12, 16)]


def sized(text: str, **others: Any) -> Additions:
    return Additions(sizes=ImageSizes.parse(text), **others)


@pytest.mark.parametrize("exporter", ["script", "dynamo"])
def test_a_file_of_either_exporter_has_the_networks_outputs_at_each_size(
    tmp_path: Path, exporter: str
) -> None:
    path = tmp_path / "model.onnx"
    module = Form("unet", exporter, 18, open_sizes=True).export(path)
    described = {"sample": {"name": "sample", "shape": [4, 8, 8]}, "pixel_range": None}
    describe(path, **described)
    report = export_denoiser(open_denoiser(path, Additions(sizes=SIZES)), tmp_path / "export")
    assert report.max_relative_error < 1e-5
    exported = load_exported(tmp_path / "export")
    spec = exported.spec
    # The least shape that holds both; each alone is a description of one size.
    assert spec.sample.shape == (4, 12, 16) and spec.sample.sizes == tuple(SHAPES)
    assert [spec.at_size(k).sample.shape for k in (0, 1)] == SHAPES
    session, random = make_session(exported.model), np.random.default_rng(1)
    for shape in SHAPES:
        sample, times = random.standard_normal((3, *shape), np.float32), np.array([3, 500, 900])
        (made,) = session.run(None, {"sample": sample, "timestep": times})
        with torch.no_grad():
            expected = module(torch.from_numpy(sample), torch.from_numpy(times))
        np.testing.assert_allclose(made, expected.numpy(), atol=1e-5)


def test_a_file_of_fixed_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    Form("unet", "script", 18).export(path)
    describe(path, pixel_range=None)
    with pytest.raises(UsageError, match="fixes the size of its input 'sample'"):
        open_denoiser(path, Additions(sizes=SIZES))


def test_one_size_is_described_as_before_there_were_several(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    own, given = open_denoiser(folder), open_denoiser(folder, sized("8x8"))
    assert given.spec == own.spec and given.network.inputs == own.network.inputs
    own.spec.save(tmp_path / "denoiser.json")
    assert "sizes" not in (tmp_path / "denoiser.json").read_text(encoding="utf-8")
    # Another single size than the configuration's.
    assert open_denoiser(folder, sized("16x8")).spec.sample.shape == (3, 8, 16)
    folder = tiny_text_pipeline_folder(tmp_path, **ONE_LEVEL)
    given = open_denoiser(folder, sized("24x16", prompts=prompts(tmp_path)))
    assert given.spec.sample.shape == (4, 8, 12) and not given.spec.sizes


def test_a_size_between_the_models_steps_names_the_nearest(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    with pytest.raises(UsageError, match=r"13x8 is not in steps of 2.*12x8 or 14x8"):
        open_denoiser(folder, sized("8x8,13x8"))


def test_every_size_of_a_range_is_taken_in_the_models_steps(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, **ONE_LEVEL)
    denoiser = open_denoiser(folder, sized("16x16:32x24:8", prompts=prompts(tmp_path)))
    spec = denoiser.spec
    assert spec.sizes == ((16, 16), (32, 24), (32, 16), (16, 24)) and spec.size_step == 8
    assert spec.pipeline is not None and len(spec.pipeline.calls) == 12
    evaluated = spec.between()
    assert evaluated is not None and evaluated.sample.shape == (4, 8, 12) and not evaluated.sizes
    assert [(c["width"], c["height"]) for c in evaluated.pipeline.calls] == [(24, 16)] * 3  # type: ignore[union-attr]
    # What is compared beside the corners lies one step above the smallest.
    name, between = _between(denoiser) or pytest.fail("no size between")
    assert name == "24x24" and between.spec.sample.shape == (4, 12, 12)
    export_denoiser(denoiser, tmp_path / "run" / "export")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    sizes = ((24, 16), (24, 24), (32, 24))
    before = [image_of(pipe, *size) for size in sizes]
    pipe.unet = load(tmp_path / "run" / "export" / "model.onnx")
    for expected, size in zip(before, sizes):
        np.testing.assert_allclose(image_of(pipe, *size), expected, atol=2e-4)
    with pytest.raises(
        UsageError, match=r"\[4, 16, 8\].*every size from 16x16 to 32x24 in steps of 8"
    ):
        image_of(pipe, 16, 32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8x8:13x8", "13x8 is not in steps of 2.*12x8 or 14x8"),
        ("8x8:14x8:3", "The step 3 of the sizes is not a multiple of 2"),
        ("8x8:14x8:4", "14x8 is not in steps of 4, as the range names it"),
    ],
)
def test_a_range_between_the_models_steps_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_denoiser(tiny_unet_folder(tmp_path), sized(text))


def test_too_small_a_step_of_a_range_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of a file, which does not say in which steps its sizes come.
    monkeypatch.setattr("mpq_deploy.models.sample_sizes.sample_multiple", lambda config: 1)
    denoiser = open_denoiser(tiny_unet_folder(tmp_path), sized("8x8:16x8"))
    with pytest.raises(ModelError, match=r"cannot be run at 9x8.*FROM:TO:STEP"):
        export_denoiser(denoiser, tmp_path / "export")


def test_a_transformer_has_diffusers_outputs_at_each_square(tmp_path: Path) -> None:
    folder = tiny_transformer_folder(tmp_path, "DiTTransformer2DModel")
    export_denoiser(open_denoiser(folder, sized("8x8,12x12")), tmp_path / "export")
    path = tmp_path / "export" / "model.onnx"
    module = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
    session, random = make_session(path), np.random.default_rng(1)
    for side in (8, 12):
        sample = random.standard_normal((3, 4, side, side), np.float32)
        times, labels = np.array([3, 500, 900], np.float32), np.array([0, 2, 1])
        feeds = {"hidden_states": sample, "timestep": times, "class_labels": labels}
        (made,) = session.run(None, feeds)
        with torch.no_grad():
            expected = module(**{name: torch.from_numpy(v) for name, v in feeds.items()}).sample
        np.testing.assert_allclose(made, expected.numpy(), atol=1e-5)
    with pytest.raises(UsageError, match=r"makes square images alone, not 16x8.*--sizes 256x256"):
        open_denoiser(folder, sized("8x8:16x16"))


def test_positions_that_the_pipeline_gives_are_inputs_of_each_size(tmp_path: Path) -> None:
    folder = tiny_text_transformer_folder(tmp_path, "FluxTransformer2DModel")
    sizes = "16x16,32x16,16x32"
    denoiser = open_denoiser(folder, sized(sizes, prompts=prompts(tmp_path)))
    spec = denoiser.spec
    positions = next(item for item in spec.conditions if item.name == "img_ids")
    # Two sizes of as many tokens are told apart by their positions.
    assert positions.sizes == ((16, 3), (32, 3), (32, 3))
    ids = [spec.conditions_at(k, denoiser.conditions.arrays)["img_ids"] for k in (1, 2)]
    assert ids[0].shape == ids[1].shape and (ids[0] != ids[1]).any()
    export_denoiser(denoiser, tmp_path / "run" / "export")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    before = [image_of(pipe, *size) for size in ((16, 16), (32, 16), (16, 32))]
    pipe.transformer = load(tmp_path / "run" / "export" / "model.onnx")
    for expected, size in zip(before, ((16, 16), (32, 16), (16, 32))):
        np.testing.assert_allclose(image_of(pipe, *size), expected, atol=2e-4)
    with pytest.raises(UsageError, match="It takes 16x16"):
        image_of(pipe, 24, 16)
    # Tokens and their positions are as many as the middle of a range has: neither width's nor height's.
    ranged = open_denoiser(folder, sized("16x16:32x32", prompts=prompts(tmp_path))).spec
    between = ranged.between()
    assert between is not None and ranged.middle == (24, 24)
    assert between.sample.shape[0] == 36
    assert {item.name: item.shape for item in between.conditions}["img_ids"] == (36, 3)


@pytest.mark.parametrize(
    ("text", "step", "middle"),
    [
        ("64x64:128x96", 32, (96, 64)),
        ("64x64:160x128", 32, (96, 96)),
        ("64x64:96x96", 32, None),
        ("96x96,64x64:128x128", 32, None),
        ("64x64,128x128", 0, None),
    ],
)
def test_a_range_has_a_middle_that_is_no_corner(text: str, step: int, middle: Any) -> None:
    sizes = ImageSizes.parse(text)
    shapes = [(4, size.height // 8, size.width // 8) for size in sizes]
    spec = DenoiserSpec(
        name="x",
        source="x",
        sample=InputSpec(name="sample").with_sizes(shapes),
        timestep=InputSpec(name="timestep"),
        scheduler={},
        sizes=tuple((size.width, size.height) for size in sizes),
        size_step=step,
    )
    assert spec.middle == middle
    between = spec.between()
    assert (between is None) == (middle is None)
    if between is not None:
        assert between.sample.shape == (4, middle[1] // 8, middle[0] // 8)
        # Where an axis follows neither side, nothing is made up.
        odd = spec.sample.with_sizes([(4, 3 + n, 9) for n in range(len(shapes))])
        assert spec.model_copy(update={"sample": odd}).between() is None


def image_of(pipe: Any, width: int, height: int) -> Any:
    options = {"generator": torch.Generator().manual_seed(5), "output_type": "np"}
    return pipe("abc", width=width, height=height, num_inference_steps=3, **options).images


def prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("abc\ndef\nxyz\n", encoding="utf-8")
    return folder / "prompts.txt"


def test_a_pipeline_gives_the_same_images_at_each_size(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, **ONE_LEVEL)
    denoiser = open_denoiser(folder, sized("16x16,24x16", prompts=prompts(tmp_path)))
    spec = denoiser.spec
    assert spec.pipeline is not None and len(spec.pipeline.calls) == 6
    widths = [[c["width"] for c in spec.at_size(k).pipeline.calls] for k in (0, 1)]  # type: ignore[union-attr]
    assert widths == [[16] * 3, [24] * 3]
    export_denoiser(denoiser, tmp_path / "run" / "export")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    before = [image_of(pipe, 16, 16), image_of(pipe, 24, 16)]
    pipe.unet = load(tmp_path / "run" / "export" / "model.onnx")
    for expected, size in zip(before, ((16, 16), (24, 16))):
        np.testing.assert_allclose(image_of(pipe, *size), expected, atol=2e-4)
    with pytest.raises(UsageError, match=r"was not built for samples.*It takes 16x16 .*, 24x16"):
        image_of(pipe, 16, 24)


def test_residuals_of_a_controlnet_follow_the_size(tmp_path: Path) -> None:
    case = save_case("StableDiffusionControlNetPipeline", tmp_path)
    denoiser = open_denoiser(case.folder, sized("16x16:32x16:8", call=case.call))
    shapes = {item.name: item.sizes for item in denoiser.spec.conditions}
    # On the lower level a residual has half the latents' height and width; texts have none.
    assert shapes["mid_block_additional_residual"] == ((16, 4, 4), (16, 4, 8))
    assert shapes["encoder_hidden_states"] == ()
    export_denoiser(denoiser, tmp_path / "run" / "export")
    pipe = diffusers.DiffusionPipeline.from_pretrained(case.folder)
    pipe.set_progress_bar_config(disable=True)

    def image(width: int) -> Any:
        noise = torch.Generator().manual_seed(5)
        given = {**case.arguments, "width": width, "height": 16, "generator": noise}
        return pipe(**given, num_inference_steps=2, output_type="np").images

    before = {width: image(width) for width in (16, 24, 32)}
    pipe.unet = load(tmp_path / "run" / "export" / "model.onnx")
    for width, expected in before.items():
        np.testing.assert_allclose(image(width), expected, atol=2e-4)


def test_a_decoder_has_rows_of_each_size_in_turn(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, **ONE_LEVEL)
    options = {"component": "vae_decoder", "component_samples": 8}
    denoiser = open_denoiser(folder, sized("16x16,24x16", prompts=prompts(tmp_path), **options))
    spec, arrays = denoiser.spec, denoiser.conditions.arrays
    name, rows = spec.sample.name, denoiser.conditions.rows
    assert spec.calibration_rows == 6 and rows == 8 and len(spec.sample.sizes) == 2
    for size, shape in enumerate(spec.sample.sizes):
        alone = spec.conditions_at(size, arrays)[name]
        assert alone.shape == (4, *shape) and np.abs(alone).min(axis=(0, 1)).all()
        np.testing.assert_array_equal(alone, arrays[name][size::2, :, : shape[1], : shape[2]])
    ranged = open_denoiser(folder, sized("16x16:32x16:8", prompts=prompts(tmp_path), **options))
    whole = FloatModel(tmp_path, ranged.spec, ranged.conditions.arrays)
    between = whole.between()
    # Latents of the middle are a part of the largest size's.
    assert between is not None and between.spec.sample.shape == (4, 8, 12)
    largest = whole.at_size(1).conditions[name]
    np.testing.assert_array_equal(between.conditions[name], largest[..., :12])
    with pytest.raises(UsageError, match="text_encoder knows no sizes"):
        open_denoiser(folder, sized("16x16", component="text_encoder"))


def test_calls_that_name_a_size_themselves_are_refused(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, **ONE_LEVEL)
    call = tmp_path / "call.yaml"
    call.write_text("{prompt: abc, height: 16}", encoding="utf-8")
    with pytest.raises(UsageError, match="--call names a height or width"):
        open_denoiser(folder, sized("16x16,24x16", call=call))
