"""The inputs of graphs and engines that hold a LoRA: ``MODULE.lora_A`` [R, in], ``MODULE.lora_B`` [out, R]."""

from __future__ import annotations

import json
from collections.abc import Mapping

DOWN, UP = ".lora_A", ".lora_B"
# In a graph's metadata: MODULE -> the Frobenius norm of its weights as JSON, where activations are quantized
# in ranges that a large LoRA leaves.
WEIGHT_NORMS = "mpq_deploy.lora_weight_norms"


def weight_norms(metadata: Mapping[str, str]) -> dict[str, float]:
    """Return what a graph says of its slots' weights. Raises ValueError for what is not that."""
    found = json.loads(metadata.get(WEIGHT_NORMS, "{}"))
    if not isinstance(found, dict):
        raise ValueError(f"{WEIGHT_NORMS} is {type(found).__name__}")
    return {str(name): float(norm) for name, norm in found.items()}


def is_slot(name: str) -> bool:
    """Whether an input holds a factor of a LoRA: where none is given it is zero."""
    return name.endswith((DOWN, UP))
