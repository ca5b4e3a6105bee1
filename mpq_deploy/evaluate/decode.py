"""Latents to images, through the model's decoder in ONNX Runtime, in float for every variant alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.runtime.ort import BatchSession, make_session
from mpq_deploy.system.progress import Talk


def decoder_path(spec: DenoiserSpec, folder: Path) -> Path | None:
    """Return the decoder that ``spec`` names, in ``folder``; None when it names none.

    Raises ModelError when the file is missing or lies outside the folder.
    """
    if spec.decoder is None:
        return None
    path = folder / spec.decoder
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(
            f"The decoder '{spec.decoder}' is not in {folder}.",
            "Export the model again, or leave the decoder out: latents are then compared as such.",
        )
    return path


def decode(path: Path, latents: Array, batch_size: int, talk: Talk) -> Array:
    """Return the images of ``latents`` [N, ...], float32 [N, C, H, W].

    The decoder takes the denoiser's samples as they are: any scaling factor is part of its graph.
    """
    decoder = BatchSession(lambda places: make_session(path, 0, places))
    feed = decoder.session.get_inputs()[0].name
    images = []
    with talk.bar("decode", len(latents)) as advance:
        for start in range(0, len(latents), batch_size):
            chunk = np.asarray(latents[start : start + batch_size], np.float32)
            try:
                images.append(decoder.run({feed: chunk}))
            except ModelError as error:
                raise ModelError(f"The decoder {path.name} failed. {error.message}") from error
            advance(len(chunk))
    decoded = np.concatenate(images)
    if not np.isfinite(decoded).all():
        raise ModelError(
            f"The decoder {path.name} gives images that are not finite.", "Check its weights."
        )
    return decoded
