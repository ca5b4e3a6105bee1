"""Write a GENERATION folder: what ``mpq_deploy.Generator`` and ``mpq-deploy generate`` open.

In: a diffusers pipeline folder, ``{part: ONNX graph}``, or the run of a whole pipeline. Out: the
folder that ``mpq_deploy.device.generate.generation_folder`` reads. Nothing in it needs torch or diffusers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx

from mpq_deploy.calls.pipeline_runs import load_pipeline, use_scheduler
from mpq_deploy.device.generate.generation_folder import (
    COMPONENTS,
    FILE,
    FLUX,
    FORMAT,
    NEEDED,
    SCHEDULER,
    SD,
    SD3,
    SDXL,
    TEXT_OUTPUTS,
    TOKENIZER,
    WHAT,
    Generation,
    open_generation,
)
from mpq_deploy.device.generate.residency import RUNTIME_BYTES
from mpq_deploy.device.generate.schedulers import scheduler_from_config
from mpq_deploy.device.lora_inputs import is_slot, weight_norms
from mpq_deploy.engine.engine_memory import estimate_memory
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.graph.load import external_files, read_proto
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.lora_slots import SLOTTED_SIMULATED
from mpq_deploy.models.additions import INDEX, pipeline_index
from mpq_deploy.models.locate import locate
from mpq_deploy.models.pipeline_graphs import pipeline_length
from mpq_deploy.models.sample_sizes import pipeline_multiple, size_fields
from mpq_deploy.recipe import make_recipe
from mpq_deploy.run.folder import COMPONENTS as RUNS
from mpq_deploy.run.folder import PIPELINE, RECIPE
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.run.view import Run
from mpq_deploy.runtime.ort import SESSION_COPIES
from mpq_deploy.system.files import file_digest, write_text
from mpq_deploy.system.locks import alone_with, scratch_folder
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import NO_SIZES, ImageSizes
from mpq_deploy.system.release import __version__

# Classes by kind; image-to-image and inpainting are calls of the same parts.
_TASKS = ("", "Img2Img", "Inpaint")
KINDS = {
    **{f"StableDiffusion{task}Pipeline": SD for task in _TASKS},
    **{f"StableDiffusionXL{task}Pipeline": SDXL for task in _TASKS},
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
}
# Where the pipeline's class takes no image, and so says none: that of diffusers for Stable Diffusion.
STRENGTH = 0.8
# What the same is called in a call of diffusers.
_CALLED = {"steps": "num_inference_steps", "guidance": "guidance_scale", "strength": "strength"}
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
# What a run keeps its folder as, and beside generation.json which plans it was written from.
GENERATION, MADE_FROM = "generation", "made_from.txt"
# What this module writes changes with it.
WRITTEN = "6"
# ONNX Runtime holds dequantized weights so many times while it opens a graph (over 2.15, seen).
OPENED, CALL_ROWS = 2.15, 2


def pipeline_kind(folder: Path) -> str:
    """Return the kind of the pipeline in ``folder``. UsageError for a class that is not supported."""
    name = str(pipeline_index(folder).get("_class_name"))
    if name not in KINDS:
        raise UsageError(
            f"{folder} is a {name}, of which no images are made without PyTorch.",
            f"That is for {', '.join(KINDS)}. Of others use the parts: package RUN/components/NAME each, or "
            "mpq_deploy.load(RUN) in the pipeline's denoiser's place.",
        )
    return KINDS[name]


def generation_of(run: Path, talk: Talk) -> Path:
    """Return ``run``'s generation folder, written anew where its plans are others than when it was.

    A path that is not the run of a whole pipeline is returned as it is. The parts are the quantized
    integers in FP32 arithmetic, which ONNX Runtime computes on a CPU. Raises UsageError for a run
    that is not finished, and as ``write_generation`` does.
    """
    if not (run / PIPELINE).is_file():
        return run
    view = PipelineFile.load(run)
    files, opened, digest = {}, dict[str, Run](), hashlib.sha256(WRITTEN.encode())
    check_parts(run, view)
    for name in view.parts:
        part = Run.opened(run / RUNS / name, talk)
        deployed = part.deployed
        files[name] = deployed / (SLOTTED_SIMULATED if part.recipe.lora_slots else SIMULATED)
        if not files[name].is_file():
            raise UsageError(f"{run} has no graph of its {name}.", f"mpq-deploy build -o {run}")
        if not _of_plan(part, view.parts[name].size_bytes):
            what = f"{run} was planned anew since its {name} was quantized, or a build did not end."
            raise UsageError(what, f"Finish it: mpq-deploy build -o {run}")
        opened[name] = part
        digest.update(name.encode() + (deployed / "stage.json").read_bytes())
    place = run / GENERATION
    # Calls that run side by side, as a script's first ones, write it once.
    with alone_with(place):
        _write_anew(view, opened.get(view.denoiser), files, (place, digest.hexdigest()), talk)
    return place


def check_parts(run: Path, view: PipelineFile) -> None:
    """Raise UsageError where a part's run is missing, or where the whole was never planned.

    A part alone would be planned by its own recipe, with another budget than its share.
    """
    for name in view.parts:
        if not (run / RUNS / name / RECIPE).is_file():
            what = f"{run} has no run of its {name}, {WHAT.get(name, 'a part')}."
            raise UsageError(what, f"mpq-deploy build -o {run}")
    unplanned = [name for name, part in view.parts.items() if part.size_bytes is None]
    if unplanned:
        what = f"{run} was not planned as a whole: a build did not end ({', '.join(unplanned)})."
        raise UsageError(what, f"Finish it: mpq-deploy build -o {run}")


def _of_plan(part: Run, size_bytes: int | None) -> bool:
    """Whether the graphs that are deployed are of the part's present plan, and that of the joint view."""
    for stage in ("quantize", part.deployed_stage):
        made = part.folder.record(stage)
        for name, digest in made.inputs.items() if made else ():
            before = part.folder.record(name)
            if before is not None and before.digest != digest:
                return False
    return part.plan.size_bytes == size_bytes


