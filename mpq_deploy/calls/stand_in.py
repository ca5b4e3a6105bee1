"""A module of a diffusers class without weights, computed elsewhere: what a pipeline is run with.

It has the class's configuration and attributes, so that a pipeline finds all it asks for; what it
is called with goes to a function as arrays by input name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.arguments import Arguments, rows_for
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.graph.passes.first_token import SAME_TOKEN, token_distance
from mpq_deploy.models.spec import Array, DenoiserSpec

# Every input by name, as the graph takes them -> the output, an array or a tensor of one.
Compute = Callable[[dict[str, Array]], Any]
# Told, before the output is computed, what tensors the module is called with.
Seen = Callable[[Mapping[str, torch.Tensor]], None]
TENSOR = "sha256:"


def fixed_text(value: Any) -> str:
    """Return what stands for a constant argument: a tensor's digest, or the value as text."""
    if isinstance(value, torch.Tensor):
        values = np.ascontiguousarray(value.detach().float().cpu().numpy())
        return f"{TENSOR}{hashlib.sha256(values.data).hexdigest()}"
    return repr(value)


def stand_in(
    module_class: Any,
    config: Mapping[str, Any],
    spec: DenoiserSpec,
    compute: Compute,
    own: Mapping[str, torch.Tensor],
    seen: Seen | None = None,
) -> torch.nn.Module:
    """Return a module of ``module_class`` whose forward is ``compute``.

    ``own``: parameters and buffers of the module itself, not of its layers, which pipelines may
    read (a prior's mean and deviation). ``seen``: told of every call before.

    Its forward raises ModelError, naming the argument, for one that the graph has no input for.
    """
    caller = Caller(module_class, spec, compute, seen)

    @functools.wraps(module_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return caller(self, args, kwargs)

    module = shell(module_class, config, own, forward)
    caller.switches = switches(module)
    return module


def shell(
    module_class: Any,
    config: Mapping[str, Any],
    own: Mapping[str, torch.Tensor],
    forward: Callable[..., Any] | None = None,
) -> torch.nn.Module:
    """Return a module of ``module_class`` that holds the tensors ``own`` and no other weights.

    ``forward`` None: it is there for what a pipeline asks of it, and never called.
    """
    module = without_weights(module_class, config)
    for name, value in own.items():
        kept = module._parameters if name in module._parameters else module._buffers
        kept[name] = torch.nn.Parameter(value, False) if kept is module._parameters else value
    cpu, float32 = torch.device("cpu"), torch.float32
    members = {
        "forward": forward or module_class.forward,
        "device": property(lambda self: cpu),
        "dtype": property(lambda self: float32),
        "to": lambda self, *args, **kwargs: self,
    }
    module.__class__ = type(module_class.__name__, (module_class,), members)
    return module.eval()


def without_weights(module_class: Any, config: Mapping[str, Any]) -> Any:
    """Return a module of the class and configuration whose parameters hold no memory."""
    try:
        with torch.device("meta"):
            return module_class.from_config(dict(config))
    except (NotImplementedError, RuntimeError):
        # Some constructors compute with what they make.
        return module_class.from_config(dict(config)).to("meta")


def answer_of(module_class: Any) -> tuple[Any, str]:
    """Return what the class's forward answers with, and the name of its first field."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.utils import BaseOutput

    used = inspect.unwrap(module_class.forward).__code__.co_names
    here = vars(sys.modules[module_class.__module__])
    kinds = [here[name] for name in used if inspect.isclass(here.get(name))]
    kind = next((one for one in kinds if issubclass(one, BaseOutput)), Transformer2DModelOutput)
    return kind, dataclasses.fields(kind)[0].name


def switches(module: torch.nn.Module) -> dict[str, bool]:
    """Return what of a module's layers is on or off, by name: GLIGEN's pipeline uses such switches."""
    return {
        f"{name}.{key}": value
        for name, layer in module.named_modules()
        for key, value in vars(layer).items()
        if isinstance(value, bool) and key != "training" and not key.startswith("_")
    }


def refuse_switched(pipeline: str, before: Mapping[str, bool], module: torch.nn.Module) -> None:
    """Raise UsageError where a layer of ``module`` is switched otherwise than ``before``."""
    now = switches(module)
    changed = next((name for name in now if before.get(name, now[name]) != now[name]), None)
    if changed is not None:
        raise UsageError(
            f"{pipeline} makes '{changed}' of its denoiser {now[changed]} while it runs, which no exported graph can "
            "follow.",
            "Choose call arguments that leave it as it is (GLIGEN: gligen_scheduled_sampling_beta: 1).",
        )


class Caller:
    """Takes a call of the module apart, computes it, and answers as the class does."""

    def __init__(
        self, module_class: Any, spec: DenoiserSpec, compute: Compute, seen: Seen | None = None
    ) -> None:
        self._class, self._spec, self._compute, self._seen = module_class, spec, compute, seen
        self._fixed = dict(spec.pipeline.fixed) if spec.pipeline else {}
        self._answer = answer_of(module_class)
        # Tensors that were compared with the graph's constants, which pipelines hand over each time.
        self._same: dict[str, torch.Tensor] = {}
        # As its layers are when it is made; None until then.
        self.switches: dict[str, bool] | None = None

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the class would, computed.

        Raises ModelError as ``feeds``, UsageError where the pipeline has switched a layer on or off.
        """
        self._check_switches(module)
        bound = functools.partial(self._class.forward, module)
        given = Arguments.of(bound, args, kwargs)
        if self._seen is not None:
            self._seen(given.tensors)
        feeds = self.feeds(given)
        sample = given.tensors[self._spec.sample.name]
        output = torch.as_tensor(self._compute(feeds)).to(sample.dtype)
        if kwargs.get("return_dict", True) is False:
            return (output,)
        kind, field = self._answer
        return kind(**{field: output})

    def feeds(self, given: Arguments) -> dict[str, Array]:
        """Return the graph's inputs. Raises ModelError for what the graph does not take."""
        spec, tensors = self._spec, dict(given.tensors)
        for name, value in given.constants.items():
            if spec.timestep is not None and name == spec.timestep.name:
                tensors[name] = torch.tensor(value)
            else:
                self._check(name, value)
        if spec.sample.name not in tensors:
            raise ModelError(f"The pipeline gives its denoiser no '{spec.sample.name}'.")
        count = len(tensors[spec.sample.name])
        feeds = {}
        for item in spec.inputs:
            value = tensors.pop(item.name, None)
            if value is None:
                raise ModelError(
                    f"The pipeline gives its denoiser no '{item.name}' here, but did in its first call.",
                    "Every call must have the same inputs: choose call arguments that always give it.",
                )
            fits = (rows_for(value, shape, count) for shape in item.shapes)
            rows = next((one for one in fits if one is not None), None)
            if rows is None:
                raise ModelError(
                    f"The pipeline gives its denoiser '{item.name}' of the shape {list(value.shape)} here; in its "
                    f"first call it was {[count, *item.shape]}.",
                    "An engine has fixed sizes except for the batch: use one size for all calls.",
                )
            feeds[item.name] = np.ascontiguousarray(rows.detach().cpu().numpy().astype(item.dtype))
        for name, value in tensors.items():
            self._check(name, value)
        self._check_first_tokens(feeds)
        return feeds

    def _check_first_tokens(self, feeds: Mapping[str, Array]) -> None:
        """Refuse texts whose first token is not the one whose keys and values the graph holds."""
        for name, token in self._spec.first_tokens.items():
            apart = token_distance(feeds[name][:, 0].astype(np.float64), np.array(token))
            if apart > SAME_TOKEN:
                raise ModelError(
                    f"The first token of '{name}' differs between calls by {apart:.2g} of its largest value.",
                    "Build with first_token: quantized.",
                )

    def _check_switches(self, module: torch.nn.Module) -> None:
        """Refuse a module of which the pipeline has switched layers on or off."""
        if self.switches is not None and self._spec.pipeline is not None:
            refuse_switched(self._spec.pipeline.class_name, self.switches, module)

    def _check(self, name: str, value: Any) -> None:
        """Refuse an argument that is not what the graph has as a constant."""
        if name in self._same and self._same[name] is value:
            return
        if name not in self._fixed or fixed_text(value) != self._fixed[name]:
            shown = (
                f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            )
            first = self._fixed.get(name, "nothing")
            was = "another tensor" if first.startswith(TENSOR) else first
            raise ModelError(
                f"The pipeline gives its denoiser '{name}' = {shown} here, but {was} in its first call.",
                "It is a constant in the exported graph: choose call arguments that never change it.",
            )
        if isinstance(value, torch.Tensor):
            self._same[name] = value
