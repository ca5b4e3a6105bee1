"""A whole pipeline under one budget: its runs, its joint view, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import onnxruntime as ort
import torch
from PIL import Image
from typer.testing import CliRunner

import mpq_deploy
from mpq_deploy.cli import app
from mpq_deploy.delivery import generation
from mpq_deploy.delivery.generation import generation_of
from mpq_deploy.device.generate.generator import Generator
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.pipeline_parts import Parts, whole_parts
from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.report.parts_compare import compare_pipelines
from mpq_deploy.report.parts_page import pipeline_text, write_pipeline
from mpq_deploy.run.folder import open_run
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.run.several_parts import WholeRun, build_whole
from mpq_deploy.system.progress import Talk
from tests.device.generate.folders import SameNoise, same_noise, tiny_folder
from tests.graphs import GraphBuilder
from tests.lora_files import RANK, diffusers_file, factors, layers_of
from tests.oracle.unets import _control_net
from tests.pipeline.runs import FEW_SCHEMES, Notes, recipe_for
from tests.shared import made_once
from tests.tiny_models import (
    ONE_LEVEL,
    TEXT_WIDTH,
    TOKENS,
    tiny_text_pipeline_folder,
    tiny_unet_folder,
)

pytestmark = pytest.mark.torch
PARTS = ("text_encoder", "unet", "vae_decoder")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = made_once(
        tmp_path_factory, "tiny-sd", lambda place: tiny_text_pipeline_folder(place, **ONE_LEVEL)
    )
    return tiny / "tiny_text"


def recipe(folder: Path, **changes: Any) -> Recipe:
    prompts = folder.parent / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("abc\ndef\nghi\njkl\nmno\npqr\nstu\n", encoding="utf-8")
    given = {"target": "onnxruntime-cpu", "prompts": str(prompts), "component_samples": 8}
    more = {"evaluate__controls": False, "budget": 0.5}
    return recipe_for(folder, **{**FEW_SCHEMES, **given, **more, **changes})


def built(settings: Recipe, run: Path, last: str = "report") -> tuple[PipelineFile, Notes]:
    parts, notes = whole_parts(settings), Notes()
    assert parts is not None
    return build_whole(settings, run, parts, last, notes), notes


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PipelineFile]:
    """A whole pipeline's run. Tests leave it as it is."""

    def make(place: Path) -> None:
        view, _ = built(recipe(folder), place / "run")
        write_pipeline(place / "run", view)

    run = made_once(tmp_path_factory, "whole-run", make) / "run"
    return run, PipelineFile.load(run)


def constant_bytes(path: Path) -> int:
    """Bytes of the initializers, counted by onnx alone; 4-bit values take half a byte."""
    half = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    total = 0
    for one in onnx.load(path).graph.initializer:
        count = int(np.prod(one.dims)) if one.dims else 1
        if one.data_type in half:
            total += (count + 1) // 2
        else:
            total += count * onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize
    return total


def test_all_parts_share_one_budget(finished: tuple[Path, PipelineFile]) -> None:
    run, view = finished
    assert tuple(view.parts) == PARTS
    sizes = {}
    for name, part in view.parts.items():
        own = run / "components" / name
        report = json.loads((own / "report.json").read_text(encoding="utf-8"))
        assert report["size_bytes"] == part.size_bytes
        sizes[name] = part.size_bytes or 0
        # Integers of axes and shapes are constants too, but no weights.
        assert constant_bytes(own / "quantize" / "model.onnx") >= sizes[name]
    assert sum(sizes.values()) == view.size_bytes
    assert view.size_bytes is not None and view.budget_bytes is not None
    assert view.size_bytes <= view.budget_bytes == int(0.5 * (view.fp16_size_bytes or 0))
    assert PipelineFile.load(run) == view


