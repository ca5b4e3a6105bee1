"""The sizes that one graph is to take: checked, in what the model sees, and as its inputs' shapes.

In: a denoiser as it was opened, sizes in pixels (without a decoder: in its sample's own units). Out:
the same denoiser, whose inputs have a shape at each size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpq_deploy.errors import UsageError
from mpq_deploy.models.additions import CONFIG, VAE, read_json
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.system.quantities import ImageSize, ImageSizes

DIT = "DiTTransformer2DModel"

ALONE = "Leave --sizes out: it is built for its own size."
# Transformers whose pipelines give them squares of 2 x 2 latents as one token.
PACKING = ("FluxTransformer2DModel", "ChromaTransformer2DModel")
DECODER_FOLDERS = (VAE, "vqvae")


def with_sizes(denoiser: Denoiser, sizes: ImageSizes, source: Path) -> Denoiser:
    """Return ``denoiser``, opened from ``source``, for ``sizes``.

    Raises UsageError where its samples have no height and width, and for a size that it cannot take.
    """
    spec = denoiser.spec
    if spec.pipeline is not None or spec.timestep is None:
        # Its calls were made at each size.
        return denoiser
    if not spec.sampled or len(spec.sample.shape) != 3:
        shape = list(spec.sample.shape)
        what = f"{spec.name} takes samples of the shape {shape}, called by {_caller(spec)}"
        raise UsageError(f"{what}: --sizes is for denoisers of [channels, height, width].", ALONE)
    factor = pixel_factor(source, spec.config) if source.is_dir() else 1
    multiple = factor * sample_multiple(spec.config)
    check_multiples(sizes, multiple)
    oblong = next((one for one in sizes if one.width != one.height), None)
    if spec.config.get("_class_name") == DIT and len(sizes) > 1 and oblong is not None:
        what = f"{DIT} of diffusers makes square images alone, not {oblong}"
        raise UsageError(f"{what}.", "List squares, without a range: --sizes 256x256,512x512.")
    channels = spec.sample.shape[0]
    shapes = [(channels, size.height // factor, size.width // factor) for size in sizes]
    sample = spec.sample.with_sizes(shapes)
    spec = spec.model_copy(update={"sample": sample, **size_fields(sizes, multiple)})
    decoder = denoiser.decoder
    if decoder is not None:
        decoder = decoder.taking([decoder.inputs[0].with_sizes(shapes)])
    return replace(
        denoiser, spec=spec, network=denoiser.network.taking(spec.inputs), decoder=decoder
    )


def size_fields(sizes: ImageSizes, multiple: int) -> dict[str, Any]:
    """Return what a description says of several sizes of a model with steps of ``multiple``."""
    if len(sizes) < 2:
        return {}
    step = 0 if sizes.step is None else sizes.step or multiple
    return {"sizes": tuple((size.width, size.height) for size in sizes), "size_step": step}


def pipeline_multiple(pipeline: Any, config: Mapping[str, Any]) -> int:
    """Return what sizes of the pipeline's images are multiples of, for a part of ``config``."""
    return int(getattr(pipeline, "vae_scale_factor", 1)) * sample_multiple(config)


def sized_calls(
    calls: Sequence[Mapping[str, Any]],
    sizes: ImageSizes,
    pipeline: Any,
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], ...]:
    """Return each call at each of the ``sizes``, one after the other; without sizes the calls.

    ``config``: of the part that must take them. Raises UsageError for a size that it cannot take, a
    pipeline that is not told a size, and calls that name one.
    """
    check_multiples(sizes, pipeline_multiple(pipeline, config))
    taken = inspect.signature(type(pipeline).__call__).parameters
    if sizes and not {"height", "width"} <= set(taken):
        raise UsageError(f"{type(pipeline).__name__} takes no height and width.", ALONE)
    if sizes and any({"height", "width"} & set(call) for call in calls):
        raise UsageError(
            "--call names a height or width, and --sizes names sizes.", "Leave one of them out."
        )
    shapes = [{"height": size.height, "width": size.width} for size in sizes] or [{}]
    return tuple({**call, **shape} for call in calls for shape in shapes)


def _caller(spec: DenoiserSpec) -> str:
    if spec.recorded:
        return "a script"
    return "our sampler" if spec.sampled else "its pipeline"


def pixel_factor(folder: Path, config: Mapping[str, Any]) -> int:
    """Return how many pixels of an image lie along one element of the sample; 1 without a decoder."""
    found = next(
        (folder / n / CONFIG for n in DECODER_FOLDERS if (folder / n / CONFIG).is_file()), None
    )
    if found is None:
        return 1
    values = read_json(found)
    levels = values.get("block_out_channels") or values.get("decoder_block_out_channels") or (0,)
    return int(2 ** (len(levels) - 1))


def sample_multiple(config: Mapping[str, Any]) -> int:
    """Return what height and width of a sample must be multiples of: levels of a UNet, patches."""
    if str(config.get("_class_name")).startswith("UNet"):
        return int(2 ** (len(config.get("block_out_channels") or (0,) * 4) - 1))
    if config.get("_class_name") in PACKING:
        return 2
    patch = config.get("patch_size", 1)
    return patch if isinstance(patch, int) else 1


def check_multiples(sizes: ImageSizes, multiple: int) -> None:
    """Raise UsageError that names the nearest sizes for one that is no multiple of ``multiple``.

    Of a range its step must be one, and the sizes multiples of the step.
    """
    if sizes.step and sizes.step % multiple:
        what = f"The step {sizes.step} of the sizes is not a multiple of {multiple}"
        raise UsageError(f"{what}, which the model needs.", "Leave the step out, or correct it.")
    wanted = f"{multiple}, which the model needs"
    if sizes.step:
        multiple, wanted = sizes.step, f"{sizes.step}, as the range names it"
    for size in sizes:
        if size.width % multiple or size.height % multiple:
            below, above = (
                ImageSize(
                    *(
                        max(1, (side + up) // multiple) * multiple
                        for side in (size.width, size.height)
                    )
                )
                for up in (0, multiple - 1)
            )
            nearest = " or ".join(dict.fromkeys(map(str, (below, above))))
            raise UsageError(
                f"The size {size} is not in steps of {wanted}.",
                f"Nearest: {nearest}.",
            )
