"""Write a model repository for NVIDIA's Triton Inference Server.

In: a finished run of one model, or of a whole pipeline. Out: a folder with a model per part, on the
TensorRT backend where the run has an engine that it loads, else on ONNX Runtime's; of a pipeline also
``denoise`` (Python backend), ``picture`` and the ensemble ``generate``, from a prompt to an image.
Fields are those of the server's ``model_config.proto``; no server was at hand.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mpq_deploy.delivery.generation import MADE_FROM, generation_of
from mpq_deploy.delivery.package import installer
from mpq_deploy.device.generate.generation_folder import (
    COMPONENTS,
    FILE,
    Part,
    Tensor,
    open_generation,
)
from mpq_deploy.device.generate.triton_model import (
    IMAGE,
    IMAGE_WISHES,
    LATENTS,
    WISHES,
    takes_batches,
)
from mpq_deploy.engine.record import RECORD, EngineRecord
from mpq_deploy.engine.target import RTX
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.load import external_files, read_proto
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.run.folder import COMPONENTS as RUNS
from mpq_deploy.run.folder import PIPELINE, refuse_altered
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.run.view import Run
from mpq_deploy.system.files import canonical_json, new_folder, write_text
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.release import __version__

Config = dict[str, Any]
CONFIG, VERSION, PLAN, GRAPH = "config.pbtxt", "1", "model.plan", "model.onnx"
DENOISE, PICTURE, GENERATE = "denoise", "picture", "generate"
DECODER, PIXELS = "vae_decoder", "pixels"
# What ONNX Runtime reads since 1.14, with an IR version of then.
OPSET, IR_VERSION = 17, 8
TYPES = {
    **{"float16": "TYPE_FP16", "float32": "TYPE_FP32", "uint8": "TYPE_UINT8", "bool": "TYPE_BOOL"},
    **{"int32": "TYPE_INT32", "int64": "TYPE_INT64"},
}
# Inputs of the prompt's model: type and dims.
PROMPT_INPUTS: dict[str, tuple[str, list[int]]] = {
    "PROMPT": ("TYPE_STRING", [1]),
    "NEGATIVE_PROMPT": ("TYPE_STRING", [1]),
    "STEPS": ("TYPE_INT32", [1]),
    "GUIDANCE": ("TYPE_FP32", [1]),
    "SEED": ("TYPE_INT64", [1]),
    "SIZE": ("TYPE_INT32", [2]),
    IMAGE: ("TYPE_UINT8", [-1, -1, 3]),
    "STRENGTH": ("TYPE_FP32", [1]),
}
NO_ENGINE = "Triton's TensorRT backend loads no TensorRT-RTX engine"
STALE = "its engine is of an earlier plan"
SLOTTED = "its engine has slots for LoRAs, which nothing fills here"
MODEL_PY = '''"""Run by Triton's Python backend; the code is that of mpq-deploy, in the file beside this one."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "mpq_deploy.pyz"))

from mpq_deploy.device.generate.triton_model import DenoiseModel  # noqa: E402


class TritonPythonModel(DenoiseModel):
    folder = HERE / "generation"
