"""A part of a pipeline without timesteps, called once: a VAE's decoder or encoder, or a text encoder.

What it takes is recorded while its pipeline runs in float: the latents that the VAE decodes, the
tokens that a text encoder is given. Three quarters calibrate; what comes out is compared on the
others. Of a text encoder that gives states and a pooled vector both are compared, as one output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.arguments import Arguments
from mpq_deploy.calls.pipeline_runs import (
    DIFFUSERS_WEIGHTS,
    FIRST_STEPS,
    call_pipeline,
    checked_variant,
    first_call,
    image_seed,
    load_pipeline,
    opened_call,
    pipeline_class,
    with_steps,
)
from mpq_deploy.calls.sampler import ONE_CALL
from mpq_deploy.calls.stand_in import shell
from mpq_deploy.device.generate.generation_folder import POOLED, STATES
from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.models.additions import (
    DECODE,
    DENOISERS,
    ENCODE,
    FORWARD,
    Additions,
    pipeline_index,
    place_of,
    read_json,
)
from mpq_deploy.models.conditions import Conditions
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.lora import Loras, told
from mpq_deploy.models.model_form import model_class
from mpq_deploy.models.pipeline_folder import CONFIG, IMAGE_RANGE, INDEX
from mpq_deploy.models.pipeline_part import call_label, calls_of, dtype_name
from mpq_deploy.models.sample_sizes import pipeline_multiple, size_fields, sized_calls
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec, LoraUse, fill_to
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.models.weight_files import own_tensors
from mpq_deploy.system.progress import Talk

OUTPUTS = {DECODE: "image", ENCODE: "moments"}
# What differs between the inputs of parts that are called so.
_GIVEN = {FORWARD: "prompts", ENCODE: "pictures", DECODE: "images to decode"}
# The output of a text encoder whose states and pooled vector are taken: both in one row.
JOINED = "states_and_pooled"
# Calls that say how large both are.
WEIGHED_CALLS = 8
# What of a text encoder's output its pipeline takes -> where that lies: names and numbers, from outside in.
Places = dict[str, tuple[Any, ...]]
# Share of the rows that calibrate.
CALIBRATED = 0.75
# Seed of the noise that latents come from: no other stage's.
SEED = 77


@dataclass
class _Recorded:
    """Calls of a part: their arguments, which text or image each is of, what of the output is used.

    ``sizes``: the number of each call's size.
    """

    calls: list[Arguments] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    used: list[tuple[tuple[Any, ...], int]] = field(default_factory=list)


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
    pipeline, part, uses = _part(folder, component, additions)
    method = place_of(component)[1]
    recorded = _record(pipeline, component, part, additions, talk)
    inputs, arrays, labels = _rows(component, recorded)
    sizes, decodes = len(inputs[0].sizes) or 1, method == DECODE
    places = _used(recorded) if method == FORWARD else {}
    factor = _pooled_factor(part, recorded, places) if len(places) > 1 else None
    taken = {item.name for item in inputs}
    alone = OUTPUTS.get(method, "")
    # A decoder may be given the picture that it repaints, under that name.
    alone = f"decoded_{alone}" if alone in taken else alone
    outputs = ((JOINED,) if factor else ()) + (tuple(places) or (alone,))
    spec = DenoiserSpec(
        name=f"{folder.resolve().name} {component}",
        source=source,
        sample=inputs[0],
        timestep=None,
        calibration_rows=max(1, int(len(labels) // sizes * CALIBRATED)) * sizes,
        conditions=tuple(inputs[1:]),
        output=outputs[0],
        prediction_type="sample",
        scheduler={"_class_name": ONE_CALL},
        labels=labels,
        pixel_range=IMAGE_RANGE if decodes and len(inputs[0].shape) == 3 else None,
        pooled_factor=factor,
        loras=uses,
        **size_fields(additions.sizes, pipeline_multiple(pipeline, {})),
    )
    call = _forward(recorded, inputs, method, tuple(places.values()), factor)
    network = TorchNetwork(part, inputs, outputs[0], call, outputs[1:])
    what = "samples of the float denoiser" if decodes else "texts that its pipeline gives it"
    notes = (f"The {component}'s inputs are {len(labels)} {what}", *told(uses, talk))
    return Denoiser(spec, Conditions(arrays, len(labels), None, labels), network, None, notes)


def called_parts(folder: Path, components: Sequence[str], additions: Additions) -> list[str]:
    """Return those of ``components`` that the pipeline calls before its denoiser, in any of its calls.

    Raises as ``open_component``.
    """
    pipeline = _part(folder, components[0], additions)[0]
    denoiser = next(name for name in DENOISERS if getattr(pipeline, name, None) is not None)
    seen: set[str] = set()

    def watch(component: str) -> None:
        name, method = place_of(component)
        original = getattr(getattr(pipeline, name), method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.add(component)
            return original(*args, **kwargs)

        setattr(getattr(pipeline, name), method, watched)

    for component in components:
        watch(component)
    for call in calls_of(pipeline, additions):
        first_call(pipeline, denoiser, with_steps(pipeline, opened_call(call), FIRST_STEPS))
        if len(seen) == len(components):
            break
    return [component for component in components if component in seen]


def _part(
    folder: Path, component: str, additions: Additions
) -> tuple[Any, Any, tuple[LoraUse, ...]]:
    """Return the pipeline, its part ``component``, and what LoRAs changed. Raises UsageError for an absent part."""
    index = pipeline_index(folder)
    here = [name for name in index if (folder / name / CONFIG).is_file()]
    module, method = place_of(component)
    if module not in here:
        raise UsageError(
            f"{folder} has no component '{component}'.",
            f"{nearest(component, here)}Here: {', '.join(here) or 'none'}.",
        )
    if method == FORWARD and additions.sizes:
        raise UsageError(f"The {component} knows no sizes of images.", "Leave --sizes out.")
    pipeline, uses = _loaded(folder, index, additions)
    part = getattr(pipeline, module)
    if method != FORWARD and not hasattr(part, method):
        raise UsageError(
            f"The {module} of {folder} does not {method}.", f"It is a {type(part).__name__}."
        )
    return pipeline, part, uses


def _loaded(
    folder: Path, index: Mapping[str, Any], additions: Additions
) -> tuple[Any, tuple[LoraUse, ...]]:
    """Return the pipeline with the user's LoRAs fused into its parts, and what they changed."""
    part = next((folder / name for name in DENOISERS if (folder / name / CONFIG).is_file()), folder)
    config = read_json(part / CONFIG) if additions.loras else {}
    loras = Loras.opened(additions.loras, pipeline_class(index, folder), config)
    shell_only = _denoiser_shell(folder, index, str(additions.component))
    pipeline = load_pipeline(folder, index, shell_only, loras)
    return pipeline, loras.uses()


