"""What the weights of a folder are by their names and types: a float model's own, or anything else.

In: configurations and the headers of safetensors. Out: nothing, or a ModelError: weights that
another tool has quantized and adapters that were not merged are refused before anything is loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mpq_deploy.errors import ModelError
from mpq_deploy.system.names import printable

# Formats that run code when they are loaded.
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOAT_CHECKPOINT = (
    "Give the float checkpoint that it was made from: mpq-deploy quantizes it itself."
)
FUSE = (
    "Give the base model's folder and the LoRA's own file: --lora FILE.safetensors. Or save it fused: "
    "pipeline.fuse_lora() and pipeline.unload_lora_weights() before save_pretrained(FOLDER)."
)
WITHOUT_ADAPTER = (
    "Give the folder of the base model (pipeline.unload_ip_adapter(), then save_pretrained), or export it with "
    "image_embeds as an input to ONNX and give that with a YAML."
)
# Entries of config.json by which quantizers leave their settings.
SETTINGS = ("quantization_config", "compression_config", "quantize_config")
# Types of safetensors that no float weight has.
TYPES = ("F8", "F6", "F4", "I8", "U8", "I4", "U4")
# Names that quantizers give to codes and scales: FP8 files, bitsandbytes, GPTQ and AWQ,
# compressed-tensors, quanto, SVDQuant.
QUANTIZED = re.compile(
    r"(^|[._])(weight_scale(_inv|_2)?|scale_weight|scaled_fp8|absmax|nested_absmax|quant_map|"
    r"quant_state|qweight|qzeros|SCB|weight_packed|wscales|weight\._(data|scale))(\.|$)"
)
# Kinds of tensors that a class does not take, by name; the first that fits.
KINDS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    (
        "an unfused LoRA",
        re.compile(
            r"(^|[._])(lora[._](A|B|down|up|embedding_[AB]|magnitude_vector)|base_layer|"
            r"hada_w\d\w*|lokr_w\d\w*)(\.|$)"
        ),
        FUSE,
    ),
    ("an IP-Adapter", re.compile(r"(to_[kv]_ip|ip_adapter)([._]|$)"), WITHOUT_ADAPTER),
    (
        "motion modules",
        re.compile(r"(^|\.)motion_modules?\."),
        "Give the folder of the image model, without AnimateDiff.",
    ),
    (
        "GLIGEN's layers",
        re.compile(r"(^|\.)(fuser|position_net)\."),
        "Give the folder of the base model.",
    ),
    (
        "the original layout, not that of diffusers",
        re.compile(r"^(model\.diffusion_model|first_stage_model)\."),
        "Load it in diffusers with from_single_file, and write it with save_pretrained(FOLDER).",
    ),
    (
        "names of a wrapped module",
        re.compile(r"^(module|_orig_mod|ema_model)\."),
        "Unwrap the model (accelerator.unwrap_model, or ._orig_mod), then save it again.",
    ),
)
# Kinds that are refused by their names alone, whatever the class is.
NEVER = ("an unfused LoRA", "an IP-Adapter")
OTHER = "The file belongs to another config.json, or was saved incompletely."
NAMED = 3


def refuse_quantized_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError where the configuration at ``path`` says that the weights are quantized."""
    for entry in SETTINGS:
        settings = config.get(entry)
        if settings:
            named = settings.get("quant_method") if isinstance(settings, dict) else None
            how = f" ({printable(str(named)[:80])})" if named else ""
            raise ModelError(
                f"The model in {path.parent} is already quantized: its {path.name} has {entry}{how}.",
                FLOAT_CHECKPOINT,
            )


def refuse_weights(types: Mapping[str, str], folder: Path) -> None:
    """Raise ModelError for quantized weights and unmerged adapters; ``types`` by tensor, of the headers."""
    names = [name for name in types if QUANTIZED.search(name)]
    named = names or [name for name, kind in types.items() if kind.startswith(TYPES)]
    if named:
        first = f"'{printable(named[0][:200])}' ({types[named[0]]})"
        raise ModelError(
            f"The model in {folder} is already quantized: {len(named):,} of its tensors are codes or scales, "
            f"such as {first}.",
            FLOAT_CHECKPOINT,
        )
    for kind, pattern, remedy in KINDS:
        held = [name for name in types if pattern.search(name)]
        if kind in NEVER and held:
            raise ModelError(f"The weights in {folder} hold {kind}: {named_tensors(held)}.", remedy)


def is_lora(names: Collection[str]) -> bool:
    """Whether most tensors are those of a LoRA and its alphas: the file holds no model beside it."""
    held = [name for name in names if KINDS[0][1].search(name) or name.endswith(".alpha")]
    return 2 * len(held) > len(names)


def refuse_other_names(
    missing: Collection[str], unexpected: Collection[str], class_name: str, folder: Path
) -> None:
    """Raise ModelError naming what the file lacks and what its class does not take, by kind."""
    said, remedy = [], OTHER
    if unexpected:
        kinds = Counter(_kind(name) for name in unexpected)
        told = [kind for kind, _ in kinds.most_common() if kind]
        is_a = f" ({', '.join(told)})" if told else ""
        said.append(
            f"hold {len(unexpected):,} tensors that {class_name} does not take{is_a}: {named_tensors(unexpected)}"
        )
        remedy = next((fix for kind, _, fix in KINDS if told and kind == told[0]), OTHER)
    if missing:
        said.append(f"lack {len(missing):,} that it needs: {named_tensors(missing)}")
    if said:
        raise ModelError(f"The weights in {folder} {', and '.join(said)}.", remedy)


def _kind(name: str) -> str:
    return next((kind for kind, pattern, _ in KINDS if pattern.search(name)), "")


def named_tensors(names: Collection[str]) -> str:
    """Name tensors for an error, those that differ in their numbers alone once."""
    alike: dict[str, str] = {}
    for name in sorted(names):
        alike.setdefault(re.sub(r"\d+", "*", name), name)
    shown = ", ".join(f"'{printable(name[:200])}'" for name in list(alike.values())[:NAMED])
    return f"{shown} and others" if len(names) > min(len(alike), NAMED) else shown
