"""A model of the Hugging Face hub, by id: only configuration, tokenizer and safetensors files are fetched."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from mpq_deploy.errors import MissingDependencyError, UsageError
from mpq_deploy.system.progress import Talk

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PARTS = (
    "unet",
    "transformer",
    "scheduler",
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
    "vae",
    "vqvae",
)
# Formats that run code when they are loaded.
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
KINDS = ("*.json", "*.safetensors", "merges.txt", "vocab.txt", "spiece.model")
# Second copies of the same weights.
LEFT_OUT = ("*.fp16.*", "*.non_ema.*", "*.bf16.*")


def is_hub_id(source: str) -> bool:
    """Say whether ``source`` has the form ``org/name``."""
    return HUB_ID.fullmatch(source) is not None


def fetch(hub_id: str, talk: Talk) -> Path:
    """Return the local folder of the hub's model, downloading what is not there yet.

    Raises UsageError when there is no such model, no access to it or no network.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingDependencyError("huggingface_hub", "torch", f"Fetching {hub_id}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    wanted = ["model_index.json", "config.json", "diffusion_pytorch_model*.safetensors*", "scheduler_config.json"]
    wanted += [f"{part}/{kind}" for part in PARTS for kind in KINDS]
    talk.line(f"  looking for {hub_id} on the hub")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=list(LEFT_OUT)))
    except (OSError, HFValidationError, RevisionResolutionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"There is no file or folder '{hub_id}' here, and as a hub id it cannot be fetched: {reason[0]}",
            "Check the name and the network; or download the model elsewhere and give its folder.",
        ) from error
