"""Checkpoints in one file, as CompVis, Stability and ComfyUI name their weights: written as a folder.

In: a safetensors file, and a folder with the configurations of its pipeline. Out: the same model as
a pipeline's folder, which is then opened as any other. diffusers converts the names; what the file
lacks is named, and pickles are never read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

from mpq_deploy.errors import DiskError, ModelError, MpqError, UsageError
from mpq_deploy.models.additions import CONFIG, DENOISERS, INDEX, LEFT_OUT, pipeline_index
from mpq_deploy.models.locate import SINGLE_FILE, fetch_configs, folder_files
from mpq_deploy.models.weight_files import DAMAGED, STEMS, Stored, check_config, read_headers
from mpq_deploy.models.weight_kinds import (
    PICKLE_ENDINGS,
    is_lora,
    named_tensors,
    refuse_other_names,
    refuse_weights,
)
from mpq_deploy.system.files import canonical_json, file_digest
from mpq_deploy.system.hub_cache import refuse_links_out
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.libraries import gist, no_bars, silenced
from mpq_deploy.system.names import printable
from mpq_deploy.system.progress import Talk

KEY, SCHEDULER = "checkpoint.json", "scheduler"
# A change of what is written raises it.
FORMAT = 1
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
# Where such files keep their autoencoder; without any of these names diffusers would guess.
VAE = ("first_stage_model.", "vae.")
# The kind that diffusers takes what it does not know for, and what shows that a file is of it.
UNKNOWN_KIND, OF_UNKNOWN = "v1", "model.diffusion_model."
# The class whose weights are converted one to one.
OF_UNET = "UNet2DConditionModel"
# Copies of weights that loading leaves: the average of training.
AVERAGE = re.compile(r"^model_ema\.")
LACKED = re.compile(r"^(\w+) = \w+\.from_pretrained", re.MULTILINE)
LAYOUT = (
    "the folder of its pipeline in diffusers' layout, of which the weights may be left out: "
    f"{INDEX}, scheduler/, tokenizer/, and the {CONFIG} of each part"
)


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint's header, and what diffusers takes it for: ``kind``, and the ``repository`` like it."""

    path: Path
    stored: Stored
    kind: str
    repository: str

    @property
    def dtype(self) -> str:
        """The type that holds every weight: the file's own, or float32 where it has several."""
        # Constants of the noise schedule have no part before their name.
        weights = [n for n in self.stored.types if "." in n and not AVERAGE.search(n)]
        types = {self.stored.types[name] for name in weights} & set(FLOATS)
        return FLOATS[types.pop()] if len(types) == 1 else "float32"


def read_single_file(path: Path) -> SingleFile:
    """Look at a checkpoint's header.

    Raises ModelError for quantized weights and unknown kinds, UsageError for a LoRA or a folder's file.
    """
    if (path.parent / CONFIG).is_file() and path.name.startswith(STEMS):
        raise UsageError(
            f"{path} holds the weights of a model folder: its {CONFIG} is beside it.",
            f"Give the folder: {path.parent}",
        )
    stored = read_headers([path], DAMAGED)
    if is_lora(stored.types):
        raise UsageError(
            f"{path} is a LoRA, not a model.",
            f"Give the model that it was trained for, and --lora {path}",
        )
    refuse_weights(stored.types, path)
    kind, repository = _kind(stored, path)
    return SingleFile(path, stored, kind, repository)


def _kind(stored: Stored, path: Path) -> tuple[str, str]:
    import torch
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        infer_diffusers_model_type,
    )

    shown = {n: torch.empty(shape, device="meta") for n, shape in stored.shapes.items()}
    try:
        kind = str(infer_diffusers_model_type(shown))
        repository = str(fetch_diffusers_config(shown)["pretrained_model_name_or_path"])
    except Exception as error:
        # It looks into tensors of kinds that denoise nothing (ControlNets).
        raise ModelError(
            f"diffusers cannot tell what {path} is: {gist(error)}", "Give a diffusers folder."
        ) from error
    if kind == UNKNOWN_KIND and not any(name.startswith(OF_UNKNOWN) for name in stored.shapes):
        raise ModelError(
            f"{path} is not a checkpoint that diffusers knows; it holds {named_tensors(stored.shapes)}.",
            "Load it in the tool that made it and write it with save_pretrained(FOLDER), then give the folder.",
        )
    return kind, repository


