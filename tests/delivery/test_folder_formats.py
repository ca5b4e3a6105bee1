"""Runs as a Triton model repository and as a folder for a hub: what is in them, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from google.protobuf.text_format import ParseError
from huggingface_hub import ModelCard
from PIL import Image

from mpq_deploy.delivery.generation import generation_of
from mpq_deploy.delivery.hub_folder import card_data, without_paths, write_hub_folder
from mpq_deploy.delivery.triton_repository import (
    ServedGraph,
    text_format,
    write_pipeline_models,
    write_repository,
)
from mpq_deploy.delivery.whole_package import TOLERANCE
from mpq_deploy.device.generate.generation_folder import Part, Tensor, open_generation
from mpq_deploy.device.generate.generator import Generator
from mpq_deploy.device.generate.triton_model import ServedPart
from mpq_deploy.errors import UsageError
from mpq_deploy.report.read import read_report
from mpq_deploy.run.folder import RunFolder
from mpq_deploy.run.view import Run
from mpq_deploy.system.files import file_digest
from mpq_deploy.system.progress import Talk
from tests.delivery import triton_schema
from tests.delivery.triton_stand_in import TYPES, StandIn
from tests.device.generate.folders import written
from tests.pipeline.conftest import cli
from tests.run.test_several_parts import PARTS, finished, folder

__all__ = ["cli", "finished", "folder"]
pytestmark = pytest.mark.torch
Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def run(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def repository(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    written = write_repository(run, out, Talk())
    assert written["models"] == [*PARTS, "picture", "denoise", "generate"]
    return out


@pytest.fixture(scope="module")
def hub(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "model"
    write_hub_folder(run, out, Talk())
    return out


def named(text: str) -> Any:
    return np.array([text.encode()], np.object_)


def test_the_ensemble_makes_the_image_of_generate(run: Path, repository: Path) -> None:
    """Through the STAND-IN of the server, whose graphs run in plain onnxruntime."""
    server = StandIn(repository)
    asked = {"STEPS": np.array([3], np.int32), "GUIDANCE": np.array([3.0], np.float32)}
    given = {"PROMPT": named("abc"), "NEGATIVE_PROMPT": named("def"), **asked}
    made = server.infer("generate", {**given, "SEED": np.array([7])})["IMAGE"]
    generator = Generator(generation_of(run, Talk()), threads=1)
    [own] = generator("abc", negative="def", steps=3, guidance=3.0, seed=7)
    # In another order of sums an INT8 activation may round the other way.
    expected = np.asarray(own.image).astype(float)
    assert np.square(made - expected).mean() < TOLERANCE * expected.var()
    assert {"text_encoder", "unet", "denoise", "vae_decoder", "picture"} == {*server.calls[1:]}
    # Without what is optional, the folder's own defaults; longer prompts are cut with a warning.
    server.infer("generate", {"PROMPT": named("abc"), "STEPS": asked["STEPS"]})
    assert not server.warnings
    server.infer("generate", {"PROMPT": named("abc " * 20), "STEPS": asked["STEPS"]})
    assert "cut" in server.warnings[0]
    with pytest.raises(RuntimeError, match=r"--steps is 0"):
        server.infer("generate", {"PROMPT": named("abc"), "STEPS": np.array([0], np.int32)})


def test_the_prompts_model_needs_only_its_own_file(repository: Path) -> None:
    """In a process whose mpq_deploy is the packed one: neither torch nor ONNX is imported."""
    code = """
import importlib.util, sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
spec = importlib.util.spec_from_file_location("model", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = module.TritonPythonModel()
model.initialize({})
import mpq_deploy
print("mpq_deploy.pyz" in mpq_deploy.__file__, {"torch", "onnx", "pydantic"} & set(sys.modules))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    model = repository / "denoise" / "1" / "model.py"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        check=False,
    )
    assert done.stdout == "True set()\n", done.stderr


def test_configurations_are_of_the_schema_and_fit_together(repository: Path) -> None:
    """The ensemble as the server validates it: all inputs are mapped, types and full shapes agree."""
    configs = StandIn(repository).configs
    assert [one.optional for one in configs["generate"].input] == [False, *[True] * 5]
    unet = configs["unet"]
    assert (unet.backend, unet.max_batch_size) == ("onnxruntime", 8)
    assert list(unet.dynamic_batching.preferred_batch_size) == [2]
    timestep = next(one for one in unet.input if one.name == "timestep")
    assert list(timestep.dims) == [1] and timestep.HasField("reshape")
    known: dict[str, tuple[int, list[int]]] = {}

    def joined(config: Any, tensor: Any, name: str) -> None:
        full = [*([-1] if config.max_batch_size else []), *tensor.dims]
        kind, shape = known.setdefault(name, (tensor.data_type, full))
        assert kind == tensor.data_type and len(shape) == len(full)
        assert all(-1 in (a, b) or a == b for a, b in zip(shape, full))

    ensemble = configs["generate"]
    for one in (*ensemble.input, *ensemble.output):
        joined(ensemble, one, one.name)
    for step in ensemble.ensemble_scheduling.step:
        config = configs[step.model_name]
        for ways, tensors in ((step.input_map, config.input), (step.output_map, config.output)):
            assert set(ways) == {one.name for one in tensors}
            for one in tensors:
                joined(config, one, ways[one.name])


