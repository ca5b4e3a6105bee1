"""Every part of a diffusers pipeline as a float ONNX graph, as generation calls it.

In: a pipeline folder. Out: ``{part: ONNX file}`` with the names of ``model_index.json``, the VAE as
``vae_decoder`` (``z`` to ``image``) and ``vae_encoder`` (``sample`` to ``moments``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mpq_deploy.calls.pipeline_runs import load_pipeline
from mpq_deploy.device.generate.generation_folder import POOLED, SD, STATES, TEXT_OUTPUTS
from mpq_deploy.errors import ModelError
from mpq_deploy.models.additions import Additions, pipeline_index
from mpq_deploy.models.export import MODEL, check_finite, export_denoiser, save_model
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import NO_SIZES, ImageSizes

ENCODED, DECODED = "sample", "z"


def export_pipeline(
    folder: Path,
    kind: str,
    out: Path,
    *,
    images: bool = False,
    talk: Talk | None = None,
    sizes: ImageSizes = NO_SIZES,
) -> dict[str, Path]:
    """Write the parts of the pipeline in ``folder`` to ``out/NAME/model.onnx``; return the files.

    ``images``: with the VAE's encoder, for pipelines that are given images. ``sizes``: of the
    images; empty for that of the pipeline's default call. Raises ModelError for a part that cannot
    be exported.
    """
    talk = talk or Talk()
    pipeline = load_pipeline(folder, pipeline_index(folder))
    networks = text_networks(pipeline, kind)
    denoiser = open_denoiser(folder, Additions(sizes=sizes), talk)
    sample = denoiser.spec.sample
    name = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    export_denoiser(denoiser, out / name, talk)
    files = {name: out / name / MODEL}
    factor = int(pipeline.vae_scale_factor)
    latents = [(one.height // factor, one.width // factor) for one in sizes]
    latents = latents or [latent_size(shape) for shape in sample.shapes]
    networks |= vae_networks(pipeline, latents, images)
    for part, network in networks.items():
        model = network.to_onnx(talk)
        check_finite(model)
        (out / part).mkdir(parents=True, exist_ok=True)
        files[part] = out / part / MODEL
        save_model(model, files[part])
    return files


def text_networks(pipeline: Any, kind: str) -> dict[str, TorchNetwork]:
    """Return the text encoders with the outputs that ``kind`` takes of each."""
    networks = {}
    for name, outputs in TEXT_OUTPUTS[kind].items():
        encoder = getattr(pipeline, name, None)
        if encoder is None:
            continue
        if getattr(encoder.config, "use_attention_mask", False):
            raise ModelError(f"The {name} takes a mask of its padding, which is not supported.")
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        t5 = "T5" in type(encoder).__name__
        length = pipeline_length(pipeline) if t5 else int(tokenizer.model_max_length)
        inputs = (InputSpec(name="input_ids", shape=(length,), dtype="int64"),)
        call = _text_call(outputs, last=t5 or kind == SD)
        networks[name] = TorchNetwork(encoder, inputs, outputs[0], call, outputs[1:])
    return networks


def latent_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (height, width) of latents from the denoiser's sample; packed ones are square."""
    if len(shape) == 3:
        return shape[1], shape[2]
    side = 2 * round(shape[0] ** 0.5)
    return side, side


def pipeline_length(pipeline: Any) -> int:
    """Return the tokens that the pipeline gives its T5 by default."""
    import inspect

    return int(inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default)


def _text_call(outputs: tuple[str, ...], last: bool) -> Any:
    """Return how an encoder is called: ``last``: for its last states, else for those before."""

    def call(model: Any, ids: torch.Tensor) -> Any:
        given = model(ids, output_hidden_states=not last and STATES in outputs)
        values = {}
        if STATES in outputs:
            values[STATES] = given[0] if last else given.hidden_states[-2]
        if POOLED in outputs:
            projected = getattr(given, "text_embeds", None)
            values[POOLED] = given.pooler_output if projected is None else projected
        chosen = tuple(values[name] for name in outputs)
        return chosen if len(chosen) > 1 else chosen[0]

    return call


def vae_networks(
    pipeline: Any, sizes: Sequence[tuple[int, int]], images: bool
) -> dict[str, TorchNetwork]:
    """Return the VAE's halves, for latents of ``sizes`` (height, width)."""
    vae = pipeline.vae
    channels, factor = int(vae.config.latent_channels), int(pipeline.vae_scale_factor)
    latents = (InputSpec(name=DECODED).with_sizes([(channels, *size) for size in sizes]),)
    sides = [(3, *(factor * one for one in size)) for size in sizes]
    pixels = (InputSpec(name=ENCODED).with_sizes(sides),)

    def decode(model: Any, z: torch.Tensor) -> Any:
        return model.decode(z, return_dict=False)[0]

    def encode(model: Any, sample: torch.Tensor) -> Any:
        given = model.encode(sample, return_dict=False)[0]
        # A distribution, or as of AutoencoderTiny the latents themselves.
        return getattr(given, "parameters", given)

    networks = {"vae_decoder": TorchNetwork(vae, latents, "image", decode)}
    if images:
        networks["vae_encoder"] = TorchNetwork(vae, pixels, "moments", encode)
    return networks
