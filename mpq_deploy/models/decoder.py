"""The decoder of a latent pipeline as a network: denoised latents in, images in [-1, 1] out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpq_deploy.errors import ModelError
from mpq_deploy.models.additions import read_json
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.models.unet import WEIGHTS_NAME, find_weights, load_pretrained

DECODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
FOLDERS = ("vae", "vqvae")
# Stable Diffusion's scaling factor, which old configurations leave out (diffusers' default too).
SCALING_FACTOR = 0.18215


def decoder_network(
    folder: Path,
    latents: tuple[int, ...],
    unpack: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> TorchNetwork | None:
    """Return the decoder of a pipeline folder, or None where it has none.

    Its input ``latents`` float32 [N, *latents] are the denoiser's samples: the scaling is part of
    the network, and so is ``unpack``, which lays them out as [N, C, H, W]. Raises ModelError for a
    class that is not supported or weights that cannot be loaded.
    """
    loaded = load_decoder(folder)
    if loaded is None:
        return None
    module, scale, shift = loaded

    def call(model: Any, values: torch.Tensor) -> torch.Tensor:
        laid_out = values if unpack is None else unpack(values)
        decoded: torch.Tensor = model.decode(laid_out / scale + shift, return_dict=False)[0]
        return decoded

    return TorchNetwork(module, (InputSpec(name="latents", shape=latents),), "image", call)


def load_decoder(folder: Path) -> tuple[torch.nn.Module, float, float] | None:
    """Return the decoding module, its scaling factor and its shift; None where there is none.

    Latents are decoded as latents / scale + shift. Raises as ``decoder_network`` does.
    """
    part = next(
        (folder / name for name in FOLDERS if (folder / name / "config.json").is_file()), None
    )
    if part is None:
        return None
    config = read_json(part / "config.json")
    name = str(config.get("_class_name"))
    if name not in DECODERS:
        raise ModelError(
            f"The decoder in {part} is a {name}.", f"Supported: {', '.join(DECODERS)}."
        )
    import diffusers

    module = load_pretrained(getattr(diffusers, name), part, find_weights(part, WEIGHTS_NAME))
    scale = float(
        config.get("scaling_factor") or (1.0 if name == "AutoencoderTiny" else SCALING_FACTOR)
    )
    return module, scale, float(config.get("shift_factor") or 0.0)


def decoder_upscale(folder: Path) -> int:
    """Return how many pixels a latent covers along each axis (1 without a decoder)."""
    for name in FOLDERS:
        file = folder / name / "config.json"
        if file.is_file():
            return int(2 ** (len(read_json(file).get("block_out_channels", (1,))) - 1))
    return 1
