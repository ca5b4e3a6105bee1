"""What LoRA files name their tensors, and what peft says of their scales; no torch, so devices read it too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpq_deploy.errors import ModelError
from mpq_deploy.models.lora_option import OTHER_FILE
from mpq_deploy.models.weight_kinds import named_tensors
from mpq_deploy.system.names import printable

FLOATS = ("F16", "BF16", "F32", "F64")
FUSE_THERE = "Fuse it with the tool that made it, write the result with save_pretrained(FOLDER), and give that folder."
# Other kinds of adapters, by the names of their tensors; diffusers would drop parts of some.
OTHERS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("a DoRA (magnitudes of weights)", re.compile(r"dora_scale|lora_magnitude_vector"), FUSE_THERE),
    ("a LoHa (Hadamard products)", re.compile(r"\.hada_"), FUSE_THERE),
    ("a LoKr (Kronecker products)", re.compile(r"\.lokr_"), FUSE_THERE),
    ("a LoCon of three factors (lora_mid)", re.compile(r"\.lora_mid\."), FUSE_THERE),
    ("a GLoRA, OFT or (IA)3", re.compile(r"\.(a1|b1|oft_blocks|oft_diag|on_input)\b"), FUSE_THERE),
    ("biases of a LoRA", re.compile(r"lora_(B|up)\.(\w+\.)?bias$"), FUSE_THERE),
    ("differences of whole weights", re.compile(r"\.(diff|diff_b|set_weight)$"), FUSE_THERE),
    (
        "an adapter as peft saves it, whose alpha is in another file",
        re.compile(r"^base_model\.model\."),
        "Save it with the pipeline's own save_lora_weights, which writes all into one file.",
    ),
)
DOWN = re.compile(r"(lora_down|lora_A|lora\.down|\.down)(\.[\w-]+)?\.weight$")
_UP = (
    ("lora_down", "lora_up"),
    ("lora_A", "lora_B"),
    ("lora.down", "lora.up"),
    (".down", ".up"),
)
# Where diffusers writes peft's settings into a file, and trainers the base model.
SETTINGS, BASES = "lora_adapter_metadata", ("modelspec.architecture", "ss_base_model_version")


def check_names(types: Mapping[str, str], path: Path) -> None:
    """Refuse other adapters, quantized tensors, and files of no adapter at all."""
    for kind, pattern, remedy in OTHERS:
        held = [name for name in types if pattern.search(name)]
        if held:
            raise ModelError(f"{path} holds {kind}: {named_tensors(held)}.", remedy)
    other = [name for name, kind in types.items() if kind not in FLOATS and "alpha" not in name]
    if other:
        raise ModelError(
            f"{path} holds tensors of the type {types[other[0]]}: {named_tensors(other)}.",
            "Give the LoRA in float16, bfloat16 or float32.",
        )
    if not any(DOWN.search(name) for name in types):
        held_here = f": its tensors are {named_tensors(types)}" if types else ""
        raise ModelError(f"{path} holds no LoRA{held_here}.", OTHER_FILE)


def up_of(down: str) -> str:
    """Return the name of the factor B beside that of A."""
    old, new = next((old, new) for old, new in _UP if old in down)
    head, tail = down.rsplit(old, 1)
    return f"{head}{new}{tail}"


def plain_shape(shape: list[int]) -> list[int]:
    """Return the shape of a weight without trailing ones: a Linear layer is a 1 x 1 convolution."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def peft_settings(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return peft's settings by part and name (``unet.lora_alpha``); none where the file has none."""
    text = metadata.get(SETTINGS)
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"The {SETTINGS} in {path} is not JSON.", OTHER_FILE) from error
    return settings if isinstance(settings, dict) else {}


def peft_scale(settings: Mapping[str, Any], part: str, layer: str, rank: int, path: Path) -> float:
    """Return alpha / rank (of rsLoRA alpha / sqrt(rank)) by peft's settings; without any 1."""
    alpha = settings.get(f"{part}.lora_alpha")
    if alpha is None:
        return 1.0
    patterns = settings.get(f"{part}.alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        name = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", name):
            raise ModelError(
                f"The alpha_pattern '{printable(pattern[:80])}' in {path} is a regular expression.",
                FUSE_THERE,
            )
        if layer == name or layer.endswith(f".{name}"):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ModelError(
            f"The lora_alpha of {part} in {path} is {alpha!r}, not a number.", OTHER_FILE
        )
    root = settings.get(f"{part}.use_rslora") is True
    return float(alpha) / (math.sqrt(rank) if root else rank)
