"""The stage export: the model as ONNX, with what it takes to run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.errors import UsageError
from mpq_deploy.graph.census import take_census
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.writers.deployed_graphs import fp16_bytes
from mpq_deploy.graph.writers.lora_slots import require_slots
from mpq_deploy.models.additions import COMPONENT_STEPS, DECODE, place_of
from mpq_deploy.models.call_file import pictures_of
from mpq_deploy.models.export import export_denoiser
from mpq_deploy.models.locate import source_files
from mpq_deploy.models.lora_option import check_lora, parse_lora
from mpq_deploy.models.open import source_denoiser
from mpq_deploy.models.sampling_fit import check_declared, check_timesteps
from mpq_deploy.run.folder import telling_what_is_gone
from mpq_deploy.run.stage import Stage, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.run.view import CHECKPOINT
from mpq_deploy.system.files import Fields, canonical_json, file_digest

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

EXPORT_FORMAT = 4


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    recipe = run.recipe
    description = Path(recipe.description) if recipe.description else None
    config = Path(recipe.config) if recipe.config else None
    with telling_what_is_gone(recipe.model, run.path):
        files = source_files(recipe.model, description, recorded=bool(recipe.calls), config=config)
    fields: Fields = {
        "export.format": EXPORT_FORMAT,
        # Its files are below: the same model by another path is the same.
        "recipe.model": Path(recipe.model).name if recipe.model else None,
        "recipe.guidance_scale": recipe.guidance_scale,
        "recipe.component": recipe.component,
        "recipe.component_samples": recipe.component_samples if recipe.component else None,
        "model.files": {name: file_digest(path) for name, path in files},
    }
    if recipe.first_token != "quantized":
        fields["recipe.first_token"] = recipe.first_token
    decodes = recipe.component is not None and place_of(recipe.component)[1] == DECODE
    if decodes and recipe.calibrate.steps != COMPONENT_STEPS:
        fields["recipe.calibrate.steps"] = recipe.calibrate.steps
    if recipe.sizes:
        fields["recipe.sizes"] = list(recipe.sizes.text)
    for name in ("conditions", "scheduler", "prompts", "description", "call", "calls"):
        given = getattr(recipe, name)
        fields[f"recipe.{name}"] = _path_digest(Path(given)) if given else None
    if recipe.lora:
        fields["recipe.lora"] = [_lora_digest(text) for text in recipe.lora]
    if recipe.call:
        fields["call.pictures"] = [file_digest(path) for path in pictures_of(Path(recipe.call))]
    return {**fields, **version_of("torch", "diffusers", "onnx", "onnxscript", "onnx-ir")}


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    recipe = run.recipe
    check_memory(run, STAGE)
    denoiser = source_denoiser(recipe, run.talk, run.base / CHECKPOINT)
    check_declared(denoiser.spec)
    steps = (recipe.calibrate.steps, recipe.evaluate.steps)
    check_timesteps(denoiser.spec, steps, recipe.evaluate.sampler)
    apart = recipe.first_token == "precomputed"
    report = export_denoiser(denoiser, folder, run.talk, first_token_apart=apart, release=True)
    graph = layer_graph(load_model(folder / "model.onnx"))
    census = take_census(graph)
    if not graph.layers:
        raise UsageError(
            f"{recipe.model} has no layer to quantize: {census.text()}",
            "Export it with its weights as constants that Conv, Gemm or MatMul read directly.",
        )
    if recipe.lora_slots:
        require_slots(graph)
    run.talk.line(f"  {census.text()}")
    spec = denoiser.spec
    size = fp16_bytes(load_model(folder / "model.onnx"), spec.timestep_name, spec.sample.name)
    facts = {
        "fp16_size_bytes": size,
        "layers": len(graph.layers),
        "max_relative_error": report.max_relative_error,
        "notes": list(report.notes),
        "products": census.values(),
    }
    (folder / "facts.json").write_text(canonical_json(facts), encoding="utf-8")
    return f"{len(graph.layers)} layers, {size / 1e6:.2f} MB in FP16, max error {report.max_relative_error:.1e}"


def _lora_digest(text: str) -> list[str | float]:
    """Digest and scale of a LoRA. Raises UsageError when there is no such file."""
    option = parse_lora(text)
    check_lora(option.file)
    return [file_digest(option.file), option.scale]


def _path_digest(path: Path) -> str:
    """Digest of a file, or of a folder's files by name. Raises UsageError when there is none."""
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return canonical_json(
            {p.name: file_digest(p) for p in sorted(path.iterdir()) if p.is_file()}
        )
    raise UsageError(f"There is no file {path}.", "Check the path.")


STAGE = Stage(
    "export",
    make,
    inputs,
    hint="Close other programs, export the model to ONNX elsewhere, or",
)
