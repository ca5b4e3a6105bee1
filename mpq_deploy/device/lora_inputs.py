"""The inputs of graphs and engines that hold a LoRA: ``MODULE.lora_A`` [R, in], ``MODULE.lora_B`` [out, R]."""

from __future__ import annotations

DOWN, UP = ".lora_A", ".lora_B"


def is_slot(name: str) -> bool:
    """Whether an input holds a factor of a LoRA: where none is given it is zero."""
    return name.endswith((DOWN, UP))
