"""A part of a pipeline without timesteps, called once: a VAE's decoder or a text encoder.

Its inputs are rows: latents that the pipeline's own denoiser made in float, or the prompts' tokens.
Three quarters of them calibrate; what comes out is compared on the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.loop import GuidedDenoiser, denoise, initial_noise
from mpq_deploy.calls.sampler import ONE_CALL, make_sampler
from mpq_deploy.errors import ModelError, UsageError, nearest
from mpq_deploy.models.additions import Additions, read_json
from mpq_deploy.models.conditions import Conditions
from mpq_deploy.models.decoder import FOLDERS, load_decoder
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.pipeline_folder import CONFIG, IMAGE_RANGE, INDEX, open_folder
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.runtime.ort import model_feeds
from mpq_deploy.system.progress import Talk

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# Share of the rows that calibrate.
CALIBRATED = 0.75
# Steps of the float denoiser to a latent, and how many it makes at once (our choice).
STEPS, BATCH = 20, 4
# Seed of the noise that latents come from: no other stage's.
SEED = 77
LATENTS, TOKENS, MASK = "latent_sample", "input_ids", "attention_mask"


def open_component(folder: Path, source: str, additions: Additions, talk: Talk) -> Denoiser:
    """Open the part of a pipeline folder that ``additions.component`` names.

    Raises UsageError for an absent or unsupported part, ModelError for unreadable weights.
    """
    component = str(additions.component)
    if not (folder / INDEX).is_file():
        raise UsageError(
            f"{folder} has no {INDEX}, so it has no component '{component}'.",
            "Give a pipeline folder.",
        )
    pipeline = read_json(folder / INDEX)
    if component in FOLDERS:
        return _vae(folder, source, additions, talk)
    if component in TEXT_ENCODERS and (folder / component).is_dir():
        return _text_encoder(folder, source, pipeline, additions)
    here = [
        name
        for name in ("unet", "transformer", *FOLDERS, *TEXT_ENCODERS)
        if (folder / name / CONFIG).is_file()
    ]
    raise UsageError(
        f"The component '{component}' of {folder} cannot be quantized.",
        f"{nearest(component, here)}Here: {', '.join(here) or 'none'}.",
    )


def _vae(folder: Path, source: str, additions: Additions, talk: Talk) -> Denoiser:
    """Open the decoder; its input is ``vae.decode``'s: latents / scaling_factor + shift_factor."""
    loaded = load_decoder(folder)
    if loaded is None:
        raise UsageError(
            f"{folder} has no vae/ or vqvae/ with a {CONFIG}.",
            "Give a pipeline that decodes latents.",
        )
    module, scale, shift = loaded
    samples, note = _latents(folder, source, module, additions, talk)
    rows = np.asarray(samples / scale + shift, np.float32)

    def call(model: Any, values: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = model.decode(values, return_dict=False)[0]
        return decoded

    sample = InputSpec(name=LATENTS, shape=rows.shape[1:])
    spec = _spec(folder, source, additions, sample, "image", len(rows)).model_copy(
        update={"pixel_range": IMAGE_RANGE}
    )
    conditions = Conditions({LATENTS: rows}, len(rows))
    return Denoiser(spec, conditions, TorchNetwork(module, (sample,), "image", call), None, (note,))


def _latents(
    folder: Path, source: str, module: Any, additions: Additions, talk: Talk
) -> tuple[Array, str]:
    """Return latents as a denoiser makes them, float32 [rows, C, H, W], and their origin."""
    count = additions.component_samples
    try:
        whole = Additions(
            additions.conditions, additions.scheduler, additions.prompts, additions.guidance_scale
        )
        denoiser = open_folder(folder, source, whole, talk)
    except (UsageError, ModelError) as reason:
        note = f"The decoder's inputs are standard normal latents, as there is no denoiser: {reason.message}"
        talk.warn(note)
        shape = (int(module.config.latent_channels), *_latent_size(module))
        return np.random.default_rng(SEED).standard_normal((count, *shape), np.float32), note
    spec = denoiser.spec
    sampler = make_sampler(spec.scheduler, STEPS, SEED)
    usable = np.arange(denoiser.conditions.rows)
    if spec.uncond_row is not None and len(usable) > 1:
        usable = np.delete(usable, spec.uncond_row)
    rows = usable[np.arange(count) % len(usable)]

    def call(sample: Array, timestep: float | Array, conditions: dict[str, Array]) -> Array:
        return denoiser.network.reference(model_feeds(spec, sample, timestep, conditions))

    noise = initial_noise(spec, count, SEED)
    made = denoise(
        GuidedDenoiser(call, spec, denoiser.conditions.arrays), sampler, noise, rows, BATCH, talk
    )
    if denoiser.unpack is not None:
        made = denoiser.unpack(torch.from_numpy(made)).numpy()
    note = f"The decoder's inputs are {count} samples of the float denoiser: {sampler.name}, seed {SEED}"
    return made, note


def _latent_size(module: Any) -> tuple[int, int]:
    """Return height and width of the latents that a decoder's configured image comes from."""
    pixels = int(2 ** (len(module.config.block_out_channels) - 1))
    size = module.config.sample_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height) // pixels, int(width) // pixels


def _text_encoder(
    folder: Path, source: str, pipeline: dict[str, Any], additions: Additions
) -> Denoiser:
    """Open a text encoder. Its output is the states that the pipeline's denoiser takes."""
    from mpq_deploy.models.prompts import EMPTY_LABEL, Encoder, prompts_file, read_prompts

    encoder = Encoder.of_pipeline(folder, pipeline, str(additions.component))
    prompts = (*read_prompts(additions.prompts or prompts_file()), "")
    ids, mask = encoder.tokenize(prompts)
    # Prompts are shuffled, so that both parts have long and short ones: padding alone says little.
    order = np.random.default_rng(SEED).permutation(len(prompts))
    arrays = {TOKENS: ids[order]}
    inputs = [InputSpec(name=TOKENS, shape=ids.shape[1:], dtype="int64")]
    if encoder.masked:
        arrays[MASK] = mask[order]
        inputs.append(InputSpec(name=MASK, shape=mask.shape[1:], dtype="int64"))

    def call(model: Any, tokens: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        output = model(
            tokens, attention_mask=masks[0] if masks else None, output_hidden_states=True
        )
        return encoder.states(output)

    labels = tuple((prompts[i] or EMPTY_LABEL) for i in order)
    spec = _spec(folder, source, additions, inputs[0], "hidden_states", len(prompts))
    spec = spec.model_copy(update={"conditions": tuple(inputs[1:]), "labels": labels})
    notes = (
        f"The text encoder's inputs are {len(prompts)} prompts; its output is the {encoder.layer}",
    )
    network = TorchNetwork(encoder.model, inputs, "hidden_states", call)
    return Denoiser(spec, Conditions(arrays, len(prompts), None, labels), network, None, notes)


def _spec(
    folder: Path, source: str, additions: Additions, sample: InputSpec, output: str, rows: int
) -> DenoiserSpec:
    if rows < 2:
        raise UsageError(
            f"There is {rows} input to calibrate and to compare with.", "Give at least 2 prompts."
        )
    return DenoiserSpec(
        name=f"{folder.resolve().name} {additions.component}",
        source=source,
        sample=sample,
        timestep=None,
        calibration_rows=max(1, int(rows * CALIBRATED)),
        output=output,
        prediction_type="sample",
        scheduler={"_class_name": ONE_CALL},
    )