def unpack(
    path: Path, config: Path | None, place: Path, talk: Talk, lone: bool = False
) -> tuple[Path, str]:
    """Return a folder in ``place`` with the model of the checkpoint ``path``, and a note for the user.

    ``config``: the folder with its configurations; None: the hub's, or its copy here. ``lone``: a
    denoiser alone will do, as its inputs are given. What was written before from the same files is
    kept. Raises UsageError for a missing or incomplete configuration, ModelError for a file that is
    none of diffusers', does not fit the configuration, or lacks weights.
    """
    file = read_single_file(path)
    folder = _configuration(file, config, talk)
    note = _told(file, config)
    key = canonical_json(
        {
            "format": FORMAT,
            "checkpoint": file_digest(path),
            "config": {name: file_digest(one) for name, one in folder_files(folder)},
            "diffusers": metadata.version("diffusers"),
            "lone": lone,
        }
    )
    found = place / path.stem
    if (place / KEY).is_file() and (place / KEY).read_text(encoding="utf-8") == key:
        return found, note
    talk.line(f"  {note}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        _write(file, folder, found, lone)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    (place / KEY).write_text(key, encoding="utf-8")
    return found, note


def _configuration(file: SingleFile, config: Path | None, talk: Talk) -> Path:
    """Return the folder with the configurations, whose files are checked as a model's."""
    needed = f"Give --config FOLDER: {LAYOUT} (such as those of {file.repository})."
    folder = config if config is not None else fetch_configs(file.repository, talk)
    if folder is None:
        raise UsageError(
            f"{file.path} holds only weights, and the configuration of its kind, {file.kind}, was not found.",
            needed,
        )
    if not (folder / INDEX).is_file() and not (folder / CONFIG).is_file():
        there = "has neither" if folder.is_dir() else "is not a folder with"
        raise UsageError(f"--config {folder} {there} {INDEX} or {CONFIG}.", needed)
    files = folder_files(folder)
    refuse_links_out(one for _, one in files)
    for part in [folder, *(one for one in folder.iterdir() if one.is_dir())]:
        pickled = sorted(p.name for p in part.iterdir() if p.suffix in PICKLE_ENDINGS)
        if pickled:
            raise ModelError(
                f"{part} holds pickled weights ({pickled[0]}), which are never read: loading them can run any code.",
                "Remove them from the folder of --config, or save them as safetensors.",
            )
    return folder


def _write(file: SingleFile, folder: Path, out: Path, lone: bool) -> None:
    """Write the model of ``file``, configured by ``folder``, to ``out``."""
    if not (folder / INDEX).is_file():
        _write_denoiser(file, folder, "", out)
        return
    index = pipeline_index(folder)
    part = next((name for name in DENOISERS if (folder / name / CONFIG).is_file()), None)
    if part is None:
        raise UsageError(
            f"--config {folder} configures no {' or '.join(DENOISERS[:2])}.", f"Give {LAYOUT}."
        )
    try:
        pipeline = _pipeline(file, folder, index)
    except _LacksWeightsError as lack:
        if lone:
            _write_denoiser(file, folder, part, out)
            return
        raise ModelError(
            f"{file.path} holds no weights of the {lack.part}, and neither does {folder / lack.part}.",
            f"Put them there as safetensors; or give the inputs of the {part} yourself: --conditions FILE.npz.",
        ) from lack
    _check_whole(file, getattr(pipeline, part, None))
    _save(pipeline, out)


def _save(model: Any, out: Path) -> None:
    """Write a pipeline or a module. Raises DiskError."""
    from safetensors import SafetensorError

    try:
        with no_bars("diffusers"), no_bars("transformers"), silenced():
            model.save_pretrained(out, safe_serialization=True)
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"{out} cannot be written: {gist(error)}.",
            "A checkpoint is written as a folder, as large as its file: free space, or give another run folder (-o).",
        ) from error


def _check_whole(file: SingleFile, denoiser: Any) -> None:
    """Raise ModelError for weights of a UNet that diffusers' conversion has left out."""
    if type(denoiser).__name__ != OF_UNET:
        return
    own = {n: s for n, s in file.stored.shapes.items() if n.startswith(OF_UNKNOWN)}
    held, taken = (
        sum(map(prod, shapes))
        for shapes in (own.values(), (v.shape for v in denoiser.state_dict().values()))
    )
    if held > taken:
        raise ModelError(
            f"{file.path} holds {held - taken:,} values more under {OF_UNKNOWN} than a {OF_UNET} of this "
            "configuration takes.",
            "It has layers beside (motion modules, adapters), or is of another configuration: load it where it was "
            "made and write it with save_pretrained(FOLDER), then give the folder.",
        )


class _LacksWeightsError(Exception):
    """Neither the checkpoint nor the folder has the weights of ``part``."""

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part


def _pipeline(file: SingleFile, folder: Path, index: Mapping[str, Any]) -> Any:
    """Return the pipeline with the checkpoint's weights, and the folder's for parts that it lacks."""
    from mpq_deploy.calls.pipeline_runs import pipeline_class, refuse_own_code

    found = pipeline_class(index, folder)
    if not hasattr(found, "from_single_file"):
        raise UsageError(
            f"diffusers cannot load a single-file checkpoint for {found.__name__}.",
            "Write it with save_pretrained(FOLDER) in the tool that made it, and give the folder.",
        )
    given: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or not entry[0]:
            continue
        part = folder / name
        if name in LEFT_OUT or (not part.is_dir() and name in found._optional_components):
            given[name] = None
            continue
        if not part.is_dir():
            raise UsageError(f"--config {folder} has no {name}.", f"Give {LAYOUT}.")
        refuse_own_code(part)
        _check_part(file, part)
        if "vae" in name and not any(n.startswith(VAE) for n in file.stored.shapes):
            given[name] = _from_folder(part, entry)
    while True:
        try:
            return _converted(found, file, folder, given)
        except _LacksWeightsError as lack:
            given[lack.part] = _from_folder(folder / lack.part, index[lack.part])


