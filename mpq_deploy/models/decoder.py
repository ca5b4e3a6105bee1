"""The decoder of a latent pipeline as a network: denoised latents in, images in [-1, 1] out."""

from __future__ import annotations

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


def decoder_network(folder: Path, latents: tuple[int, ...]) -> TorchNetwork | None:
    """Return the decoder of a pipeline folder, or None where it has none.

    Its input ``latents`` float32 [N, *latents] are the denoiser's samples: the scaling is part of
    the network, and so are the latents' mean and deviation where its configuration has them. Raises
    ModelError for a class that is not supported or weights that cannot be loaded.
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
    shift = float(config.get("shift_factor") or 0.0)
    mean, deviation = (
        torch.tensor(config.get(key) or [default], dtype=torch.float32).reshape(1, -1, 1, 1)
        for key, default in (("latents_mean", shift), ("latents_std", 1.0))
    )

    def call(model: Any, values: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = model.decode(
            values * (deviation / scale) + mean, return_dict=False
        )[0]
        return decoded

    return TorchNetwork(module, (InputSpec(name="latents", shape=latents),), "image", call)
