"""How a denoiser's forward is called, and what the transformers take that our own sampler knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.models.conditions import Conditions, WantedInput
from mpq_deploy.models.sample_sizes import DIT

PIXART = "PixArtTransformer2DModel"
SD3 = "SD3Transformer2DModel"
TRANSFORMER_CLASSES = (DIT, PIXART, SD3)
# Names that forwards of diffusers have for the noisy sample, and what they call the timestep.
SAMPLE_NAMES = ("hidden_states", "sample")
TIMESTEP = "timestep"
# An entry that a user may add to config.json: what the forward is given at every call.
ARGUMENTS = "forward_arguments"
# Inputs that models take in the dictionary ``added_cond_kwargs``.
ADDED = "added_cond_kwargs"
ADDED_INPUTS = ("text_embeds", "time_ids", "image_embeds", "resolution", "aspect_ratio")
# A list of tensors is one input per element: ``NAME.0``, ``NAME.1`` (ControlNet's residuals).
ELEMENT = "."


@dataclass(frozen=True)
class Signature:
    """A denoiser's forward: names of sample and timestep; conditions (True: without a default)."""

    sample: str
    others: dict[str, bool]
    timestep: str = TIMESTEP

    def takes(self, name: str) -> bool:
        """Say whether the forward accepts an input ``name``: itself, in a list or dictionary."""
        head, _, index = name.partition(ELEMENT)
        if index:
            return head in self.others and index.isdigit()
        return name in self.others or (ADDED in self.others and name in ADDED_INPUTS)


def forward_of_sizes(module: Any) -> Callable[..., Any]:
    """Return ``module``'s forward as it can be exported for several sizes at once.

    It is its own but for DiT's, which takes height and width of the output from the root of their
    product, a number for the exporter; here they are those of the sample.
    """
    if type(module).__name__ != DIT:
        return module.forward  # type: ignore[no-any-return]

    def forward(
        hidden_states: torch.Tensor, timestep: Any, class_labels: Any, **options: Any
    ) -> tuple[torch.Tensor]:
        patch, channels = module.patch_size, module.out_channels
        height, width = (side // patch for side in hidden_states.shape[-2:])
        states = module.pos_embed(hidden_states)
        for block in module.transformer_blocks:
            states = block(states, timestep=timestep, class_labels=class_labels)
        embed = module.transformer_blocks[0].norm1.emb
        told = embed(timestep, class_labels, hidden_dtype=states.dtype)
        shift, scale = module.proj_out_1(torch.nn.functional.silu(told)).chunk(2, dim=1)
        states = module.norm_out(states) * (1 + scale[:, None]) + shift[:, None]
        states = module.proj_out_2(states)
        states = states.reshape(-1, height, width, patch, patch, channels)
        states = states.permute(0, 5, 1, 3, 2, 4)
        return (states.reshape(-1, channels, height * patch, width * patch),)

    return forward


def signature_of(model_class: Any) -> Signature | None:
    """Return how a class is called; None if its forward takes no sample and timestep."""
    parameters = dict(inspect.signature(model_class.forward).parameters)
    parameters.pop("self", None)
    sample = next((name for name in SAMPLE_NAMES if name in parameters), None)
    timestep = next(
        (name for name in parameters if name.startswith(TIMESTEP) and not name.endswith("_cond")),
        None,
    )
    if sample is None or timestep is None:
        return None
    taken = {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in parameters.items()
        if name not in (sample, timestep, "return_dict")
        and (name == ADDED or not name.endswith("_kwargs"))
    }
    return Signature(sample, taken, timestep)


def fixed_arguments(config: dict[str, Any], model_class: Any) -> dict[str, Any]:
    """Return the arguments that ``forward_arguments`` in the configuration gives at every call.

    Numbers of a video's frames, positions of tokens: what is the same for all samples. Lists become
    tensors, integers int64 and others float32, where the parameter's annotation says tensor. Raises
    UsageError for an unknown parameter.
    """
    parameters = inspect.signature(model_class.forward).parameters
    arguments: dict[str, Any] = {}
    for name, value in dict(config.get(ARGUMENTS) or {}).items():
        if name not in parameters:
            raise UsageError(
                f"{ARGUMENTS} in config.json names '{name}', which {model_class.__name__} does not take.",
                f"{nearest(name, parameters)}It takes {', '.join(n for n in parameters if n != 'self')}.",
            )
        tensor = "Tensor" in str(parameters[name].annotation) and isinstance(value, (list, tuple))
        arguments[name] = torch.tensor(value) if tensor else value
    return arguments


def transformer_inputs(config: dict[str, Any]) -> tuple[WantedInput, ...]:
    """Return the conditions that a transformer of this configuration takes."""
    name = config["_class_name"]
    if name == DIT:
        return (WantedInput("class_labels", (), "int64"),)
    if name == PIXART:
        text = WantedInput("encoder_hidden_states", (None, _text_width(config)))
        mask = WantedInput("encoder_attention_mask", (None,))
        sizes = (WantedInput("resolution", (2,)), WantedInput("aspect_ratio", (1,)))
        return (text, mask, *(sizes if _with_sizes(config) else ()))
    text = WantedInput(
        "encoder_hidden_states", (None, int(config.get("joint_attention_dim", 4096)))
    )
    pooled = WantedInput("pooled_projections", (int(config.get("pooled_projection_dim", 768)),))
    return (text, pooled)


def _text_width(config: dict[str, Any]) -> int:
    return int(config.get("caption_channels") or config.get("cross_attention_dim", 1152))


def _with_sizes(config: dict[str, Any]) -> bool:
    """Whether a PixArt takes the image's size; by default the class decides."""
    chosen = config.get("use_additional_conditions")
    return bool(config.get("sample_size", 128) == 128 if chosen is None else chosen)


def given_inputs(
    signature: Signature,
    conditions: Conditions | None,
    known: tuple[WantedInput, ...],
    class_name: str,
    fixed: Collection[str] = (),
) -> tuple[WantedInput, ...]:
    """Return the inputs among the user's arrays that the forward takes, beside the ``known``.

    ``fixed``: parameters of the configuration. Raises UsageError for one without any value.
    """
    names = [item.name for item in known]
    arrays = {} if conditions is None else conditions.arrays
    given = {name.split(ELEMENT)[0] for name in (*arrays, *names)}
    lacking = [
        name
        for name, needed in signature.others.items()
        if needed and name not in given and name not in fixed
    ]
    if lacking:
        raise UsageError(
            f"{class_name} needs {', '.join(lacking)}, and nothing provides them.",
            "Give --conditions FILE.npz with one array per input, one row per condition; what is the same for all "
            f"samples goes into config.json as {ARGUMENTS}.",
        )
    return tuple(
        _as_given(name, values)
        for name, values in arrays.items()
        if name not in names and signature.takes(name)
    )


def _as_given(name: str, values: Any) -> WantedInput:
    kinds = {"i": "int64", "u": "int64", "b": "bool"}
    return WantedInput(
        name, tuple(int(size) for size in values.shape[1:]), kinds.get(values.dtype.kind, "float32")
    )


def keyword_arguments(signature: Signature, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return tensors by input name as the forward's arguments, lists and dictionary joined."""
    arguments: dict[str, Any] = {}
    lists: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in given.items():
        head, _, index = name.partition(ELEMENT)
        if index:
            lists.setdefault(head, {})[int(index)] = value
        elif name in signature.others:
            arguments[name] = value
        else:
            arguments.setdefault(ADDED, {})[name] = value
    return {
        **arguments,
        **{head: tuple(values[i] for i in sorted(values)) for head, values in lists.items()},
    }
