"""What a diffusers model of one configuration takes, and its module as a network of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.models.conditions import Conditions, WantedInput
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.models.transformer import (
    ELEMENT,
    FLUX,
    FLUX_TIMESTEPS,
    GUIDANCE,
    PIXART,
    TRANSFORMER_CLASSES,
    Signature,
    fix_flux_positions,
    fixed_arguments,
    flux_sample,
    flux_tokens,
    flux_unpacked,
    given_inputs,
    keyword_arguments,
    signature_of,
    transformer_inputs,
)
from mpq_deploy.models.unet import UNET_CLASSES, sample_shape, unet_inputs

OUTPUT = "out_sample"
# Optional parameters of known classes: they become inputs where the user's conditions hold them.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "UNet2DModel": (),
    "UNet2DConditionModel": (
        "encoder_attention_mask",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    ),
    "DiTTransformer2DModel": (),
    "PixArtTransformer2DModel": (),
    "SD3Transformer2DModel": ("block_controlnet_hidden_states",),
    "FluxTransformer2DModel": ("controlnet_block_samples", "controlnet_single_block_samples"),
}
# The default guidance scale of diffusers' Stable Diffusion pipelines.
TEXT_GUIDANCE = 7.5


@dataclass(frozen=True)
class ModelForm:
    """``wanted``: the conditions; ``timestep_scale``: by what the sampler's timesteps are
    multiplied for the model; ``guidance``: the scale of its own pipeline; ``unpack``: turns
    packed samples into latents [N, C, H, W].
    """

    class_name: str
    signature: Signature
    sample: InputSpec
    wanted: tuple[WantedInput, ...]
    timestep_scale: float = 1.0
    guidance: float = 1.0
    unpack: Callable[[torch.Tensor], torch.Tensor] | None = None
    # What the forward is given at every call, beside sample, timestep and conditions.
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether the configuration lists the inputs; else signature and given arrays do."""
        return self.class_name in OPTIONAL


def model_class(config: dict[str, Any], folder: Path, in_pipeline: bool = False) -> Any:
    """Return the class of diffusers that a configuration names.

    ``in_pipeline``: its pipeline says how it is called, whatever its signature.

    Raises UsageError for one that diffusers does not have or that takes no sample and timestep.
    """
    import diffusers

    name = str(config.get("_class_name", ""))
    known = (*UNET_CLASSES, *TRANSFORMER_CLASSES)
    candidate = getattr(diffusers, name, None) if name.isidentifier() else None
    is_model = isinstance(candidate, type) and issubclass(candidate, diffusers.ModelMixin)
    if not is_model or (signature_of(candidate) is None and not in_pipeline):
        raise UsageError(
            f"{folder} holds {name or 'a model without _class_name'}, which is no denoiser of diffusers.",
            f"{nearest(name, known)}Supported: {', '.join(known)}, and other models of diffusers that take a "
            "sample and a timestep; export others to ONNX and give the ONNX file with a YAML.",
        )
    return candidate


def model_form(config: dict[str, Any], folder: Path, given: Conditions | None) -> ModelForm:
    """Return what a model of ``config`` takes; ``given`` are the user's own conditions.

    Raises UsageError for a class that is no denoiser, or a configuration that is not supported.
    """
    module_class = model_class(config, folder)
    name = str(config["_class_name"])
    signature = signature_of(module_class)
    assert signature is not None  # model_class refuses others
    if name == FLUX:
        sample = flux_sample(config)
    else:
        sample = InputSpec(name=signature.sample, shape=sample_shape(config, folder))
    form = ModelForm(name, signature, sample, (), fixed=fixed_arguments(config, module_class))
    if name in UNET_CLASSES:
        form = replace(form, wanted=unet_inputs(config), guidance=TEXT_GUIDANCE)
    elif name in TRANSFORMER_CLASSES:
        form = replace(form, wanted=transformer_inputs(config), guidance=GUIDANCE.get(name, 1.0))
    if name == FLUX:
        rows, columns = flux_tokens(config)
        form = replace(
            form,
            timestep_scale=1 / FLUX_TIMESTEPS,
            unpack=lambda tokens: flux_unpacked(tokens, rows, columns),
        )
    return replace(form, wanted=(*form.wanted, *_further(form, given)))


def _further(form: ModelForm, given: Conditions | None) -> tuple[WantedInput, ...]:
    if not form.known:
        return given_inputs(form.signature, given, form.wanted, form.class_name, form.fixed)
    allowed = dict.fromkeys(OPTIONAL[form.class_name], False)
    return given_inputs(Signature(form.sample.name, allowed), given, form.wanted, form.class_name)


def network(
    module: Any, form: ModelForm, config: dict[str, Any], conditions: Sequence[InputSpec]
) -> TorchNetwork:
    """Return the module as a network of tensors: sample, timestep [N], then conditions by name."""
    names = [item.name for item in conditions]
    fixed: dict[str, Any] = dict(form.fixed)
    timestep = form.signature.timestep
    if form.class_name == FLUX:
        tokens = next(item.shape[0] for item in conditions if item.name == "encoder_hidden_states")
        fixed = fix_flux_positions(module, tokens, flux_tokens(config))
    if form.class_name == PIXART:
        # Without these it looks them up in the dictionary, whether it has any or not.
        fixed = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    def call(model: Any, x: torch.Tensor, t: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        given = keyword_arguments(form.signature, dict(zip(names, values, strict=True)))
        arguments = {form.sample.name: x, timestep: t, **fixed, **given}
        output = model(**arguments, return_dict=False)[0]
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                f"it gives {type(output).__name__}s of tensors, not one as a denoiser does"
            )
        return output

    given = {name.split(ELEMENT)[0] for name in names}
    given |= set(form.fixed)
    left_out = [] if form.known else [name for name in form.signature.others if name not in given]
    return TorchNetwork(
        module, (form.sample, InputSpec(name=timestep), *conditions), OUTPUT, call, left_out
    )