def _write_anew(
    view: PipelineFile,
    denoiser: Run | None,
    files: Mapping[str, Path],
    made: tuple[Path, str],
    talk: Talk,
) -> None:
    """Write a folder unless it was made from the same; what a killed process left beside it goes.

    ``made``: the folder, and what it is to be made from.
    """
    place, made_from = made
    if (place / MADE_FROM).is_file() and (place / MADE_FROM).read_text("utf-8") == made_from:
        return
    source = _source(view, denoiser, place.parent, talk)
    called = None if denoiser is None else denoiser.exported.spec.pipeline
    talk.line(f"  writing {place}")
    with scratch_folder(f".{GENERATION}", place.parent) as aside:
        write_generation(
            source,
            files,
            aside / GENERATION,
            _defaults(called.calls if called else ()),
            make_recipe(dict(view.recipe)).sizes,
            called.scheduler if called else None,
        )
        write_text(aside / GENERATION / MADE_FROM, made_from)
        shutil.rmtree(place, ignore_errors=True)
        (aside / GENERATION).replace(place)


def _source(view: PipelineFile, denoiser: Run | None, run: Path, talk: Talk) -> Path:
    """Return the pipeline's folder, with the tokenizers and settings that the run was built from.

    Raises UsageError where it is gone, or where a file beside its weights is another one now.
    """
    again = f"Put it back as it was, or build it again: mpq-deploy build FOLDER -o {run}"
    given = view.given().get("model", view.source)
    try:
        folder = locate(given, talk)
    except UsageError as error:
        what = f"{given}, from which {run} was built and whose tokenizers are needed, is not there."
        raise UsageError(what, again) from error
    record = None if denoiser is None else denoiser.folder.record("export")
    files: Any = record.inputs.get("model.files", {}) if record is not None else {}
    for name, digest in files.items():
        read = name == SCHEDULER_CONFIG or name.startswith((INDEX, "tokenizer", "vae/config"))
        if read and not ((folder / name).is_file() and file_digest(folder / name) == digest):
            raise UsageError(f"{folder / name} is not as it was when {run} was built.", again)
    return folder