def _denoiser_shell(folder: Path, index: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return the denoiser without its weights where the pipeline is run up to it alone.

    It is run for the latents that a VAE decodes: then nothing is returned.
    """
    denoiser = next((name for name in DENOISERS if (folder / name / CONFIG).is_file()), "")
    if not denoiser or place_of(component)[1] == DECODE:
        return {}
    part = folder / denoiser
    variant = checked_variant(part)
    config = read_json(part / CONFIG)
    own = own_tensors(part, DIFFUSERS_WEIGHTS, variant)
    return {denoiser: shell(model_class(config, part, in_pipeline=True), config, own)}


def _record(
    pipeline: Any, component: str, part: Any, additions: Additions, talk: Talk
) -> _Recorded:
    """Run the pipeline, up to its denoiser where that is enough, and keep the part's calls."""
    calls = sized_calls(calls_of(pipeline, additions), additions.sizes, pipeline, {})
    recorded, sizes = _Recorded(), len(additions.sizes) or 1
    name = place_of(component)[1]
    original = getattr(part, name)
    denoiser = next((n for n in DENOISERS if getattr(pipeline, n, None) is not None), "")
    count = additions.component_samples if name == DECODE else len(calls)
    label, size = "", 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        recorded.calls.append(Arguments.of(original, args, kwargs))
        recorded.labels.append(label)
        recorded.sizes.append(size)
        output = original(*args, **kwargs)
        return _Looked(output, (), recorded.used) if name == FORWARD else output

    setattr(part, name, watched)
    try:
        with talk.bar(f"run {type(pipeline).__name__}", count) as advance:
            for number in range(count):
                call, size = calls[number % len(calls)], number % sizes
                label = call_label(call, number)
                steps = additions.component_steps if name == DECODE else FIRST_STEPS
                arguments = with_steps(pipeline, opened_call(call), steps)
                if name == DECODE or not denoiser:
                    call_pipeline(pipeline, arguments, image_seed(SEED, number))
                else:
                    first_call(pipeline, denoiser, arguments)
                advance(1)
    finally:
        delattr(part, name)
    if not recorded.calls:
        raise UsageError(
            f"{type(pipeline).__name__} never calls its {component}, so there is nothing to calibrate on.",
            "Name another part with --only.",
        )
    return recorded


def _rows(
    component: str, recorded: _Recorded
) -> tuple[list[InputSpec], dict[str, Array], tuple[str, ...]]:
    """Return the inputs, the rows of all calls, each once and shuffled, and what they are of.

    Rows are shuffled, so that both parts have long and short ones; of several sizes each has the
    next one, as many rows of each. Raises UsageError for inputs of different shapes at one size, and
    for a single row.
    """
    first = recorded.calls[0]
    sample = next(iter(first.tensors))
    count = len(first.tensors[sample])
    names = [name for name, value in first.tensors.items() if value.ndim and len(value) == count]
    found: list[dict[bytes, tuple[str, dict[str, Array]]]] = [
        {} for _ in range(1 + max(recorded.sizes))
    ]
    for call, label, size in zip(recorded.calls, recorded.labels, recorded.sizes, strict=True):
        arrays = {name: call.tensors[name].detach().numpy() for name in names}
        for place in range(len(arrays[sample])):
            row = {name: values[place] for name, values in arrays.items()}
            found[size].setdefault(
                b"".join(value.tobytes() for value in row.values()), (label, row)
            )
    for rows in found:
        shapes = {tuple(value.shape for value in row.values()) for _, row in rows.values()}
        _refuse_few(component, rows, shapes)
    each = min(map(len, found))
    random = np.random.default_rng(SEED)
    shuffled = [[list(rows.values())[at] for at in random.permutation(len(rows))] for rows in found]
    listed = [one for turn in zip(*(rows[:each] for rows in shuffled)) for one in turn]
    inputs = [
        InputSpec.model_validate(
            {"name": name, "dtype": dtype_name(first.tensors[name])}
        ).with_sizes([rows[0][1][name].shape for rows in shuffled])
        for name in names
    ]
    stacked = {
        item.name: np.concatenate([fill_to(row[item.name][None], item.shape) for _, row in listed])
        for item in inputs
    }
    return inputs, stacked, tuple(label for label, _ in listed)


def _refuse_few(component: str, rows: Collection[Any], shapes: Collection[Any]) -> None:
    """Raise UsageError for inputs of several shapes, and for one input alone."""
    if len(shapes) > 1:
        raise UsageError(
            f"The pipeline gives its {component} inputs of {len(shapes)} shapes.",
            "Use one size for all calls (or --sizes), and texts of one number of tokens.",
        )
    if len(rows) < 2:
        raise UsageError(
            f"The pipeline gives its {component} the same input in every call; some calibrate, others are compared.",
            f"Give calls with at least two {_GIVEN[place_of(component)[1]]}.",
        )


def _forward(
    recorded: _Recorded,
    inputs: Sequence[InputSpec],
    method: str,
    places: Sequence[tuple[Any, ...]],
    factor: float | None,
) -> Any:
    """Return how the part is called: what of its output the pipeline takes, joined before it."""
    given, names = recorded.calls[0], [item.name for item in inputs]
    fixed = {name: value for name, value in given.tensors.items() if name not in names}

    def call(model: Any, *values: torch.Tensor) -> Any:
        arguments = given.filled({**fixed, **dict(zip(names, values, strict=True))})
        if method == FORWARD:
            answer = model(**arguments)
            taken = [followed(answer, place) for place in places]
            if factor is not None:
                return joined(taken, factor), *taken
            output: Any = taken[0]
        else:
            output = getattr(model, method)(**arguments, return_dict=False)[0]
            output = getattr(output, "parameters", output) if method == ENCODE else output
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"it gives {type(output).__name__}s, not one tensor")
        return output

    return call


