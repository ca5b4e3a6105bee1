"""What the user says of a LoRA: ``FILE[:SCALE]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mpq_deploy.errors import UsageError
from mpq_deploy.models.weight_kinds import PICKLE_ENDINGS
from mpq_deploy.system.names import printable

OTHER_FILE = "Give the LoRA's own .safetensors file, as diffusers or its trainer wrote it."


@dataclass(frozen=True)
class LoraOption:
    """A LoRA file that the user wants fused, and by how much."""

    file: Path
    scale: float = 1.0


def parse_lora(text: str) -> LoraOption:
    """Read ``FILE[:SCALE]``. Raises UsageError for a scale that is not a number, 0 or not finite."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).is_file():
        return LoraOption(Path(text).expanduser())
    path = Path(head).expanduser()
    try:
        scale = float(tail)
    except ValueError as error:
        raise UsageError(
            f"The scale '{printable(tail[:80])}' of the LoRA {printable(head)} is not a number.",
            "Write it as FILE.safetensors:0.8; without a scale it is 1.",
        ) from error
    if scale == 0 or not math.isfinite(scale):
        raise UsageError(
            f"The scale of the LoRA {printable(head)} is {tail}; it must be finite and not 0.",
            "Give another, such as 0.8, or leave the LoRA out.",
        )
    return LoraOption(path, scale)


def check_lora(path: Path) -> None:
    """Raise UsageError where there is no such file, or where it is no safetensors."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise UsageError(f"The LoRA {path} {what}.", "Give a file: --lora FILE.safetensors[:SCALE]")
    if path.suffix in PICKLE_ENDINGS:
        raise UsageError(
            f"The LoRA {path} is pickled, which is refused: loading it can run any code.",
            "If you trust the file, load it with torch.load and write the tensors with safetensors.torch.save_file.",
        )
    if path.suffix != ".safetensors":
        raise UsageError(f"The LoRA {path} is not a .safetensors file.", OTHER_FILE)
