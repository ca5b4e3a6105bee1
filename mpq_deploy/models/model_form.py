"""What a diffusers model of one configuration takes, and its module as a network of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.models.conditions import Conditions, WantedInput
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.models.transformer import (
    PIXART,
    TRANSFORMER_CLASSES,
    Signature,
    fixed_arguments,
    given_inputs,
    keyword_arguments,
    signature_of,
    transformer_inputs,
)
from mpq_deploy.models.unet import (
    REFINER_TIME_IDS,
    TIME_IDS,
    UNET_CLASSES,
    sample_shape,
    unet_inputs,
)

OUTPUT, TEXT = "out_sample", "encoder_hidden_states"
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
}


# Classes that diffusers has split up since: by the kind of norm, as its own loader tells them apart.
RENAMED = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): PIXART,
}


def named_now(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the class that diffusers loads it as today."""
    old = (config.get("_class_name"), config.get("norm_type"))
    return {**config, "_class_name": RENAMED[old]} if old in RENAMED else config


Timesteps = Literal["float32", "int64"]


@dataclass(frozen=True)
class ModelForm:
    """``wanted``: the conditions."""

    class_name: str
    signature: Signature
    sample: InputSpec
    wanted: tuple[WantedInput, ...]
    # What the forward is given at every call, beside sample, timestep and conditions.
    fixed: dict[str, Any] = field(default_factory=dict)
    timestep_dtype: Timesteps = "float32"

    @property
    def timestep(self) -> InputSpec:
        """The timestep's input, one number per sample."""
        return InputSpec(name=self.signature.timestep, dtype=self.timestep_dtype)

    @property
    def known(self) -> bool:
        """Whether our own sampler calls it as its pipelines do: UNets, and the transformers above."""
        return self.class_name in OPTIONAL or self.class_name.startswith("UNet")


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
            f"{folder} holds {name or 'a model without _class_name'}, which is not a denoiser of diffusers.",
            f"{nearest(name, known)}Supported: {', '.join(known)}, and other models of diffusers that take a "
            "sample and a timestep; export others to ONNX and give the ONNX file with a YAML.",
        )
    return candidate


def model_form(
    config: dict[str, Any], folder: Path, given: Conditions | None, refines: bool = False
) -> ModelForm:
    """Return what a model of ``config`` takes; ``given`` are the user's own conditions;
    ``refines``: whether its pipeline gives it an aesthetic score.

    Raises UsageError for a class that is not a denoiser, or a configuration that is not supported.
    """
    module_class = model_class(config, folder)
    name = str(config["_class_name"])
    signature = signature_of(module_class)
    assert signature is not None  # model_class refuses others
    sample = InputSpec(name=signature.sample, shape=sample_shape(config, folder))
    fixed = fixed_arguments(config, module_class)
    if name not in OPTIONAL:
        others = given_inputs(signature, given, (), name, fixed)
        return ModelForm(name, signature, sample, others, fixed, timestep_dtype(config))
    if name in UNET_CLASSES:
        wanted = unet_inputs(config, REFINER_TIME_IDS if refines else TIME_IDS)
    else:
        wanted = transformer_inputs(config)
    allowed = Signature(sample.name, dict.fromkeys(OPTIONAL[name], False))
    further = given_inputs(allowed, given, wanted, name)
    inputs = (*_without_text(wanted, config, given), *further)
    return ModelForm(name, signature, sample, inputs, fixed, timestep_dtype(config))


def timestep_dtype(config: Mapping[str, Any]) -> Timesteps:
    """Return the type that a model of ``config`` takes timesteps in: whole ones as rows of a table."""
    return "int64" if config.get("time_embedding_type") == "learned" else "float32"


def _without_text(
    wanted: tuple[WantedInput, ...], config: dict[str, Any], given: Conditions | None
) -> tuple[WantedInput, ...]:
    """Return the inputs, without text where a UNet reads its class vector in every block instead."""
    if given is None or not config.get("class_embeddings_concat") or TEXT in given.arrays:
        return wanted
    return tuple(item for item in wanted if item.name != TEXT)


def network(
    module: Any, form: ModelForm, config: dict[str, Any], conditions: Sequence[InputSpec]
) -> TorchNetwork:
    """Return the module as a network of tensors: sample, timestep [N], then conditions by name."""
    names = [item.name for item in conditions]
    fixed: dict[str, Any] = dict(form.fixed)
    timestep = form.signature.timestep
    if TEXT in form.signature.others and TEXT not in names:
        fixed[TEXT] = None
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

    return TorchNetwork(module, (form.sample, form.timestep, *conditions), OUTPUT, call)