def test_final_images_are_predicted_and_measured(finished: tuple[Path, PipelineFile]) -> None:
    run, view = finished
    for part in view.parts.values():
        assert part.gain is not None and part.gain > 0 and part.quadratic
        assert (part.measured_image_error or 0) > 0 and (part.predicted_image_error or 0) > 0
    # A few calls of a tiny model: the order of size alone.
    assert view.measured_image_error is not None and view.predicted_image_error is not None
    assert 1e-2 < view.measured_image_error / view.predicted_image_error < 1e2
    steps, rows = 3, {name: part.rows for name, part in view.parts.items()}
    assert rows["vae_decoder"] == 1 and rows["text_encoder"] == 2
    # PNDM takes one step more; guidance doubles the rows.
    assert rows["unet"] == 2 * (steps + 1)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(f"components/{name}/report.html" in page for name in PARTS)
    assert "all together" in pipeline_text(view, run)


def test_another_budget_redoes_the_allocation_alone(
    finished: tuple[Path, PipelineFile], folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    view, notes = built(recipe(folder, budget=0.45), run, "allocate")
    assert (view.size_bytes or 0) <= 0.45 * (view.fp16_size_bytes or 0)
    for stage in ("export", "calibrate", "candidates", "measure"):
        assert [line for line in notes.lines if line.startswith(f"{stage} ")]
        made = [n for n in notes.lines if n.startswith(f"{stage} ") and "up to date" not in n]
        assert not made
    assert not any("gains:" in line for line in notes.lines)
    with pytest.raises(UsageError, match=r"budget 0\.1 \([\d,]+ bytes\)") as small:
        built(recipe(folder, budget=0.1), run, "allocate")
    assert re.search(r"smallest feasible budget is 0\.\d{4} \(", small.value.hint or "")
    assert all(f"{name} " in (small.value.hint or "") for name in view.parts)
    # Its graphs are still the former plan's.
    with pytest.raises(UsageError, match="planned anew since its text_encoder was quantized"):
        generation_of(run, Notes())


def test_a_pinned_part_stays_in_fp16(
    finished: tuple[Path, PipelineFile], folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    view, _ = built(recipe(folder, pinned=["vae"], budget=0.7), run, "allocate")
    vae = view.parts["vae_decoder"]
    assert vae.state == "pinned" and vae.size_bytes == vae.fp16_size_bytes
    assert (view.size_bytes or 0) <= (view.budget_bytes or 0)
    plan = json.loads(
        (run / "components" / "vae_decoder" / "allocate" / "plan.json").read_text(encoding="utf-8")
    )
    assert set(plan["schemes"].values()) == {"fp16"}


def test_images_are_generated_from_the_run(
    finished: tuple[Path, PipelineFile], folder: Path, tmp_path: Path
) -> None:
    """As diffusers makes them with our graphs in its parts' places, from the same noise."""
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    made_in = generation_of(run, Notes())
    assert_images_of_diffusers(run, made_in, folder, {"negative": "def"})
    # Written once for the same plans, and again for others.
    before = (made_in / "generation.json").stat().st_mtime_ns
    assert generation_of(run, Notes()).samefile(made_in)
    assert (made_in / "generation.json").stat().st_mtime_ns == before
    (made_in / "made_from.txt").write_text("other plans", encoding="utf-8")
    generation_of(run, Notes())
    assert (made_in / "generation.json").stat().st_mtime_ns != before


def test_the_folder_that_a_run_was_built_from_must_be_as_it_was(
    finished: tuple[Path, PipelineFile], folder: Path, tmp_path: Path
) -> None:
    """Another tokenizer or scheduler would make other images, without a word."""
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.rmtree(run / "generation", ignore_errors=True)
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    view = json.loads((run / "pipeline.json").read_text(encoding="utf-8"))
    view["recipe"]["model"] = str(source)
    (run / "pipeline.json").write_text(json.dumps(view), encoding="utf-8")
    scheduler = source / "scheduler" / "scheduler_config.json"
    before = scheduler.read_text(encoding="utf-8")
    scheduler.write_text(before.replace("0.012", "0.013"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"scheduler_config.json is not as it was when"):
        generation_of(run, Notes())
    scheduler.unlink()
    with pytest.raises(UsageError, match=r"scheduler_config.json is not as it was when"):
        generation_of(run, Notes())
    shutil.rmtree(source)
    with pytest.raises(UsageError, match="whose tokenizers are needed, is not there") as caught:
        generation_of(run, Notes())
    assert f"build FOLDER -o {run}" in caught.value.hint


def test_defaults_are_those_in_which_all_calls_agree() -> None:
    call = {"prompt": "a", "num_inference_steps": 4, "guidance_scale": 0.0}
    assert generation._defaults([call, call]) == {"steps": 4, "guidance": 0.0}
    assert generation._defaults([call, {**call, "num_inference_steps": 5}]) == {"guidance": 0.0}
    assert generation._defaults([call, {"prompt": "b"}]) == generation._defaults([]) == {}


def test_calls_side_by_side_write_the_generation_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a process that was killed in the middle of it left goes."""
    run, written = tmp_path / "run", []
    left = run / ".generation-killed"
    left.mkdir(parents=True)
    named: Any = {"class_name": "StableDiffusionPipeline", "source": str(tmp_path)}
    PipelineFile(**named, denoiser="unet", recipe={"model": str(tmp_path)}, parts={}).save(run)
    left.with_name(f"{left.name}.lock").touch()

    def write(source: Path, files: Any, out: Path, *rest: Any) -> None:
        out.mkdir()
        written.append(out)
        time.sleep(0.2)

    monkeypatch.setattr(generation, "write_generation", write)
    with ThreadPoolExecutor(2) as pool:
        places = list(pool.map(lambda _: generation_of(run, Notes()), range(2)))
    assert places == [run / "generation"] * 2 and len(written) == 1
    assert (run / "generation" / "made_from.txt").is_file()
    assert not list(run.glob(".generation-*"))


def test_a_part_that_takes_more_than_generation_gives_it_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    graph = GraphBuilder()
    taken = [graph.input(name, [1, 4, 8, 8]) for name in ("z", "mask")]
    graph.output(graph.op("Add", taken, "y"), [1, 4, 8, 8])
    parts = dict.fromkeys(("vae_decoder", "text_encoder", "unet"), graph.save(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="vae_decoder takes z, mask: more than one input"):
        generation.write_generation(folder, parts, tmp_path / "out")


def test_loras_are_given_to_a_run_with_slots(
    finished: tuple[Path, PipelineFile], folder: Path, tmp_path: Path
) -> None:
    """As diffusers makes them with the LoRA in its weights, but for what quantizing costs without it."""
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    _, notes = built(recipe(folder, lora_slots=RANK), run)
    assert sum("LoRA slots of rank" in line for line in notes.lines) == 2
    assert not list((run / "components" / "vae_decoder").glob("quantize/*lora*"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    ends = ("to_q", "to_v", "to_out.0", "ff.net.2", "q_proj", "fc1")
    file = diffusers_file(tmp_path / "a.safetensors", parts, ends)
    images = {}
    for loras in ((), (str(file),)):
        made_in = generation_of(run, Notes())
        generator = Generator(made_in, threads=1, loras=loras)
        generator.noise_for = lambda seed: SameNoise()
        asked = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
        width, height = generator.generation.sizes[0]
        images[loras] = generator("abc", steps=4, guidance=3.0)[0].array
        for part, module in parts.items() if loras else ():
            for name, (a, b) in factors(layers_of(module, *ends), list(parts).index(part)).items():
                with torch.no_grad():
                    module.get_submodule(name).weight.add_(b @ a)
        with same_noise():
            images[loras, "float"] = pipe("abc", width=width, height=height, **asked).images[0]
    errors = [
        float(np.mean((images[key] - images[key, "float"]) ** 2)) for key in list(images)[::2]
    ]
    moved = np.mean((images[(str(file),), "float"] - images[(), "float"]) ** 2)
    assert 0 < errors[1] < 3 * errors[0] and moved > 3 * errors[1]
    archive, installed = tmp_path / "a.mpq.tar", tmp_path / "installed"
    asked_for = ("-p", "abc", "--steps", "1", "--lora", file, "-o")
    for command in (
        ("generate", run, *asked_for, tmp_path / "here.png"),
        ("package", run, "-t", "onnxruntime-cpu", "-o", archive),
        ("install", archive, "-o", installed),
        ("generate", installed, *asked_for, tmp_path / "there.png"),
    ):
        outcome = CliRunner().invoke(app, list(map(str, command)))
        assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()


def assert_images_of_diffusers(
    run: Path, made_in: Path, folder: Path, more: dict[str, str], **call: Any
) -> None:
    """Both with our graphs, from the same noise; ``more``: a negative prompt, ``call``: diffusers' own arguments."""
    generator = Generator(made_in, threads=1)
    generator.noise_for = lambda seed: SameNoise()
    size = generator.generation.sizes[0]
    made = generator("abc", steps=4, guidance=3.0, **more)[0]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", **call}
    asked |= {f"{name}_prompt": text for name, text in more.items()}
    given = {"width": size[0], "height": size[1], **asked}
    with same_noise():
        floats = pipe("abc", **given).images[0]
        setattr(pipe, PipelineFile.load(run).denoiser, mpq_deploy.load(run))
        for name in generator.generation.parts:
            part, method = ("vae", "decode") if name == "vae_decoder" else (name, "forward")
            if name not in ("unet", "transformer"):
                in_place_of(getattr(pipe, part), method, made_in / "components" / name)
        expected = pipe("abc", **given).images[0]
    np.testing.assert_allclose(made.array, expected, atol=1e-3)
    assert np.abs(expected - floats).max() > 1e-3


class Answer(dict[str, torch.Tensor]):
    """What a part answers with: a graph's outputs where pipelines look for them."""

    def __getitem__(self, place: Any) -> Any:
        return self.get("pooled", next(iter(self.values())))

    @property
    def hidden_states(self) -> tuple[Any, ...]:
        return None, self.get("hidden_states"), None

    @property
    def pooler_output(self) -> Any:
        return self["pooled"]


def in_place_of(part: Any, method: str, folder: Path) -> None:
    """Let ONNX Runtime answer for ``part``."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    (graph,) = folder.glob("*.onnx")
    session = ort.InferenceSession(str(graph), options)
    names = [one.name for one in session.get_outputs() if one.name != "states_and_pooled"]

    def answer(first: torch.Tensor, *args: Any, **kwargs: Any) -> Answer:
        name = session.get_inputs()[0].name
        values = session.run(names, {name: first.numpy()})
        return Answer(zip(names, map(torch.from_numpy, values), strict=True))

    setattr(part, method, answer)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "last"), [("sdxl", "report"), ("sd3", ""), ("flux", "")])
def test_pipelines_that_take_a_pooled_vector_are_whole(
    kind: str, last: str, tmp_path: Path
) -> None:
    """Built under one budget, and generated from the run as diffusers makes images with our graphs."""
    folder, run = tiny_folder(tmp_path, kind), tmp_path / "run"
    short = {} if kind == "sdxl" else {"max_sequence_length": 16}
    calls = [{"prompt": one, "height": 16, "width": 16, **short} for one in ("abc", "def", "gh")]
    (tmp_path / "calls.yaml").write_text(json.dumps(calls), encoding="utf-8")
    settings = recipe(folder, call=str(tmp_path / "calls.yaml"), prompts=None, budget=0.5)
    view, _ = built(settings, run, last or "allocate")
    assert (view.size_bytes or 0) <= (view.budget_bytes or 0)
    for name in () if last else view.parts:
        # Its graphs alone: what compares them was made for another kind.
        with open_pipeline(
            load_recipe(run / "components" / name / "recipe.yaml"),
            run / "components" / name,
            Notes(),
        ) as part:
            part.deployed()
    if last:
        assert (view.parts["text_encoder_2"].measured_image_error or 0) > 0
    more = {} if kind == "flux" else {"negative": "def"}
    made_in = generation_of(run, Notes())
    length = Generator(made_in).generation.tokenizers
    assert [one.length for one in length.values()][1:] == (
        [8] if kind == "sdxl" else [8, 16][kind == "flux" :]
    )
    assert_images_of_diffusers(run, made_in, folder, more, **short)


def test_commands_take_the_whole(finished: tuple[Path, PipelineFile], tmp_path: Path) -> None:
    run, view = Path(shutil.copytree(finished[0], tmp_path / "run")), finished[1]

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["-q", *map(str, arguments)])

    kept = call("gate", run, "--max-size", 0.5, "--min-psnr", 10)
    assert kept.exit_code == 0, kept.output
    assert call("gate", run, "--max-size", 0.49).exit_code == 1
    refused = call("gate", run, "--min-ssim", 0.5)
    assert isinstance(refused.exception, UsageError) and "--min-ssim" in str(refused.exception)
    again = call("--json", "allocate", run)
    assert again.exit_code == 0, again.exception
    assert json.loads(again.stdout)["size_bytes"] == view.size_bytes
    alone = call("measure", run)
    assert alone.exit_code == 0
    named = call("sample", run)
    assert isinstance(named.exception, UsageError)


def test_budgets_of_the_whole_are_swept_without_building(
    finished: tuple[Path, PipelineFile],
) -> None:
    run, view = finished
    before = {path: path.read_bytes() for path in run.rglob("*") if path.name == "stage.json"}
    found = CliRunner().invoke(app, ["-q", "--json", "sweep", str(run), "--budgets", "0.05,0.5,1"])
    assert found.exit_code == 0, found.exception
    small, own, whole = json.loads(found.stdout)["points"]
    assert small["smallest_feasible_bytes"] > 0.05 * (view.fp16_size_bytes or 0)
    # At the run's own budget: its own plan, of each part.
    assert own["size_bytes"] == view.size_bytes
    assert own["predicted_nmse"] == pytest.approx(view.predicted_image_error)
    for name, part in view.parts.items():
        assert own["parts"][name]["size_bytes"] == part.size_bytes
    assert whole["size_ratio"] <= 1 and whole["predicted_nmse"] < own["predicted_nmse"]
    assert before == {path: path.read_bytes() for path in before}
    # Nothing is measured: the picture names no dots that it does not have.
    picture = (run / "sweep.svg").read_text(encoding="utf-8")
    assert "<!-- least predicted -->" in picture and "<!-- measured -->" not in picture
    measured = CliRunner().invoke(app, ["sweep", str(run), "--evaluate"])
    assert "predicted, not measured" in str(measured.exception)


def test_two_wholes_are_compared_part_by_part(
    finished: tuple[Path, PipelineFile], folder: Path, tmp_path: Path
) -> None:
    run, view = finished
    other = Path(shutil.copytree(run, tmp_path / "other"))
    changed, _ = built(recipe(folder, budget=0.7, evaluate__seed=3), other)
    compared = compare_pipelines([run, other])
    text, values = compared.text(), compared.as_json()
    assert [one["size_bytes"] for one in values["runs"]] == [view.size_bytes, changed.size_bytes]
    apart = (changed.size_bytes or 0) - (view.size_bytes or 0)
    assert f"2 against 1: {apart:,} bytes more." in text
    # Other images: their errors stand beside each other, and are not divided.
    assert re.search(r"The seeds differ: \d+ and 3\.", text) and "times the first's" not in text
    layers = values["against_first"][0]["layers_changed"]
    assert set(layers) == set(PARTS) and layers["unet"].split(" of ")[0] != "0"
    rows = [row[:2] for row in compared.rows()]
    assert rows == [[name, str(n)] for name in (*PARTS, "all together") for n in (1, 2)]
    same = CliRunner().invoke(
        app, ["compare", str(run), str(run), "--html", str(tmp_path / "c.html")]
    )
    assert same.exit_code == 0 and "the same bytes" in same.stdout
    assert "is 1.00 times the first's" in same.stdout and "unet: 0 of" in same.stdout
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "2 runs of a pipeline compared" in page and "its name opens" not in page
    part = CliRunner().invoke(app, ["compare", str(run), str(run / "components" / "unet")])
    assert "is not the run of a whole pipeline" in str(part.exception)
    none = CliRunner().invoke(app, ["compare", str(run), str(tmp_path / "none")])
    assert "There is no run" in str(none.exception)


def test_which_models_are_whole_pipelines(folder: Path, tmp_path: Path) -> None:
    found = whole_parts(recipe(folder))
    assert found is not None and found.names == PARTS and found.denoiser == "unet"
    several = whole_parts(recipe(folder, component="unet,text_encoder"))
    assert several is not None and several.names == ("text_encoder", "unet")
    for model, changes in (
        (folder, {"component": "unet"}),
        (folder / "unet", {}),
        (folder, {"conditions": "given.npz"}),
        (tiny_unet_folder(tmp_path), {}),
    ):
        assert whole_parts(recipe(model, **changes)) is None
    assert whole_parts(Recipe()) is None and whole_parts(Recipe(model="digits")) is None


def test_what_cannot_be_built_is_refused(folder: Path, tmp_path: Path) -> None:
    lacking = Path(shutil.copytree(folder, tmp_path / "lacking"))
    shutil.rmtree(lacking / "text_encoder")
    with pytest.raises(
        UsageError, match=r"lacks its text_encoder \(CLIPTextModel of transformers\)"
    ):
        whole_parts(recipe(lacking))
    with pytest.raises(UsageError, match=r"no part 'vea'.*\n?.*"):
        whole_parts(recipe(folder, pinned=["vea"]))
    with pytest.raises(UsageError, match="no part to pin 'vae'"):
        whole_parts(recipe(folder, component="unet", pinned=["vae"]))
    parts = whole_parts(recipe(folder, target="rtx,jetson-orin-nano"))
    assert parts is not None
    with pytest.raises(UsageError, match="for one target, not for"):
        build_whole(
            recipe(folder, target="rtx,jetson-orin-nano"),
            tmp_path / "run",
            parts,
            "report",
            Notes(),
        )


def test_a_limit_on_time_that_no_target_knows_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = recipe(folder, allocate__max_latency="5ms")
    with pytest.raises(UsageError, match="speed of the target onnxruntime-cpu is unknown"):
        built(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    parts = whole_parts(settings)
    assert parts is not None
    whole = WholeRun(settings, SimpleNamespace(path=tmp_path), parts, Talk(), None)  # type: ignore[arg-type]
    unknown: Any = SimpleNamespace(fp16_bytes=10, weights=5, timed=False, problem=None)
    with pytest.raises(UsageError, match="No latency is known of unet, and a limit"):
        whole._shares({"unet": unknown}, settings.budget)


def test_python_builds_and_loads_the_whole(
    finished: tuple[Path, PipelineFile], folder: Path, tmp_path: Path
) -> None:
    import mpq_deploy
    from mpq_deploy.api import BuildResult

    run, view = finished
    result = BuildResult(run, view.model_dump(mode="json"))
    assert result.engine is None and result.model == result.part("unet").model
    assert result.model.is_file() and result.part("vae_decoder").model.is_file()
    unet = mpq_deploy.load(run)
    assert unet.config["_class_name"] == "UNet2DConditionModel"


def test_pictures_make_the_encoder_a_part(folder: Path, tmp_path: Path) -> None:
    image_to_image = with_index(
        folder, tmp_path / "tiny", _class_name="StableDiffusionImg2ImgPipeline"
    )
    calls = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        calls.append({"prompt": f"a{number}", "image": f"{number}.png", "strength": 0.5})
    (tmp_path / "calls.yaml").write_text(json.dumps(calls), encoding="utf-8")
    settings = recipe(image_to_image, call=str(tmp_path / "calls.yaml"), prompts=None, budget=0.6)
    view, _ = built(settings, tmp_path / "run")
    assert set(view.parts) == {*PARTS, "vae_encoder"}
    encoder = view.parts["vae_encoder"]
    assert (encoder.gain or 0) > 0 and (encoder.measured_image_error or 0) > 0
    assert (view.size_bytes or 0) <= (view.budget_bytes or 0)


def with_index(folder: Path, place: Path, **entries: Any) -> Path:
    """A copy of the pipeline whose index has other entries."""
    copied = Path(shutil.copytree(folder, place))
    index = json.loads((copied / "model_index.json").read_text(encoding="utf-8"))
    (copied / "model_index.json").write_text(json.dumps({**index, **entries}), encoding="utf-8")
    return copied


def test_parts_that_the_calls_never_reach_are_left_out(folder: Path, tmp_path: Path) -> None:
    """A ControlNet takes its picture as it is, and embeddings take the place of texts."""
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "e.npy", np.zeros((1, TOKENS, TEXT_WIDTH), np.float32))
    controlled = with_index(
        *(folder, tmp_path / "controlled"),
        _class_name="StableDiffusionControlNetPipeline",
        controlnet=["diffusers", "ControlNetModel"],
    )
    _control_net().save_pretrained(controlled / "controlnet")
    pictured = {"prompt": "abc", "image": "a.png", "height": 16, "width": 16}
    embedded = {"prompt_embeds": "e.npy", "negative_prompt_embeds": "e.npy"}
    for model, call, left in (
        (controlled, pictured, PARTS),
        (folder, embedded, ("unet", "vae_decoder")),
    ):
        (tmp_path / "call.yaml").write_text(json.dumps(call), encoding="utf-8")
        settings = recipe(model, call=str(tmp_path / "call.yaml"), prompts=None)
        parts, notes = whole_parts(settings), Notes()
        assert parts is not None and parts.names == (*PARTS, "vae_encoder")
        for _ in range(2):
            with open_run(tmp_path / f"run-{model.name}") as run:
                whole = WholeRun(settings, run, parts, notes, None)
                whole.leave_out_uncalled()
            assert whole.parts.names == left
        assert (
            f"part vae_encoder: left out, {parts.class_name} does not call it here" in notes.lines
        )
    with pytest.raises(UsageError, match="ControlNetPipeline, of which no images are made without"):
        generation.pipeline_kind(controlled)
    named = whole_parts(settings.model_copy(update={"component": "unet,vae_encoder"}))
    assert named is not None and not named.where_called


def test_a_part_that_cannot_be_exported_is_known_before_another_is_measured(
    folder: Path, tmp_path: Path
) -> None:
    call = {"prompt": "abc", "negative_prompt": "abc", "height": 16, "width": 16}
    (tmp_path / "call.yaml").write_text(json.dumps(call), encoding="utf-8")
    settings = recipe(folder, call=str(tmp_path / "call.yaml"), prompts=None)
    with pytest.raises(
        UsageError, match="its text_encoder the same input in every call"
    ) as refusal:
        built(settings, tmp_path / "run")
    assert "at least two prompts. Or leave the text_encoder as it is" in refusal.value.hint
    assert refusal.value.hint.endswith("--only unet,vae_decoder.")
    assert not (tmp_path / "run" / "components" / "unet" / "measure").exists()


def test_sizes_are_for_the_parts_that_see_images(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"model": "sd", "sizes": "512x512,768x512"})
    names = ("text_encoder", "unet", "vae_decoder")
    parts = Parts(tmp_path, "StableDiffusionPipeline", "unet", names, frozenset())
    folder: Any = SimpleNamespace(path=tmp_path)
    whole = WholeRun(recipe, folder, parts, Talk(), None)
    assert [len(whole.own_recipe(name).sizes) for name in names] == [0, 2, 2]