def _from_folder(part: Path, entry: list[str]) -> Any:
    """Load a part of the configuration's folder, in float32, where it has weights."""
    from mpq_deploy.calls.pipeline_runs import checked_variant, load_part

    if not any(part.glob(f"*{SINGLE_FILE}")):
        raise _LacksWeightsError(part.name)
    with no_bars("diffusers"), no_bars("transformers"), silenced():
        return load_part(part, entry, checked_variant(part))


def _check_part(file: SingleFile, part: Path) -> None:
    """Refuse numbers of a diffusers class's configuration that no weight of the file bears out."""
    if not (part / CONFIG).is_file():
        return
    config = read_json_object(part / CONFIG, infinite=True, error=ModelError)
    if "_class_name" in config and not any(part.glob(f"*{SINGLE_FILE}")):
        check_config(config, file.stored, part)


def _converted(
    found: Any, file: SingleFile, folder: Path, given: dict[str, Any], **more: Any
) -> Any:
    """Load by diffusers' from_single_file. Raises ModelError for weights that are missing or do not fit."""
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    options = {"config": str(folder), "local_files_only": True, **more}
    options["torch_dtype"] = getattr(torch, file.dtype)
    with _loads_noted() as loads, no_bars("diffusers"), silenced():
        try:
            made = found.from_single_file(str(file.path), **options, **given)
        except SingleFileComponentError as error:
            lacked = LACKED.search(str(error.args[0] if error.args else error))
            if lacked and lacked[1] not in given:
                raise _LacksWeightsError(lacked[1]) from error
            raise ModelError(f"{file.path}: {gist(error)}", f"Give {LAYOUT}.") from error
        except (MpqError, MemoryError):
            raise
        except Exception as error:
            # Converters raise anything at all for configurations that are not the file's.
            raise ModelError(
                f"{file.path} (kind {file.kind}) does not fit the configuration in {folder}: {gist(error)}",
                f"Give the configuration that it was trained with, such as those of {file.repository}.",
            ) from error
    for name, missing in loads:
        refuse_other_names(missing, (), name, file.path)
    return made


@contextmanager
def _loads_noted() -> Iterator[list[tuple[str, list[str]]]]:
    """Note, for every module that is loaded, its class and the weights that it did not get.

    diffusers would keep random values for them, or with accelerate nothing at all: in the block it
    loads as where accelerate is missing, through torch.
    """
    import torch
    from diffusers.loaders import single_file_model, single_file_utils

    loads: list[tuple[str, list[str]]] = []
    original = torch.nn.Module.load_state_dict

    def noted(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, state_dict, *args, **kwargs)
        own = dict(self.named_parameters())
        loads.append((type(self).__name__, [name for name in result.missing_keys if name in own]))
        return result

    changes = (
        (torch.nn.Module, "load_state_dict", noted),
        (single_file_model, "_LOW_CPU_MEM_USAGE_DEFAULT", False),
        (single_file_utils, "is_accelerate_available", lambda: False),
    )
    before = [getattr(place, name) for place, name, _ in changes]
    for place, name, value in changes:
        setattr(place, name, value)
    try:
        yield loads
    finally:
        for (place, name, _), value in zip(changes, before):
            setattr(place, name, value)


def _write_denoiser(file: SingleFile, folder: Path, part: str, out: Path) -> None:
    """Write the denoiser alone, with the scheduler of the folder where it has one."""
    from mpq_deploy.models.model_form import model_class

    place = folder / part
    config = read_json_object(place / CONFIG, infinite=True, error=ModelError)
    check_config(config, file.stored, place)
    found = model_class(config, place, in_pipeline=True)
    if not hasattr(found, "from_single_file"):
        raise UsageError(
            f"diffusers cannot load a single-file checkpoint for {found.__name__}.",
            "Write it with save_pretrained(FOLDER) in the tool that made it, and give the folder.",
        )
    more = {"subfolder": part} if part else {}
    model = _converted(found, file, folder, {}, **more)
    _check_whole(file, model)
    _save(model, out / part)
    if (folder / SCHEDULER).is_dir():
        shutil.copytree(folder / SCHEDULER, out / SCHEDULER)


def _told(file: SingleFile, config: Path | None) -> str:
    """Say what a checkpoint is, how it is configured, and what it holds beside."""
    said = f"The checkpoint {printable(file.path.name)} is of diffusers' kind {file.kind}, configured by "
    said += printable(str(config or file.repository))
    average = sum(1 for name in file.stored.shapes if AVERAGE.search(name))
    return f"{said}; its average of training (model_ema) is not used" if average else said