def text_places(
    pipeline: Any, names: Sequence[str], denoiser: str, arguments: Mapping[str, Any]
) -> dict[str, Places]:
    """Return where in the output of each text encoder that lies which the pipeline takes."""
    recorded = {name: _Recorded() for name in names}

    def watch(name: str) -> Any:
        original = getattr(pipeline, name).forward
        return lambda *args, **kwargs: _Looked(original(*args, **kwargs), (), recorded[name].used)

    for name in names:
        getattr(pipeline, name).forward = watch(name)
    try:
        first_call(pipeline, denoiser, arguments)
    finally:
        for name in names:
            del getattr(pipeline, name).forward
    return {name: _used(one) for name, one in recorded.items()}


def _used(recorded: _Recorded) -> Places:
    """Return where in the output that lies which the pipeline looked at last: states, a vector per text."""
    found = {STATES if dims > 2 else POOLED: path for path, dims in recorded.used}
    return {name: found[name] for name in (STATES, POOLED) if name in found} or {STATES: (0,)}


def _pooled_factor(part: Any, recorded: _Recorded, places: Places) -> float:
    """Return what makes pooled vectors as large as the states of a text (to three digits)."""
    squares = dict.fromkeys(places, 0.0)
    with torch.no_grad():
        for call in recorded.calls[:WEIGHED_CALLS]:
            output = part(**call.filled(call.tensors))
            for name, place in places.items():
                squares[name] += float(followed(output, place).double().square().sum())
    return float(f"{(squares[STATES] / max(squares[POOLED], 1e-12)) ** 0.5:.3g}") or 1.0