def test_the_schema_refuses_what_it_has_not() -> None:
    with pytest.raises(ParseError, match="no field named"):
        triton_schema.parsed(text_format({"name": "x", "batch": 1}))
    with pytest.raises(ParseError, match="TYPE_FLOAT"):
        triton_schema.parsed('input { name: "x" data_type: TYPE_FLOAT }')
    quoted = text_format({"name": 'a"b\\c'})
    assert triton_schema.parsed(quoted).name == 'a"b\\c'


def test_the_schema_here_is_part_of_tritonclients(repository: Path) -> None:
    official = pytest.importorskip("tritonclient.grpc.model_config_pb2", exc_type=ImportError)
    from google.protobuf import text_format as texts

    def found(name: str) -> Any:
        outer, *inner = name.split(".")
        one = official.DESCRIPTOR.message_types_by_name[outer]
        for part in inner:
            one = one.nested_types_by_name[part]
        return one

    for name, fields in triton_schema.MESSAGES.items():
        known = found(name).fields_by_name
        for field, (number, kind, repeats) in fields.items():
            one = known[field]
            typed = one.message_type or one.enum_type
            shown = typed.full_name.partition(".")[2] if typed else one.type
            assert (one.number, shown, one.is_repeated) == (number, kind, repeats), (name, field)
    for file in repository.glob("*/config.pbtxt"):
        texts.Parse(file.read_text("utf-8"), official.ModelConfig())


def test_a_run_of_one_denoiser_is_one_model(run: Path, tmp_path: Path, cli: Cli) -> None:
    part, out = run / "components" / "unet", tmp_path / "models"
    done = cli("--json", "package", part, "--format", "triton", "-o", out)
    assert done.code == 0, done.err
    [name] = json.loads(done.out)["models"]
    server = StandIn(out)
    rng = np.random.default_rng(0)
    feeds = {
        one.name: rng.random((2, *one.dims)).astype(TYPES[triton_name(one)])
        for one in server.configs[name].input
    }
    found = server.infer(name, feeds)["out_sample"]
    # As our own figures are made: no integer kernels in the place of Q/DQ pairs.
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    graph = Run.opened(part, Talk()).deployed / "model.fp32.onnx"
    plain = ort.InferenceSession(str(graph), options)
    feeds["timestep"] = feeds["timestep"][:, 0]
    expected = plain.run(None, feeds)[0]
    assert np.sum((found - expected) ** 2) <= 1e-10 * np.sum(expected**2)