def _defaults(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of a call in which all calls that the run was built with agree."""
    found = {}
    for ours, theirs in _CALLED.items():
        values = [call.get(theirs) for call in calls]
        if values and values[0] is not None and all(value == values[0] for value in values):
            found[ours] = values[0]
    return found


def write_generation(
    folder: Path,
    parts: Mapping[str, Path],
    out: Path,
    defaults: Mapping[str, Any] | None = None,
    sizes: ImageSizes = NO_SIZES,
    scheduler: Mapping[str, Any] | None = None,
) -> Generation:
    """Write ``out`` from the pipeline in ``folder`` and ``parts`` (see ``models.pipeline_graphs``).

    ``defaults`` replaces ``steps``, ``guidance`` or ``strength``; ``sizes``: those that the parts
    were made for, where they are several; ``scheduler``: in place of the pipeline's own. Raises
    UsageError for a pipeline or scheduler that is not supported, a part that is missing, or a folder
    that is not empty.
    """
    kind = pipeline_kind(folder)
    _refuse_incomplete(kind, parts, out)
    pipeline = load_pipeline(folder, pipeline_index(folder))
    use_scheduler(pipeline, scheduler)
    # As the pipeline holds it: its index names the class, and it corrects old settings.
    held = json.loads(pipeline.scheduler.to_json_string())
    scheduler_from_config(held)
    largest = max((s.height for s in sizes), default=0), max((s.width for s in sizes), default=0)
    written = {
        name: _write_part(name, file, out, pipeline, largest) for name, file in parts.items()
    }
    tokenizers = {
        name.replace("text_encoder", "tokenizer"): _write_tokenizer(pipeline, name, written, out)
        for name in TEXT_OUTPUTS[kind]
        if name in written
    }
    denoiser = pipeline.unet if kind in (SD, SDXL) else pipeline.transformer
    sized = size_fields(sizes, pipeline_multiple(pipeline, denoiser.config))
    described = {
        "format": FORMAT,
        "made_by": __version__,
        "pipeline": type(pipeline).__name__,
        "kind": kind,
        "parts": written,
        "tokenizers": tokenizers,
        "defaults": {"strength": STRENGTH, **_class_defaults(type(pipeline)), **(defaults or {})},
        "sizes": [[s.width, s.height] for s in sizes] or [_size(written, kind, pipeline)],
        **{key: value for key, value in sized.items() if key == "size_step" and value},
        "vae": _vae(pipeline),
        "settings": _settings(pipeline, denoiser, kind),
    }
    write_text(out / SCHEDULER, _json(held))
    write_text(out / FILE, _json(described))
    return open_generation(out)


def _class_defaults(pipeline: type) -> dict[str, Any]:
    """Return diffusers' own defaults of a call of this class."""
    taken = inspect.signature(pipeline.__call__).parameters
    return {ours: taken[theirs].default for ours, theirs in _CALLED.items() if theirs in taken}


def _refuse_incomplete(kind: str, parts: Mapping[str, Path], out: Path) -> None:
    missing = [name for name in NEEDED[kind] if name not in parts]
    if missing:
        names = ", ".join(f"{name} ({WHAT[name]})" for name in missing)
        raise UsageError(f"A {kind} pipeline needs {names}.", "Export all parts.")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty.", "Give a new folder.")


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def _vae(pipeline: Any) -> dict[str, Any]:
    config = pipeline.vae.config
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "latent_channels")
    values = {name: config.get(name) for name in names}
    return {**values, "scale_factor": int(pipeline.vae_scale_factor)}


def _settings(pipeline: Any, denoiser: Any, kind: str) -> dict[str, Any]:
    config = pipeline.config
    if config.get("requires_aesthetics_score"):
        raise UsageError("The refiner's aesthetic scores are not supported.", "Use the base model.")
    if kind == SDXL:
        return {"zeros_for_no_negative": bool(config.get("force_zeros_for_empty_prompt", True))}
    if kind == SD3:
        return {
            "patch_size": int(denoiser.config.patch_size),
            "text_width": int(denoiser.config.joint_attention_dim),
            "t5_length": pipeline_length(pipeline),
        }
    return {}


def _size(parts: Mapping[str, Any], kind: str, pipeline: Any) -> list[int]:
    """Return [width, height] of the images that the decoder's graph makes."""
    given = next(iter(parts["vae_decoder"]["inputs"].values()))["shape"]
    factor = int(pipeline.vae_scale_factor)
    return [int(given[3]) * factor, int(given[2]) * factor]


