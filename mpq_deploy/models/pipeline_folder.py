"""A diffusers pipeline folder, or the folder of its UNet or transformer, as a denoiser."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.calls.pipeline_runs import checked_variant, pipeline_class
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.additions import (
    DENOISERS,
    LEFT_OUT,
    SCHEDULER_FILE,
    Additions,
    denoiser_part,
    pipeline_index,
    predicted,
    read_json,
    read_scheduler,
)
from mpq_deploy.models.conditions import Conditions, WantedInput, check_conditions, list_inputs
from mpq_deploy.models.decoder import decoder_network
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.lora import Loras, told
from mpq_deploy.models.model_form import (
    OUTPUT,
    ModelForm,
    model_class,
    model_form,
    named_now,
    network,
)
from mpq_deploy.models.pipeline_part import open_pipeline_part
from mpq_deploy.models.sample_sizes import DIT
from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.models.unet import load_pretrained
from mpq_deploy.system.inputs import whole
from mpq_deploy.system.libraries import tell_cause
from mpq_deploy.system.progress import Talk

INDEX, CONFIG, CARD = "model_index.json", "config.json", "demo.json"
# Channels of a sample that is an image; others are latents.
IMAGE_CHANNELS = (1, 3)
IMAGE_RANGE = (-1.0, 1.0)


def open_folder(folder: Path, source: str, additions: Additions, talk: Talk) -> Denoiser:
    """Open a pipeline folder (model_index.json), or that of a UNet or transformer (config.json).

    Raises UsageError for a folder that is neither, for an unsupported class, and when something is
    missing that the folder cannot provide; ModelError for weights that cannot be loaded.
    """
    pipeline = pipeline_index(folder)
    part = _denoiser_folder(folder, pipeline, additions.component)
    config = read_json(part / CONFIG)
    if _runs_itself(folder, pipeline, config, additions):
        return _open_in_pipeline(folder, source, pipeline, part, additions, talk)
    if additions.call is not None:
        raise UsageError(
            f"{folder} is sampled by the built-in sampler, which ignores --call.",
            "--call is for pipeline folders whose own class runs them, without --conditions.",
        )
    return _open_sampled(folder, source, pipeline, part, additions, talk)


def _open_sampled(
    folder: Path,
    source: str,
    pipeline: dict[str, Any],
    part: Path,
    additions: Additions,
    talk: Talk,
) -> Denoiser:
    """Open the denoiser in ``part`` for our own sampler. Raises as ``open_folder`` does."""
    config = named_now(read_json(part / CONFIG))
    given = Conditions.load(additions.conditions) if additions.conditions is not None else None
    with whole(part / CONFIG, ModelError, "Correct it, or download the model again."):
        refines = bool(pipeline.get("requires_aesthetics_score"))
        form = model_form(config, part, given, refines)
        _refuse_unknown(form, pipeline)
        variant = checked_variant(part)
        card = read_json(folder / CARD) if (folder / CARD).is_file() else {}
        _check_nothing_missing(folder, form.wanted, additions)
        scheduler = read_scheduler(additions.scheduler or folder)
        conditions = given or _own_conditions(form, config, card)
        inputs = check_conditions(conditions, form.wanted, str(additions.conditions or folder))
    module = load_pretrained(model_class(config, part), part, variant)
    uses = Loras.opened(additions.loras, _pipeline_of(pipeline, folder), config).fuse_alone(module)
    spec = DenoiserSpec(
        name=str(card.get("name") or folder.resolve().name),
        source=source,
        sample=form.sample,
        timestep=form.timestep,
        conditions=inputs,
        output=OUTPUT,
        prediction_type=predicted(scheduler),
        scheduler=scheduler,
        guidance_scale=_guidance(additions, card, conditions),
        uncond_row=conditions.uncond_row,
        labels=conditions.labels,
        pixel_range=None if _latent(folder, form.sample.shape) else IMAGE_RANGE,
        config=config,
        loras=uses,
    )
    decoder, notes = _decoder(folder, form, talk)
    notes = (*notes, *_warned(form, talk), *told(uses, talk))
    return Denoiser(spec, conditions, network(module, form, config, inputs), decoder, notes)


def _pipeline_of(pipeline: dict[str, Any], folder: Path) -> Any:
    """Return the class that the folder's index names; None where it names none of its own."""
    named = pipeline.get("_class_name") not in (None, "DiffusionPipeline")
    return pipeline_class(pipeline, folder) if named else None


def _refuse_unknown(form: ModelForm, pipeline: dict[str, Any]) -> None:
    """Raise UsageError for a class whose pipeline is named, and may call it in a way of its own."""
    if not form.known and pipeline.get("_class_name"):
        raise UsageError(
            f"The built-in sampler does not know how {pipeline['_class_name']} calls its {form.class_name}: it may "
            "scale timesteps or shift them.",
            "Give the whole pipeline folder without --conditions, which its own class then runs; or record the "
            "calls of your script (mpq_deploy.record) and give them with the ONNX file: --calls.",
        )


def _warned(form: ModelForm, talk: Talk) -> tuple[str, ...]:
    """Warn of a class that our sampler calls by its signature alone; return the note."""
    if form.known:
        return ()
    said = f"{form.class_name} is called as its signature says, with the scheduler's own timesteps"
    talk.warn(f"{said}; its pipeline may scale them: give the pipeline folder, which knows")
    return (said,)