'''


class Word(str):
    """A name of the schema, such as a type: written without quotes."""


@dataclass(frozen=True)
class ServedGraph:
    """A part as a model of the repository. ``usual``: its usual batch; ``note``: why it has no engine."""

    part: Part
    usual: int
    note: str

    @property
    def is_plan(self) -> bool:
        """Whether it is a TensorRT engine."""
        return self.part.file.suffix != ".onnx"


def write_repository(run: Path, out: Path, talk: Talk) -> dict[str, Any]:
    """Write ``run`` as a model repository; return its folder, models, bytes and notes.

    Raises UsageError for a run that is not finished or a folder that is not empty, RunFolderError for
    files that were altered, and as ``generation_of`` does.
    """
    with new_folder(out) as folder:
        if (run / PIPELINE).is_file():
            models, configs = _write_pipeline(run, folder, talk)
        else:
            view = Run.opened(run, talk)
            name = re.sub(r"[^A-Za-z0-9._-]", "-", view.exported.spec.name)
            models = [served_graph(view, name)]
            configs = [_write_graph(one, folder) for one in models]
        reasons: dict[str, list[str]] = {}
        for one in models:
            reasons.setdefault(one.note, []).append(one.part.name)
        reasons.pop("", None)
        notes = [f"On ONNX Runtime: {', '.join(n)}, as {why}." for why, n in reasons.items()]
        write_text(folder / "README.md", _readme(configs, notes))
        size = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    names = [one["name"] for one in configs]
    return {"folder": str(out), "models": names, "bytes": size, "notes": notes}


def served_graph(view: Run, name: str) -> ServedGraph:
    """Return the engine of a run where Triton loads it, else its graph in FP32 arithmetic."""
    engine, note = _engine(view)
    graph = view.deployed / (SIMULATED if engine is None else DEPLOYED)
    if not graph.is_file():
        raise UsageError(
            f"{view.path} is not finished: it has no quantized graph.",
            f"mpq-deploy build -o {view.path}",
        )
    proto = read_proto(graph)
    refuse_altered([graph, *external_files(proto, graph), *([engine] if engine else [])])
    section = view.recipe.engine
    inputs, outputs = _tensors(proto.graph.input), _tensors(proto.graph.output)
    part = Part(name, engine or graph, inputs, outputs, largest_batch=section.batch_max)
    return ServedGraph(part, section.batch_opt, note)


def _engine(view: Run) -> tuple[Path | None, str]:
    """Return the run's engine, or None and why it is not one for Triton."""
    folder = view.stage("engine")
    record = EngineRecord.beside(folder / RECORD)
    if record is None:
        none = folder / "none.json"
        reason = read_json_object(none).get("reason") if none.is_file() else "the run has no engine"
        return None, str(reason)
    if record.backend == RTX:
        return None, NO_ENGINE
    if view.recipe.lora_slots:
        return None, SLOTTED
    stage = view.folder.record("engine")
    if stage is None or stage.inputs.get("quantize") != view.digest(view.deployed_stage):
        return None, STALE
    return folder / record.file, ""


def _tensors(values: Iterable[onnx.ValueInfoProto]) -> dict[str, Tensor]:
    tensors = {}
    for one in values:
        kind = one.type.tensor_type
        sizes = (dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        tensors[one.name] = Tensor(str(dtype), tuple(sizes))
    return tensors


def graph_config(served: ServedGraph) -> Config:
    """Return the configuration of a part. Without a batch axis of any size ``dims`` are whole shapes."""
    part = served.part
    batched = takes_batches(part)
    config: Config = {
        "name": part.name,
        "backend": "tensorrt" if served.is_plan else "onnxruntime",
        "max_batch_size": part.largest_batch if batched else 0,
        "input": [_tensor(name, one, batched) for name, one in part.inputs.items()],
        "output": [_tensor(name, one, batched) for name, one in part.outputs.items()],
        "instance_group": [_instances("KIND_GPU" if served.is_plan else "KIND_AUTO")],
    }
    if config["max_batch_size"] > 1:
        usual = max(1, min(served.usual, config["max_batch_size"]))
        config["dynamic_batching"] = {"preferred_batch_size": [usual]}
    if not served.is_plan:
        # Basic passes alone: others put integer kernels in the place of what the graph says.
        config["optimization"] = {"graph": {"level": -1}}
    return config


def _tensor(name: str, tensor: Tensor, batched: bool) -> Config:
    dims = [-1 if size is None else size for size in tensor.shape[int(batched) :]]
    # No tensor of the server is without dimensions: a number per row is [1] outside.
    bare: Config = {} if dims else {"reshape": {"shape": []}}
    return {"name": name, "data_type": Word(TYPES[tensor.dtype]), "dims": dims or [1], **bare}


def _instances(kind: str) -> Config:
    return {"count": 1, "kind": Word(kind)}


def _write_graph(served: ServedGraph, folder: Path) -> Config:
    """Write a part's model; an ONNX file with its weights beside it is a folder of the file's name."""
    place = folder / served.part.name / VERSION
    place.mkdir(parents=True)
    file = served.part.file
    weights = [] if served.is_plan else external_files(read_proto(file), file)
    name = PLAN if served.is_plan else GRAPH
    if weights:
        place = place / name
        place.mkdir()
    shutil.copyfile(file, place / name)
    for one in weights:
        shutil.copyfile(one, place / one.name)
    return _write_config(folder, graph_config(served))


def _write_config(folder: Path, config: Config) -> Config:
    write_text(folder / config["name"] / CONFIG, text_format(config))
    return config


def text_format(values: Mapping[str, Any], indent: str = "") -> str:
    """Return ``values`` in protobuf's text format: a field per line, lists as repeated fields."""
    lines = []
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                lines.append(f"{indent}{name} {{\n{text_format(one, indent + '  ')}{indent}}}\n")
            else:
                shown = one if isinstance(one, Word) else json.dumps(one, ensure_ascii=False)
                lines.append(f"{indent}{name}: {shown}\n")
    return "".join(lines)


def _write_pipeline(run: Path, folder: Path, talk: Talk) -> tuple[list[ServedGraph], list[Config]]:
    names = PipelineFile.load(run).parts
    parts = {name: served_graph(Run.opened(run / RUNS / name, talk), name) for name in names}
    return list(parts.values()), write_pipeline_models(parts, generation_of(run, talk), folder)


def write_pipeline_models(
    parts: Mapping[str, ServedGraph], generation: Path, folder: Path
) -> list[Config]:
    """Write all models of the pipeline in a GENERATION folder; return their configurations.

    Raises UsageError for a denoiser that paints into masks: requests have none.
    """
    if open_generation(generation, files=False).paints:
        what = "This denoiser paints into masks, and a request to the server has none."
        raise UsageError(
            what, "Package it as an archive, and give the masks to mpq-deploy generate."
        )
    _write_denoise(generation, parts, folder / DENOISE / VERSION)
    decoder = parts[DECODER].part
    configs = [_write_graph(one, folder) for one in parts.values()]
    picture = picture_graph(next(iter(decoder.outputs.values())))
    place = folder / PICTURE / VERSION
    place.mkdir(parents=True)
    onnx.save(picture, place / GRAPH)
    given = _tensors(picture.graph.input), _tensors(picture.graph.output)
    configs.append(graph_config(ServedGraph(Part(PICTURE, place / GRAPH, *given), 1, "")))
    configs[-1]["instance_group"] = [_instances("KIND_CPU")]
    configs += prompt_configs(decoder, "vae_encoder" in parts)
    # The server looks for a version's folder of an ensemble, too.
    (folder / GENERATE / VERSION).mkdir(parents=True)
    for config in configs[len(parts) :]:
        _write_config(folder, config)
    return configs


def _write_denoise(generation: Path, parts: Mapping[str, ServedGraph], place: Path) -> None:
    """Write the generation folder without graphs, with the tensors of those that are served."""
    ignored = shutil.ignore_patterns(COMPONENTS, MADE_FROM)
    shutil.copytree(generation, place / "generation", ignore=ignored)
    described = json.loads((generation / FILE).read_text(encoding="utf-8"))
    for name, served in parts.items():
        values, known = asdict(served.part), described["parts"][name]
        known["largest_batch"] = served.part.largest_batch
        known.pop("slots", None)
        for way in ("inputs", "outputs"):
            known[way] = {tensor: values[way][tensor] for tensor in known[way]}
    write_text(place / "generation" / FILE, canonical_json(described))
    write_text(place / "model.py", MODEL_PY)
    (place / "mpq_deploy.pyz").write_bytes(installer())


def prompt_configs(decoder: Part, images: bool) -> list[Config]:
    """Return the configurations of ``denoise`` and of the ensemble ``generate``."""
    taken = [*WISHES, *(IMAGE_WISHES if images else ())]
    inputs = [
        {"name": name, "data_type": Word(PROMPT_INPUTS[name][0]), "dims": PROMPT_INPUTS[name][1]}
        | ({} if name == "PROMPT" else {"optional": True})
        for name in taken
    ]
    [(latents, latent)], [(pixels, image)] = decoder.inputs.items(), decoder.outputs.items()
    one = Tensor(latent.dtype, (1, *latent.shape[1:]))
    denoise = {
        "name": DENOISE,
        "backend": "python",
        "max_batch_size": 0,
        "input": inputs,
        "output": [_tensor(LATENTS, one, False)],
        "instance_group": [_instances("KIND_CPU")],
    }
    steps = [
        _step(DENOISE, {name: name for name in taken}, {LATENTS: LATENTS}),
        _step(DECODER, {latents: LATENTS}, {pixels: PIXELS}),
        _step(PICTURE, {PIXELS: PIXELS}, {"IMAGE": "IMAGE"}),
    ]
    height, width = image.shape[2:]
    picture = _tensor("IMAGE", Tensor("uint8", (height, width, 3)), False)
    ensemble = {
        "name": GENERATE,
        "platform": "ensemble",
        "max_batch_size": 0,
        "input": inputs,
        "output": [picture],
        "ensemble_scheduling": {"step": steps},
    }
    return [denoise, ensemble]


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Config:
    maps = {
        way: [{"key": key, "value": value} for key, value in names.items()]
        for way, names in (("input_map", inputs), ("output_map", outputs))
    }
    return {"model_name": model, "model_version": -1, **maps}


def picture_graph(image: Tensor) -> onnx.ModelProto:
    """Return the graph from a decoder's output [1, 3, H, W] in [-1, 1] to uint8 [H, W, 3]."""
    constants = {"half": 0.5, "zero": 0.0, "one": 1.0, "white": 255.0}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(image.dtype))
    sizes = [size or name for size, name in zip(image.shape[2:], ("height", "width"))]
    nodes = [
        helper.make_node("Cast", [PIXELS], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "half"], ["shifted"]),
        helper.make_node("Clip", ["shifted", "zero", "one"], ["unit"]),
        helper.make_node("Mul", ["unit", "white"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("Squeeze", ["bytes", "axes"], ["single"]),
        helper.make_node("Transpose", ["single"], ["IMAGE"], perm=[1, 2, 0]),
    ]
    graph = helper.make_graph(
        nodes,
        PICTURE,
        [helper.make_tensor_value_info(PIXELS, kind, [1, 3, *sizes])],
        [helper.make_tensor_value_info("IMAGE", TensorProto.UINT8, [*sizes, 3])],
        [
            *(helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in constants.items()),
            helper.make_tensor("axes", TensorProto.INT64, [1], [0]),
        ],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _readme(configs: list[Config], notes: list[str]) -> str:
    rows = [
        f"| {one['name']} | {one.get('backend', 'ensemble')} | {one['max_batch_size'] or '–'} |"
        for one in configs
    ]
    served = any(one["name"] == GENERATE for one in configs)
    install = (
        "    pip install numpy tokenizers pillow    # for the Python backend\n" if served else ""
    )
    engines = any(one.get("backend") == "tensorrt" for one in configs)
    lines = [
        "# Model repository for Triton Inference Server",
        f"Written by mpq-deploy {__version__}. In the server's container, with this folder at `/models`:",
        f"{install}    tritonserver --model-repository=/models",
        "\n".join(["| model | backend | largest batch |", "|---|---|---:|", *rows]),
        "`generate` takes PROMPT and optionally what its config.pbtxt lists; it gives IMAGE, uint8 [height, width, 3]."
        if served
        else "Inputs and outputs are those of one call; whoever calls it samples.",
        *notes,
        "ONNX graphs hold the quantized integers and compute in FP32. `level: -1` keeps ONNX Runtime from replacing "
        "quantized products by integer kernels, whose results are not those of the report. Take a server that brings "
        "ONNX Runtime 1.23.2, the lowest that mpq-deploy is tested with, or a later one.",
        *(
            ["Engines run on the GPU and TensorRT version that built them alone."]
            if engines
            else ()
        ),
        "Written after Triton's documentation and schema; tried with a stand-in for the server alone.",
    ]
    return "\n\n".join(lines) + "\n"