def _refuse_more_inputs(name: str, inputs: Sequence[str]) -> None:
    """Raise ModelError for a part beside the denoiser that is given more than what generation gives it."""
    if name in ("unet", "transformer") or len(inputs) < 2:
        return
    what = "a mask of its padding" if name.startswith("text_encoder") else "more than one input"
    raise ModelError(
        f"The {name} takes {', '.join(inputs)}: {what} is not supported here.",
        "Make images with diffusers, and mpq_deploy.load in its denoiser's place.",
    )


def _write_part(
    name: str, file: Path, out: Path, pipeline: Any, largest: tuple[int, int]
) -> dict[str, Any]:
    """Copy a graph with its weights; return what generation.json says of it.

    ``largest``: height and width of images that memory is estimated for, where the graph leaves them open.
    """
    proto = read_proto(file)
    place = out / COMPONENTS / name
    place.mkdir(parents=True)
    # Whoever reads the folder finds slots by the graph's inputs, not by its file's name.
    graph = SIMULATED if file.name == SLOTTED_SIMULATED else file.name
    shutil.copyfile(file, place / graph)
    for one in external_files(proto, file):
        shutil.copyfile(one, place / one.name)
    described: dict[str, Any] = {
        "file": graph,
        "inputs": {one.name: _tensor(one) for one in proto.graph.input if not is_slot(one.name)},
        "outputs": {one.name: _tensor(one) for one in proto.graph.output},
    }
    slots = {one.name: _tensor(one) for one in proto.graph.input if is_slot(one.name)}
    if slots:
        described["slots"] = slots
        described["weight_norms"] = weight_norms({m.key: m.value for m in proto.metadata_props})
    _refuse_more_inputs(name, list(described["inputs"]))
    if name.startswith("text_encoder"):
        # What joins them for comparison is nothing that a pipeline takes.
        taken = TEXT_OUTPUTS[KINDS[type(pipeline).__name__]][name]
        outputs = described["outputs"]
        described["outputs"] = {one: outputs[one] for one in taken if one in outputs} or outputs
        described["vocabulary"] = int(getattr(pipeline, name).config.vocab_size)
    scale = 1 if name == "vae_encoder" else int(pipeline.vae_scale_factor)
    height, width = (side // scale for side in largest)
    # Axis 1 is open where tokens of 2 x 2 latents lie in a row.
    open_axes = {0: CALL_ROWS, 1: height * width // 4, 2: height, 3: width}
    described["memory_bytes"] = _memory(file, proto, described["inputs"], open_axes)
    return described


def _memory(
    file: Path, proto: onnx.ModelProto, inputs: Mapping[str, Any], open_axes: Mapping[int, int]
) -> int:
    """Return what ONNX Runtime takes for a graph: its weights in float as it opens it, and activations."""
    weights = 4 * sum(prod(one.dims) for one in proto.graph.initializer)
    quantized = any(node.op_type == "DequantizeLinear" for node in proto.graph.node)
    copies = OPENED if quantized else 1 + SESSION_COPIES
    shapes = {
        name: tuple(
            open_axes.get(axis, CALL_ROWS) if size is None else size
            for axis, size in enumerate(one["shape"])
        )
        for name, one in inputs.items()
    }
    return estimate_memory(file, shapes, int(copies * weights)).total_bytes - RUNTIME_BYTES


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    return {"dtype": str(dtype), "shape": shape}


def _write_tokenizer(
    pipeline: Any, encoder: str, written: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Write the tokenizer.json of a text encoder; return what generation.json says of it."""
    name = encoder.replace("text_encoder", "tokenizer")
    tokenizer, place = getattr(pipeline, name), out / name
    (ids,) = written[encoder]["inputs"].values()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"The {name} is a {type(tokenizer).__name__}, which the library tokenizers has not."
        )
    for side in ("padding_side", "truncation_side"):
        if getattr(tokenizer, side, "right") != "right":
            raise ModelError(
                f"The {name} has the {side} {getattr(tokenizer, side)!r}; here it is right alone.",
                "Make images with diffusers, and mpq_deploy.load in its denoiser's place.",
            )
    place.mkdir(parents=True)
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(place / TOKENIZER))
    return {
        "length": int(ids["shape"][1]),
        "pad": int(tokenizer.pad_token_id),
        "vocabulary": int(backend.get_vocab_size()),
    }