def joined(taken: Sequence[torch.Tensor], factor: float | None) -> torch.Tensor:
    """Return states [N, L, D] and pooled vectors [N, P] as [N, L D + P]; one tensor without ``factor``."""
    if factor is None:
        return taken[0]
    return torch.cat([taken[0].flatten(1), taken[1] * factor], dim=1)


def parted(
    value: torch.Tensor, like: Sequence[torch.Tensor], factor: float | None
) -> list[torch.Tensor]:
    """Return what ``joined`` was given, of the shapes and types of ``like``."""
    sizes = [one[0].numel() for one in like] if factor is not None else [value[0].numel()]
    pieces = value.flatten(1).split(sizes, dim=1)
    return [
        (piece / factor if factor and number else piece).reshape(one.shape).to(one.dtype)
        for number, (piece, one) in enumerate(zip(pieces, like, strict=True))
    ]


def followed(output: Any, path: tuple[Any, ...]) -> Any:
    """Return what lies in a model's output at ``path``: names and numbers, from outside in."""
    for key in path:
        output = getattr(output, key) if isinstance(key, str) else output[key]
    return output


class _Looked:
    """A text encoder's output that notes which of its tensors are looked at."""

    def __init__(
        self, value: Any, path: tuple[Any, ...], used: list[tuple[tuple[Any, ...], int]]
    ) -> None:
        self._value, self._path, self._used = value, path, used

    def __getattr__(self, name: str) -> Any:
        return self._noted(getattr(self._value, name), name)

    def __getitem__(self, key: Any) -> Any:
        return self._noted(self._value[key], key)

    def __len__(self) -> int:
        return len(self._value)

    def _noted(self, value: Any, key: Any) -> Any:
        path = (*self._path, key)
        if isinstance(value, torch.Tensor):
            self._used.append((path, value.ndim))
            return value
        if isinstance(value, (tuple, list, Mapping)):
            return _Looked(value, path, self._used)
        return value