def _runs_itself(
    folder: Path, pipeline: dict[str, Any], config: dict[str, Any], additions: Additions
) -> bool:
    """Whether the folder's own pipeline makes the calls, and not our sampler.

    Ours is for the bundled models, for arrays that the user gives, and for class-conditional models
    in a pipeline that gives them no class.
    """
    named = pipeline.get("_class_name") not in (None, "DiffusionPipeline")
    if not named or additions.conditions is not None or (folder / CARD).is_file():
        return False
    if not config.get("num_class_embeds"):
        return True
    called = inspect.signature(pipeline_class(pipeline, folder).__call__).parameters
    return "class_labels" in called or "prompt" in called


def _open_in_pipeline(
    folder: Path,
    source: str,
    pipeline: dict[str, Any],
    part: Path,
    additions: Additions,
    talk: Talk,
) -> Denoiser:
    """Open the denoiser in ``part`` as its pipeline calls it. Raises as ``open_folder`` does."""
    absent = [
        name
        for name, entry in pipeline.items()
        if isinstance(entry, list)
        and entry[:1] not in ([], [None])
        and not (folder / name).is_dir()
    ]
    absent = [name for name in absent if name not in LEFT_OUT]
    if absent:
        raise UsageError(
            f"The pipeline in {folder} lacks its {', '.join(absent)}.",
            "Download or save all of it; or give its denoiser's inputs yourself: --conditions FILE.npz.",
        )
    config = read_json(part / CONFIG)
    module_class = model_class(config, part, in_pipeline=True)
    module = load_pretrained(module_class, part, checked_variant(part))
    opened = open_pipeline_part(folder, pipeline, part, module, additions, talk)
    return replace(opened, spec=opened.spec.model_copy(update={"source": source}))


def _latent(folder: Path, shape: tuple[int, ...]) -> bool:
    """Whether samples are latents: there is a decoder, or they have no shape of an image."""
    decoded = (folder / "vae").is_dir() or (folder / "vqvae").is_dir()
    return decoded or len(shape) != 3 or shape[0] not in IMAGE_CHANNELS


def _decoder(
    folder: Path, form: ModelForm, talk: Talk
) -> tuple[TorchNetwork | None, tuple[str, ...]]:
    """Return the pipeline's decoder; when it cannot be used, None and the reason."""
    try:
        return decoder_network(folder, form.sample.shape), ()
    except ModelError as error:
        tell_cause(error)
        talk.warn(f"samples are compared as latents: {error.message}")
        return None, (f"No decoder, samples are compared as latents: {error.message}",)


def _denoiser_folder(folder: Path, pipeline: dict[str, Any], component: str | None) -> Path:
    part = denoiser_part(folder, component)
    if part is not None:
        return part
    if pipeline:
        names = DENOISERS if component is None else (component,)
        parts = ", ".join(name for name in pipeline if not name.startswith("_"))
        raise UsageError(
            f"The pipeline in {folder} has no {' or '.join(names)} with a {CONFIG}; its parts are: {parts or 'none'}.",
            "Name the part with --only; export others to ONNX and give the ONNX file with a YAML.",
        )
    raise UsageError(
        f"{folder} is not a diffusers model: it has neither {INDEX} nor {CONFIG}.",
        "Give the folder that save_pretrained wrote, or an .onnx file.",
    )


def _check_nothing_missing(
    folder: Path, wanted: tuple[WantedInput, ...], additions: Additions
) -> None:
    """Raise one UsageError that lists everything the folder lacks."""
    missing = []
    has_scheduler = any((folder / place / SCHEDULER_FILE).is_file() for place in (".", "scheduler"))
    if additions.scheduler is None and not has_scheduler:
        missing.append("a scheduler: --scheduler FILE_or_folder")
    own_classes = all(item.name == "class_labels" and item.dtype == "int64" for item in wanted)
    if wanted and additions.conditions is None and not own_classes:
        missing.append(f"conditions: --conditions FILE.npz with the arrays {list_inputs(wanted)}")
    if missing:
        raise UsageError(
            f"{folder} does not bring everything that is needed.",
            f"Missing: {'; and '.join(missing)}.",
        )


def _own_conditions(form: ModelForm, config: dict[str, Any], card: dict[str, Any]) -> Conditions:
    """Return a row per class, or nothing for an unconditional model."""
    if not form.wanted:
        return Conditions()
    count = config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 1000
    # A DiT has an embedding more than classes, for none.
    return _every_class(int(count) + (form.class_name == DIT), card)


def _every_class(count: int, card: dict[str, Any]) -> Conditions:
    """Return one row per class; the last is the empty class when the card names one class fewer."""
    names = [str(name) for name in card.get("classes", ())]
    labels = (*names[:count], *(f"class {i}" for i in range(len(names), count)))
    empty = count - 1 if len(names) == count - 1 else None
    return Conditions({"class_labels": np.arange(count, dtype=np.int64)}, count, empty, labels)


def _guidance(additions: Additions, card: dict[str, Any], conditions: Conditions) -> float:
    """Return the guidance scale: the user's, the card's, or 1 (none)."""
    scale = additions.guidance_scale
    if scale is None:
        scale = float(card.get("guidance", 1.0))
    if scale != 1 and conditions.uncond_row is None:
        raise UsageError(
            f"The guidance scale is {scale}, but the conditions have no row for the empty condition.",
            "Put its index as _uncond_row into the conditions file, or use a guidance scale of 1.",
        )
    return float(scale)
