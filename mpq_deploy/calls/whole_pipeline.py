"""A pipeline run whole in float, with what its parts give changed on the way.

In: a pipeline folder and the specifications of its exported parts. Out: images, with the output of
any part replaced: by itself with noise, or by what a quantized graph gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.arguments import Arguments
from mpq_deploy.calls.pipeline_runs import (
    FIRST_STEPS,
    call_pipeline,
    load_pipeline,
    opened_call,
    pipeline_class,
    use_scheduler,
    with_steps,
)
from mpq_deploy.calls.stand_in import Caller
from mpq_deploy.errors import ModelError
from mpq_deploy.models.additions import DENOISERS, ENCODE, FORWARD, pipeline_index, place_of
from mpq_deploy.models.component import followed, joined, parted, text_places
from mpq_deploy.models.lora import Loras
from mpq_deploy.models.lora_option import parse_lora
from mpq_deploy.models.spec import Array, DenoiserSpec


@dataclass(frozen=True)
class PartCall:
    """One call of a part in float: its ``output``, its inputs as its graph takes them."""

    output: Array
    feeds: Callable[[], dict[str, Array]]


# A call in float -> what the part gives in its place.
Change = Callable[[PartCall], Array]


class WholePipeline:
    """The pipeline in ``folder``, loaded in float32; ``specs``: of its exported parts, by name.

    ``rows``: how many rows each part was called with in the images made so far.
    """

    def __init__(
        self, folder: Path, denoiser: str, specs: Mapping[str, DenoiserSpec], lora: tuple[str, ...]
    ) -> None:
        own = specs[denoiser].pipeline
        if own is None:
            raise ModelError(f"{folder} does not run its {denoiser} itself.")
        index = pipeline_index(folder)
        found = pipeline_class(index, folder)
        config = specs[denoiser].config
        loras = Loras.opened(tuple(map(parse_lora, lora)), found, config)
        self.pipeline = load_pipeline(folder, index, None, loras)
        use_scheduler(self.pipeline, own.scheduler)
        self.calls = [opened_call(call) for call in own.calls]
        self.specs, self.rows = dict(specs), dict.fromkeys(specs, 0)
        texts = [name for name in specs if _of_text(name)]
        arguments = with_steps(self.pipeline, self.calls[0], FIRST_STEPS)
        self._places: dict[str, list[tuple[Any, ...]]] = {key: [(0,)] for key in specs}
        for name, places in text_places(self.pipeline, texts, denoiser, arguments).items():
            self._places[name] = list(places.values())

    def image(self, number: int, steps: int, seed: int, changes: Mapping[str, Change]) -> Array:
        """Return what call ``number`` gives (in turn) with the parts in ``changes`` changed."""
        arguments = with_steps(self.pipeline, self.calls[number % len(self.calls)], steps)
        with self._changed(changes):
            return call_pipeline(self.pipeline, arguments, seed)

    @contextmanager
    def _changed(self, changes: Mapping[str, Change]) -> Iterator[None]:
        places = [(name, *place_of(name)) for name in self.specs]
        for name, attribute, method in places:
            part = getattr(self.pipeline, attribute)
            setattr(part, method, self._watched(name, part, method, changes.get(name)))
        try:
            yield
        finally:
            for _, attribute, method in places:
                delattr(getattr(self.pipeline, attribute), method)

    def _watched(self, name: str, part: Any, method: str, change: Change | None) -> Any:
        original, spec, places = getattr(part, method), self.specs[name], self._places[name]
        factor = spec.pooled_factor

        def called(*args: Any, **kwargs: Any) -> Any:
            # Taken apart before the call: UNets take residuals out of the lists that they are given.
            given = Arguments.of(original, args, kwargs)
            output = original(*args, **kwargs)
            self.rows[name] += len(given.tensors[spec.sample.name])
            if change is None:
                return output
            taken = [followed(output, place) for place in places]
            if method == ENCODE:
                taken = [getattr(taken[0], "parameters", taken[0])]
            call = PartCall(_array(joined(taken, factor)), lambda: _feeds(part, spec, given))
            made: list[Any] = list(parted(torch.from_numpy(change(call)), taken, factor))
            if method == ENCODE and hasattr(output[0], "parameters"):
                made = [type(output[0])(made[0])]
            for place, value in zip(places, made, strict=True):
                output = replaced(output, place, value)
            return output

        return called


def _of_text(name: str) -> bool:
    return place_of(name)[1] == FORWARD and name not in DENOISERS


def _feeds(part: Any, spec: DenoiserSpec, given: Arguments) -> dict[str, Array]:
    """Return the graph's inputs for a call of ``part``."""
    if spec.pipeline is not None:
        return Caller(type(part), spec, _never).feeds(given)
    return {
        item.name: np.ascontiguousarray(given.tensors[item.name].detach().numpy(), item.dtype)
        for item in spec.inputs
    }


def _never(feeds: dict[str, Array]) -> Array:
    raise ModelError("Nothing computes the part.")


def replaced(output: Any, place: tuple[Any, ...], value: torch.Tensor) -> Any:
    """Return a model's output with another ``value`` at ``place``: names and numbers, from outside in."""
    if not place:
        return value
    key, *rest = place
    if isinstance(output, (tuple, list)):
        items = list(output)
        items[key] = replaced(items[key], tuple(rest), value)
        return type(output)(items)
    name = key if isinstance(key, str) else list(output.keys())[key]
    changed = copy.copy(output)
    changed[name] = replaced(output[name], tuple(rest), value)
    return changed


def _array(value: torch.Tensor) -> Array:
    return np.asarray(value.detach().float().numpy())
