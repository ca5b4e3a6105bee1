"""Find a model's files: bundled, a folder, an ONNX file, or fetched from the hub."""

from __future__ import annotations

import importlib.util
import re
from importlib import resources
from pathlib import Path

from mpq_deploy.errors import MissingDependencyError, ModelError, NoModelError, UsageError, nearest
from mpq_deploy.models.weight_kinds import PICKLE_ENDINGS
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.libraries import tell_cause
from mpq_deploy.system.names import plain_name
from mpq_deploy.system.progress import Talk

# In order of preference: the first whose weights are there is the default.
DEMOS = ("emoji", "digits")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PARTS = (
    "unet",
    "transformer",
    "unet_ema",
    "transformer_ema",
    "scheduler",
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
    "vae",
    "vqvae",
)
KINDS = ("*.json", "*.safetensors", "merges.txt", "vocab.txt", "spiece.model")
# A checkpoint in one file.
SINGLE_FILE = ".safetensors"
# Second copies of the same weights.
LEFT_OUT = ("*.fp16.*", "*.non_ema.*", "*.bf16.*")
# Files of a diffusers folder that are read: configurations, weights, tokenizers.
INDEX_FILE = "model_index.json"
SOURCE_ENDINGS = (".json", ".safetensors", ".txt", ".model")


def locate(source: str | Path | None, talk: Talk | None = None) -> Path:
    """Return the folder, checkpoint or ONNX file of ``source``; a hub id is fetched.

    Raises NoModelError when there is none, ModelError for a pickle or any other file.
    """
    if source is None or str(source) in DEMOS:
        return bundled_demo(None if source is None else str(source))
    path = Path(source)
    # Path("") is the current folder, which nobody named.
    if source != "" and path.is_dir():
        return _in_folder(path)
    if path.suffix in (".onnx", SINGLE_FILE) and path.is_file():
        return path
    if path.is_file():
        raise ModelError(f"{path} is neither a .safetensors nor an .onnx file.", _other_file(path))
    if is_hub_id(str(source)) and path.suffix not in (".onnx", SINGLE_FILE, *PICKLE_ENDINGS):
        return fetch(str(source), talk or Talk())
    raise NoModelError(
        f"There is no model '{source}'.",
        f"{nearest(str(source), DEMOS)}Give a diffusers folder, a .safetensors or .onnx file, a hub id (org/name), or "
        f"one of the bundled models: {', '.join(DEMOS)}.",
    )


def _in_folder(folder: Path) -> Path:
    """Return ``folder``, or the ONNX file of the denoiser in it."""
    from mpq_deploy.models.optimum_folder import onnx_denoiser

    return onnx_denoiser(folder) or folder


def _other_file(path: Path) -> str:
    """Say what to do with a file that is not ONNX."""
    if path.suffix in PICKLE_ENDINGS:
        return (
            "Pickled checkpoints are refused, because loading them runs their code: load the model in diffusers "
            "if you trust it, and write it with save_pretrained(FOLDER, safe_serialization=True), then give the folder."
        )
    if path.suffix == ".gguf":
        return "A GGUF file is already quantized: give the float checkpoint, as a diffusers folder."
    if path.suffix in (".engine", ".plan", ".trt"):
        return "This is a built engine: give the float checkpoint that it was made from."
    return "Give a diffusers folder, a checkpoint (.safetensors) or an .onnx file."


def source_files(
    source: str | Path | None,
    description: Path | None = None,
    recorded: bool = False,
    config: Path | None = None,
) -> list[tuple[str, Path]]:
    """Return the files that ``open_denoiser(source)`` reads: (name in the model, path), sorted.

    For a checkpoint: itself, and the files of the folder ``config``.
    For an ONNX file: itself, its external data, its YAML and the scheduler that this names; the
    first two alone where its calls were ``recorded``.
    """
    path = locate(source)
    if path.is_dir():
        return folder_files(path)
    if path.suffix == SINGLE_FILE:
        return [(path.name, path), *(folder_files(config) if config is not None else ())]
    from mpq_deploy.graph.load import external_files, read_proto
    from mpq_deploy.models.onnx_file import described

    proto = read_proto(path)
    if recorded:
        return sorted((p.name, p) for p in {path, *external_files(proto, path)})
    names = [[value.name for value in values] for values in (proto.graph.input, proto.graph.output)]
    said, yaml_path = described(path, description, *names)
    files = {path, yaml_path, *external_files(proto, path)}
    scheduler = said.scheduler
    if isinstance(scheduler, str) and (yaml_path.parent / scheduler).is_file():
        files.add(yaml_path.parent / scheduler)
    return sorted((p.name, p) for p in files)


