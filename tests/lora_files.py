"""LoRA files for tests: random updates of a model's layers, in the names that trainers write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 3


def layers_of(module: Any, *ends: str) -> dict[str, Any]:
    """The Linear and Conv layers whose names end so, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and name.endswith(ends)
    }


def factors(
    layers: dict[str, Any], seed: int, rank: int = RANK
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random A [r, in, k, k] and B [out, r, 1, 1] per layer."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in layers.items():
        out, *rest = layer.weight.shape
        ones = [1] * (len(rest) - 1)
        a = torch.randn(rank, *rest, generator=random) * 0.3
        found[name] = (a, torch.randn(out, rank, *ones, generator=random) * 0.3)
    return found


def kohya_file(
    path: Path, parts: dict[str, Any], ends: Iterable[str], alphas: tuple[float, ...] = (2.0,)
) -> Path:
    """A file of kohya and A1111: ``lora_unet_...lora_down``, with the ``alphas`` of layers in turn.

    ``parts``: modules by prefix (unet, te, te1, te2).
    """
    tensors = {}
    for number, (prefix, module) in enumerate(parts.items()):
        wrapped = prefix.startswith("te") and not hasattr(module, "text_model")
        for place, (name, (a, b)) in enumerate(factors(layers_of(module, *ends), number).items()):
            full = f"text_model.{name}" if wrapped else name
            stem = f"lora_{prefix}_{full.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = a, b
            tensors[f"{stem}.alpha"] = torch.tensor(alphas[place % len(alphas)])
    save_file(tensors, path, metadata={"format": "pt", "ss_base_model_version": "sd_v1"})
    return path


def diffusers_file(
    path: Path, parts: dict[str, Any], ends: Iterable[str], rank: int = RANK, **metadata: str
) -> Path:
    """A file of diffusers and peft: ``unet.xxx.lora_A.weight``, without alphas."""
    tensors = {}
    for number, (part, module) in enumerate(parts.items()):
        for name, (a, b) in factors(layers_of(module, *ends), number, rank).items():
            tensors[f"{part}.{name}.lora_A.weight"] = a
            tensors[f"{part}.{name}.lora_B.weight"] = b
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path