@pytest.mark.slow
def test_other_kinds_and_given_images(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SDXL's float graphs, from an image: through the STAND-IN as the folder itself makes it."""
    _, made_in, _ = written(tmp_path_factory, "sdxl")
    generation = open_generation(made_in)
    parts = {
        name: ServedGraph(replace(part, largest_batch=1), 1, "")
        for name, part in generation.parts.items()
    }
    write_pipeline_models(parts, made_in, tmp_path / "models")
    server = StandIn(tmp_path / "models")
    width, height = generation.sizes[0]
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    asked = {"STEPS": np.array([4], np.int32), "STRENGTH": np.array([0.5], np.float32)}
    asked |= {"SIZE": np.array([width, height], np.int32), "INIT_IMAGE": picture}
    made = server.infer("generate", {"PROMPT": named("a cat"), **asked})["IMAGE"]
    wishes = {"steps": 4, "strength": 0.5, "image": Image.fromarray(picture)}
    [own] = Generator(made_in, threads=1)("a cat", **wishes)
    assert np.abs(made.astype(int) - np.asarray(own.image).astype(int)).max() <= 1
    assert {"vae_encoder", "text_encoder_2"} <= set(server.calls)
    # Guided: two rows, and a batch of one at most.
    assert server.calls.count("unet") == 4
    with pytest.raises(RuntimeError, match="makes no images of 24x24"):
        server.infer("generate", {"PROMPT": named("x"), "SIZE": np.array([24, 24], np.int32)})


def test_a_denoiser_that_paints_into_masks_is_not_served(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Requests have no mask: each would be refused."""
    folder = shutil.copytree(written(tmp_path_factory, "sd")[1], tmp_path / "made")
    read = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
    read["parts"]["unet"]["inputs"]["sample"]["shape"][1] = 9
    (folder / "generation.json").write_text(json.dumps(read), encoding="utf-8")
    with pytest.raises(UsageError, match="paints into masks, and a request"):
        write_pipeline_models({}, folder, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def triton_name(tensor: Any) -> str:
    return next(k for k, v in triton_schema.ENUMS["DataType"].items() if v == tensor.data_type)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx", "stale"])
def test_engines_that_triton_loads_take_the_graphs_place(
    run: Path, tmp_path: Path, backend: str
) -> None:
    """A file in an engine's place: what is in it plays no part here."""
    whole = Path(shutil.copytree(run, tmp_path / "run"))
    part = RunFolder(whole / "components" / "unet")
    quantized = part.record("quantize")
    assert quantized is not None
    inputs = {"quantize": "another plan" if backend == "stale" else quantized.digest}
    with part.writing("engine", inputs) as place:
        (place / "model.engine").write_bytes(b"engine")
        record = {"backend": "tensorrt" if backend == "stale" else backend, "version": "10.3"}
        record |= {"target": "t", "file": "model.engine", "verified": True, "kernels": {}}
        sizes = dict.fromkeys(("bytes", "weights_bytes", "activation_bytes", "planned_bytes"), 6)
        values = {**record, **sizes, "sha256": file_digest(place / "model.engine")}
        (place / "build.json").write_text(json.dumps(values), encoding="utf-8")
    written = write_repository(whole, tmp_path / "models", Talk())
    unet = tmp_path / "models" / "unet"
    config = triton_schema.parsed((unet / "config.pbtxt").read_text("utf-8"))
    described = json.loads(
        (tmp_path / "models/denoise/1/generation/generation.json").read_text("utf-8")
    )
    dtype = described["parts"]["unet"]["inputs"]["sample"]["dtype"]
    if backend == "tensorrt":
        assert config.backend == "tensorrt" and config.instance_group[0].kind == 1
        assert (unet / "1" / "model.plan").read_bytes() == b"engine"
        # Its tensors are those of the deployed graph.
        assert triton_name(config.input[0]) == "TYPE_FP16" and dtype == "float16"
        assert not any("unet" in note for note in written["notes"])
    else:
        assert config.backend == "onnxruntime" and dtype == "float32"
        reason = "TensorRT-RTX" if backend == "tensorrt_rtx" else "earlier plan"
        assert any("unet" in note and reason in note for note in written["notes"])


def test_without_a_batch_axis_of_any_size_shapes_are_whole() -> None:
    """And a number alone is [1]."""
    part = Part("one", Path("x"), {"t": Tensor("float32", ()), "x": Tensor("float32", (1, 3))}, {})
    served = ServedPart(None, part)
    shapes = {
        name: served._shown(name, np.zeros(one.shape)).shape for name, one in part.inputs.items()
    }
    assert shapes == {"t": (1,), "x": (1, 3)}


def test_the_hub_folder_names_nothing_of_this_machine(
    run: Path, hub: Path, folder: Path, tmp_path: Path
) -> None:
    write_hub_folder(run / "components" / "unet", tmp_path / "single", Talk())
    places = (str(run), str(folder), str(folder.parent), str(Path.home()) + "/", str(Path.cwd()))
    for out in (hub, tmp_path / "single"):
        files = [one for one in out.rglob("*") if one.is_file()]
        for one in files:
            content = one.read_bytes()
            assert not [place for place in places if place.encode() in content], one
        recipe = yaml.safe_load((out / "recipe.yaml").read_text("utf-8"))
        assert recipe["model"] == folder.name
        assert "--recipe recipe.yaml" in (out / "README.md").read_text("utf-8")
    # A graph of somebody else's may hold one all the same: then the user is told.
    part = Path(shutil.copytree(run / "components" / "unet", tmp_path / "part"))
    graph = part / "quantize" / "model.onnx"
    proto = onnx.load(graph, load_external_data=False)
    proto.doc_string = f"made in {Path.home()}/models"
    graph.write_bytes(proto.SerializeToString())
    record = json.loads((part / "quantize" / "stage.json").read_text("utf-8"))
    record["outputs"]["model.onnx"] = file_digest(graph)
    (part / "quantize" / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    notes = write_hub_folder(part, tmp_path / "told", Talk())["notes"]
    assert notes[0].startswith("model.onnx holds a path of this machine")


def test_the_card_is_one_for_the_hub_and_holds_the_report(run: Path, hub: Path) -> None:
    card = ModelCard.load(hub / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert (card.data.library_name, card.data.pipeline_tag) == ("onnx", "text-to-image")
    assert "Licence: unknown" in card.text
    for target in re.findall(r"\]\(([^)]+)\)", card.text):
        assert (hub / target).is_file()
    assert Image.open(hub / "samples.png").width > 96
    report = read_report(run / "components" / "unet")
    assert f"{report.psnr_db:.1f} dB" in card.text
    shown = (run / "components" / "unet" / "report.md").read_text("utf-8").splitlines()
    own = [line for line in shown if not line.startswith(("mpq-deploy build", "| Ours"))]
    assert set(own) <= set(card.text.splitlines())


def test_what_the_cards_say_of_loading_works(
    run: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = tmp_path / "single"
    write_hub_folder(run / "components" / "unet", single, Talk())
    write_hub_folder(run / "components" / "vae_decoder", tmp_path / "vae", Talk())
    values: dict[str, Any] = {}
    for out in (Path(shutil.copytree(hub, tmp_path / "copy")), single):
        monkeypatch.chdir(out)
        for code in re.findall(
            r"```python\n(.*?)```", (out / "README.md").read_text("utf-8"), re.S
        ):
            exec(code, values)
    [own] = Generator(generation_of(run, Talk()))("a red bicycle", steps=20)
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "copy/image.png")), np.asarray(own.image)
    )
    assert values["unet"].spec.pipeline.calls == ()
    assert values["session"].get_inputs()[0].name == "sample"
    card = ModelCard.load(tmp_path / "vae" / "README.md")
    assert card.data.pipeline_tag is None and "mpq_deploy.load" not in card.text


def test_the_licence_is_that_of_the_sources_card(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    assert card_data(str(source), out)["license_name"] == "unknown"
    (source / "LICENSE.md").write_text("terms", encoding="utf-8")
    assert card_data(str(source), out)["license_link"] == "LICENSE.md"
    assert (out / "LICENSE.md").read_text("utf-8") == "terms"
    card = "---\nlicense: openrail++\ntags: [a]\n---\n# x\n"
    (source / "README.md").write_text(card, encoding="utf-8")
    (source / "model_index.json").write_text('{"_name_or_path": "a/b"}', encoding="utf-8")
    data = card_data(str(source), out)
    assert data["license"] == "openrail++" and "license_name" not in data
    assert (data["base_model"], data["base_model_relation"]) == ("a/b", "quantized")
    given = card_data("org/name", out)
    assert given["base_model"] == "org/name" and given["license_link"].endswith("/org/name")
    assert card_data("emoji", out)["license_link"] == "LICENSE-DATA.md"


def test_paths_become_names_and_layers_stay(tmp_path: Path) -> None:
    text = f"see {tmp_path}/a/b.yaml, '{Path.home()}/x y'; https://a.b/c/d; /down_blocks.0/conv 1/2"
    assert without_paths({"a": [text]}) == {
        "a": ["see b.yaml, 'x y'; https://a.b/c/d; /down_blocks.0/conv 1/2"]
    }


def test_bad_requests_get_one_line_and_leave_nothing(run: Path, tmp_path: Path, cli: Cli) -> None:
    def refused(*arguments: object, code: int = 2) -> str:
        done = cli("-q", "package", *arguments)
        assert done.code == code and "Traceback" not in done.err, done.err
        return str(done.err)

    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept", encoding="utf-8")
    for form in ("triton", "hub"):
        assert "is not empty" in refused(run, "--format", form, "-o", full)
        away = tmp_path / "no" / "where"
        assert "There is no folder" in refused(run, "--format", form, "-o", away)
        assert "not a run" in refused(tmp_path, "--format", form, "-o", tmp_path / "out")
        key = refused(run, "--format", form, "--sign", tmp_path / "key")
        assert "--sign signs archives alone" in key
    assert "onnx" in refused(run, "--format", "onnx")
    # Planned, but not compared; and a part whose graph was altered.
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    view = json.loads((unfinished / "pipeline.json").read_text("utf-8"))
    view["measured_image_error"] = None
    (unfinished / "pipeline.json").write_text(json.dumps(view), encoding="utf-8")
    assert "is not finished" in refused(unfinished, "--format", "hub", "-o", tmp_path / "out")
    part = unfinished / "components" / "unet"
    (part / "report.json").unlink()
    assert "no report" in refused(part, "--format", "hub", "-o", tmp_path / "out")
    weights = part / "quantize" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert "altered" in refused(part, "--format", "triton", "-o", tmp_path / "out", code=1)
    shutil.rmtree(part / "quantize")
    assert "is not finished" in refused(part, "--format", "triton", "-o", tmp_path / "out")
    assert {one.name for one in tmp_path.iterdir()} == {"full", "unfinished"}
    assert [one.name for one in full.iterdir()] == ["mine.txt"]