def folder_files(path: Path) -> list[tuple[str, Path]]:
    """Return the files of a diffusers folder that may be read: (name in the folder, path), sorted."""
    parts = dict.fromkeys((*PARTS, *_named_parts(path)))
    folders = [path, *(path / part for part in parts if (path / part).is_dir())]
    files = {
        p
        for folder in folders
        for p in folder.iterdir()
        if p.suffix in SOURCE_ENDINGS and p.is_file()
    }
    return sorted((p.relative_to(path).as_posix(), p) for p in files)


def _named_parts(folder: Path) -> list[str]:
    """Return the parts that a pipeline's index names."""
    index = folder / INDEX_FILE
    entries = read_json_object(index, error=ModelError) if index.is_file() else {}
    return [
        plain_name(name, f"A part that {index} names", ModelError)
        for name in entries
        if not name.startswith("_")
    ]


def bundled_demo(name: str | None = None) -> Path:
    """Return the pipeline folder of a bundled model; None is the default one.

    Raises UsageError for an unknown name, naming the nearest.
    """
    present = {
        demo: path for demo in DEMOS if (path := _folder(demo) / "model_index.json").is_file()
    }
    if name is None:
        name = next(iter(present), DEMOS[0])
    if name not in present:
        raise UsageError(
            f"There is no bundled model '{name}'.",
            f"{nearest(name, present)}Bundled: {', '.join(present)}.",
        )
    return _folder(name)


def _folder(name: str) -> Path:
    return Path(str(resources.files("mpq_deploy"))) / "models" / "demo" / name


def is_hub_id(source: str) -> bool:
    """Say whether ``source`` has the form ``org/name``."""
    return HUB_ID.fullmatch(source) is not None


def _bears_weights(folder: Path) -> bool:
    """Whether the part that denoises has safetensors."""
    from mpq_deploy.models.additions import denoiser_part

    part = denoiser_part(folder, None)
    return part is None or any(part.glob("*.safetensors"))


def fetch_configs(hub_id: str, talk: Talk) -> Path | None:
    """Return the folder with the configurations of the hub's model, without weights; None: not to be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    talk.line(f"  looking for the configuration of {hub_id} on the hub")
    try:
        kinds = [kind for kind in KINDS if not kind.endswith(SINGLE_FILE)]
        patterns = [INDEX_FILE, *(f"*/{kind}" for kind in kinds)]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, HFValidationError, RevisionResolutionError) as error:
        tell_cause(error)
        return None


def fetch(hub_id: str, talk: Talk) -> Path:
    """Return the local folder (or ONNX file) of the hub's model, downloading what is not there yet.

    Raises UsageError when there is no such model, no access to it or no network.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingDependencyError("huggingface_hub", "torch", f"Fetching {hub_id}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    patterns = [
        "model_index.json",
        "config.json",
        "diffusion_pytorch_model*.safetensors*",
        "scheduler_config.json",
    ]
    patterns += [f"*/{kind}" for kind in KINDS]
    talk.line(f"  looking for {hub_id} on the hub")
    try:
        folder = Path(
            snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=list(LEFT_OUT))
        )
        if not _bears_weights(folder):
            # The repository has them in half precision alone, or as ONNX.
            patterns += [f"{place}model.onnx*" for place in ("", "unet/", "transformer/")]
            folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
        return _in_folder(folder)
    except (OSError, HFValidationError, RevisionResolutionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise NoModelError(
            f"There is no file or folder '{hub_id}', and it cannot be fetched as a hub id: {reason[0]}",
            "Check the name and the network; or download the model elsewhere and give its folder.",
        ) from error
