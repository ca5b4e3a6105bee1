"""The denoiser of a diffusers pipeline: what it takes is what its pipeline gives it.

In: a pipeline folder. Out: a ``Denoiser`` whose inputs are those of the pipeline's first call.
Tensors that grow with the number of images are inputs; what stays is a constant of the graph.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.arguments import ELEMENT, Arguments, rows_for
from mpq_deploy.calls.pipeline_runs import (
    FIRST_STEPS,
    default_calls,
    first_call,
    load_pipeline,
    opened_call,
    pipeline_class,
    use_scheduler,
    with_steps,
)
from mpq_deploy.calls.stand_in import fixed_text
from mpq_deploy.errors import ModelError, MpqError, UsageError
from mpq_deploy.models.additions import Additions, predicted, read_scheduler
from mpq_deploy.models.call_file import read_calls
from mpq_deploy.models.conditions import Conditions
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.lora import Loras, told
from mpq_deploy.models.model_form import OUTPUT, timestep_dtype
from mpq_deploy.models.prompts import prompts_file, read_prompts
from mpq_deploy.models.sample_sizes import pipeline_multiple, size_fields, sized_calls
from mpq_deploy.models.spec import (
    EACH_SIZE,
    DenoiserSpec,
    InputSpec,
    LoraUse,
    PipelineSpec,
    fill_to,
)
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.models.transformer import signature_of
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import ImageSizes

# Parameters of pipelines by which they make several images of one prompt.
_EACH = re.compile(r"num_\w+_per_prompt|batch_size")
DTYPES = {torch.bool: "bool", torch.int64: "int64", torch.int32: "int64"}


def open_pipeline_part(
    folder: Path,
    index: Mapping[str, Any],
    part: Path,
    module: Any,
    additions: Additions,
    talk: Talk,
) -> Denoiser:
    """Open ``module``, the weights in ``part``, as its pipeline in ``folder`` calls it.

    LoRAs are fused into it and the text encoders. Raises UsageError for a pipeline that cannot be run
    or refuses its calls, ModelError as ``_names`` and for a LoRA that does not fit.
    """
    scheduler = None if additions.scheduler is None else read_scheduler(additions.scheduler)
    pipeline, uses = _fused_pipeline(folder, index, part.name, module, additions, talk)
    use_scheduler(pipeline, scheduler)
    calls = sized_calls(calls_of(pipeline, additions), additions.sizes, pipeline, module.config)
    given, *_ = found = _first_calls(pipeline, part.name, calls[: len(additions.sizes) or 1])
    sample, timestep = names = _names(type(module), given)
    more = _doubled(pipeline, part.name, calls[0], sample, len(given.tensors[sample]))
    inputs, fixed, shared = _sized_inputs(found, more, names, additions.sizes, module.config)
    config = _scheduler_config(pipeline)
    spec = DenoiserSpec(
        name=folder.resolve().name,
        source=str(folder),
        sample=inputs[0],
        timestep=inputs[1],
        conditions=tuple(inputs[2:]),
        output=OUTPUT,
        prediction_type=predicted(config),
        scheduler=_plain(config),
        labels=tuple(call_label(call, number) for number, call in enumerate(calls)),
        config=_plain(dict(module.config)) | {"_class_name": type(module).__name__},
        pipeline=PipelineSpec(
            class_name=type(pipeline).__name__,
            component=part.name,
            calls=calls,
            scheduler=scheduler,
            fixed=_texts({**fixed, **given.constants}),
        ),
        loras=uses,
        **size_fields(additions.sizes, pipeline_multiple(pipeline, module.config)),
    )
    return Denoiser(
        spec,
        _conditions(found, spec),
        _network(module, given, inputs, fixed, shared),
        notes=(*_left_float(index, part.name, spec), *told(spec.loras, talk)),
        first_timestep=_largest({**given.tensors, **given.constants}[timestep]),
    )


def _first_calls(
    pipeline: Any, component: str, calls: Sequence[Mapping[str, Any]]
) -> list[Arguments]:
    """Return what the denoiser is first given in each of ``calls``."""
    ways = (with_steps(pipeline, opened_call(call), FIRST_STEPS) for call in calls)
    return [first_call(pipeline, component, way) for way in ways]


def _sized_inputs(
    found: Sequence[Arguments],
    more: Mapping[str, torch.Tensor] | None,
    names: tuple[str, str],
    sizes: ImageSizes,
    config: Mapping[str, Any],
) -> tuple[list[InputSpec], dict[str, torch.Tensor], frozenset[str]]:
    """Return what ``_inputs`` does, with the inputs' shapes at each of ``sizes``, and which are positions.

    ``found``: what the denoiser is given at each. A tensor that is the same for all images of a size
    and another one at another size (positions) is an input, each sample's own. The shapes of other
    inputs (a ControlNet's residuals) may change with the sample's. Raises UsageError for another
    constant that changes.
    """
    listed, fixed = _inputs(found[0], more, names)
    if (whole := timestep_dtype(config)) != "float32":
        listed[1] = listed[1].model_copy(update={"dtype": whole})
    moved = [name for name, value in fixed.items() if _moves(value, name, found)]
    own = {name: [tuple(one.tensors[name].shape) for one in found] for name in moved}
    for name in moved:
        dtype = dtype_name(fixed.pop(name))
        listed.append(InputSpec.model_validate({"name": name, "dtype": dtype}))
    first = _texts({**fixed, **found[0].constants})
    for size, other in zip(sizes.listed[1:], found[1:]):
        here = _texts({**{n: other.tensors.get(n) for n in fixed}, **other.constants})
        changed = next((name for name in first if here.get(name) != first[name]), None)
        if changed is not None:
            raise UsageError(
                f"The pipeline gives its denoiser another '{changed}' at {size} than at {sizes.listed[0]}, "
                "and the graph holds it as a constant.",
                EACH_SIZE,
            )
    inputs = []
    for item in listed:
        shapes = own.get(item.name) or [_shape_in(one, item, names[0]) for one in found]
        of_sizes = item.with_sizes(shapes)
        if len(found) > 1 and (item is listed[0] or item.name in own):
            # Sizes of as many tokens are several, too.
            of_sizes = of_sizes.model_copy(update={"sizes": tuple(shapes)})
        inputs.append(of_sizes)
    return inputs, fixed, frozenset(own)


def _moves(value: torch.Tensor, name: str, found: Sequence[Arguments]) -> bool:
    """Whether the tensor ``name`` is there in each call, and another one in some."""
    others = [one.tensors.get(name) for one in found]
    present = all(one is not None and one.ndim == value.ndim > 0 for one in others)
    return present and len({fixed_text(one) for one in others}) > 1


def _shape_in(given: Arguments, item: InputSpec, sample: str) -> tuple[int, ...]:
    """Return the shape of an input in another call."""
    value, count = given.tensors.get(item.name), len(given.tensors[sample])
    if value is None or not item.shape:
        return item.shape
    rows = (len(value) // count,) if len(value) > count else ()
    return (*rows, *value.shape[1:])


def _fused_pipeline(
    folder: Path,
    index: Mapping[str, Any],
    part: str,
    module: Any,
    additions: Additions,
    talk: Talk,
) -> tuple[Any, tuple[LoraUse, ...]]:
    """Return the pipeline around ``module``, with the user's LoRAs fused into all that they are for."""
    talk.line(f"  running {index.get('_class_name')} up to its denoiser")
    loras = Loras.opened(additions.loras, pipeline_class(index, folder), module.config)
    loras.fuse(loras.denoiser, module)
    pipeline = load_pipeline(folder, index, {part: module}, loras)
    return pipeline, loras.uses()


def _largest(timestep: Any) -> float:
    """Return the timestep of a call; tokens of a given picture have none of the noise."""
    return float(torch.as_tensor(timestep).max())


def _texts(fixed: Mapping[str, Any]) -> dict[str, str]:
    return {name: fixed_text(value) for name, value in fixed.items()}


def _scheduler_config(pipeline: Any) -> dict[str, Any]:
    own = getattr(pipeline, "scheduler", None)
    config = dict(own.config) if own is not None else {}
    return {**config, "_class_name": type(own).__name__ if own is not None else "none"}


def calls_of(pipeline: Any, additions: Additions) -> tuple[dict[str, Any], ...]:
    """Return what the pipeline is called with: the user's calls, else its defaults with prompts."""
    if additions.call is not None:
        return read_calls(additions.call, pipeline)
    prompts = read_prompts(additions.prompts or prompts_file())
    return default_calls(pipeline, prompts, additions.guidance_scale)


def _names(module_class: Any, given: Arguments) -> tuple[str, str]:
    """Return the sample's name and the timestep's. Raises ModelError where either is missing."""
    signature = signature_of(module_class)
    sample = signature.sample if signature else next(iter(given.tensors), "")
    if ELEMENT in sample or f"{sample}{ELEMENT}0" in given.tensors:
        raise ModelError(
            f"{module_class.__name__} takes a list of samples, '{sample.split(ELEMENT)[0]}', one tensor per image: "
            "no graph has a batch axis for it.",
            "Export it to ONNX yourself with one tensor for all samples, and give the ONNX file with a YAML.",
        )
    if sample not in given.tensors:
        raise ModelError(
            f"{module_class.__name__} is given no tensor '{sample}', but {', '.join(given.tensors)}.",
            "Export it to ONNX and record calls in your own script (--calls).",
        )
    timestep = signature.timestep if signature else ""
    if timestep not in {*given.tensors, *given.constants}:
        raise ModelError(
            f"{module_class.__name__} is given no timestep, but {', '.join((*given.tensors, *given.constants))}.",
            "Models that predict tokens, or make an image in one call, are not supported.",
        )
    return sample, timestep


def _inputs(
    given: Arguments, more: Mapping[str, torch.Tensor] | None, names: tuple[str, str]
) -> tuple[list[InputSpec], dict[str, torch.Tensor]]:
    """Return the graph's inputs, sample and timestep first, and the tensors that stay the same.

    A tensor with several rows per sample (a video's frames) has them as an axis. Raises UsageError
    for one whose size changes with the number of images in another way.
    """
    sample, timestep = names
    count = len(given.tensors[sample])
    inputs, fixed = {timestep: InputSpec(name=timestep)}, {}
    for name, value in given.tensors.items():
        many = more.get(name) if more is not None else None
        if name == timestep and value.ndim < 2 and value.numel() in (1, count):
            inputs[name] = InputSpec(name=name)
        elif _batched(value, many, count):
            rows = (len(value) // count,) if len(value) > count else ()
            inputs[name] = InputSpec.model_validate(
                {"name": name, "shape": (*rows, *value.shape[1:]), "dtype": dtype_name(value)}
            )
        elif many is not None and many.shape != value.shape:
            raise UsageError(
                f"The pipeline gives its denoiser '{name}' of the shape {list(value.shape)} for one image and "
                f"{list(many.shape)} for two.",
                "Its first axis must be the batch.",
            )
        else:
            fixed[name] = value
    others = [name for name in inputs if name not in names]
    return [inputs[name] for name in (*names, *others)], fixed


def _batched(value: torch.Tensor, many: torch.Tensor | None, count: int) -> bool:
    """Whether axis 0 is the batch: it grows with the images, or is as long as the sample's."""
    if value.ndim == 0:
        return False
    if many is None or many.ndim != value.ndim:
        return len(value) == count
    return len(many) == 2 * len(value) and (len(value) <= count or len(value) % count == 0)


def dtype_name(value: torch.Tensor) -> str:
    """Return the type that the graph takes a tensor in."""
    return DTYPES.get(value.dtype, "float32")


def _doubled(
    pipeline: Any, component: str, call: Mapping[str, Any], sample: str, count: int
) -> dict[str, torch.Tensor] | None:
    """Return what it is given for two images; None where the pipeline makes one at a time.

    ``count``: how many samples it is given for one.
    """
    arguments = with_steps(pipeline, opened_call(call), FIRST_STEPS)
    embedded = any(isinstance(value, torch.Tensor) for value in arguments.values())
    found: dict[str, torch.Tensor] = {}
    for more in _twice(pipeline, arguments):
        try:
            given = first_call(pipeline, component, more).tensors
        except MpqError:
            continue
        if len(given.get(sample, ())) == 2 * count:
            # Embeddings that the user gives are not repeated for each image, but there for each text.
            for name, value in given.items():
                if name not in found or value.numel() > found[name].numel():
                    found[name] = value
            if not embedded:
                break
    return found or None


def _twice(pipeline: Any, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the ways to ask for two images; some pipelines ignore the first."""
    taken = inspect.signature(type(pipeline).__call__).parameters
    if each := next((name for name in taken if _EACH.fullmatch(name)), None):
        yield {**arguments, each: 2}
    texts = {
        name: [value] * 2 if isinstance(value, str) else value * 2
        for name, value in arguments.items()
        if (isinstance(value, str) and "prompt" in name)
        or (isinstance(value, list) and name == "class_labels")
    }
    arrays = {
        name: torch.cat([value] * 2)
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    pictures = {name: [value] * 2 for name, value in arguments.items() if hasattr(value, "convert")}
    if texts or arrays:
        yield {**arguments, **texts, **arrays}
    if pictures:
        yield {**arguments, **texts, **arrays, **pictures}


def _left_float(index: Mapping[str, Any], component: str, spec: DenoiserSpec) -> tuple[str, ...]:
    """Say which other parts denoise as well: they stay as they are."""
    others = [
        name
        for name, entry in index.items()
        if name != component
        and isinstance(entry, list)
        and entry[1:] == [spec.config["_class_name"]]
    ]
    return tuple(
        f"{name} also denoises and stays in float; build it with --only {name}" for name in others
    )


def _network(
    module: Any,
    given: Arguments,
    inputs: Sequence[InputSpec],
    fixed: Mapping[str, torch.Tensor],
    shared: Collection[str],
) -> TorchNetwork:
    """Return the network of ``inputs``; ``shared``: positions, of which each sample's row is the same."""
    names = [item.name for item in inputs]
    held = {name: value.detach().clone() for name, value in fixed.items()}

    # How many axes each tensor has in a call; frames of one sample are rows of the batch there.
    axes = {name: value.ndim for name, value in given.tensors.items()}

    def call(model: Any, *values: torch.Tensor) -> torch.Tensor:
        feeds = {
            name: value.flatten(0, 1) if value.ndim > max(axes.get(name, 1), 1) else value
            for name, value in zip(names, values, strict=True)
        }
        feeds |= {name: value[0] for name, value in zip(names, values) if name in shared}
        arguments = given.filled({**held, **feeds})
        if "return_dict" in inspect.signature(type(model).forward).parameters:
            arguments["return_dict"] = False
        output = model(**arguments)[0]
        if not isinstance(output, torch.Tensor):
            raise ModelError(
                f"{type(model).__name__} gives a {type(output).__name__} of tensors, not one as a denoiser does.",
                "Export it to ONNX yourself with one tensor for all samples, and give the ONNX file with a YAML.",
            )
        return output

    return TorchNetwork(module, inputs, OUTPUT, call)


def _conditions(found: Sequence[Arguments], spec: DenoiserSpec) -> Conditions:
    """Return what the first call conditions on: examples for the export.

    Where they change with the size each row has the next one, as rows of a part without timesteps.
    """
    if not any(item.sizes for item in spec.conditions):
        return _conditions_of(found[0], spec.at_size(0))
    each = [_conditions_of(one, spec.at_size(k)) for k, one in enumerate(found)]
    arrays = {
        item.name: np.stack([fill_to(one.arrays[item.name], item.shape) for one in each], 1)
        for item in spec.conditions
    }
    joined = {name: values.reshape(-1, *values.shape[2:]) for name, values in arrays.items()}
    return Conditions(joined, sum(one.rows for one in each))


def _conditions_of(given: Arguments, spec: DenoiserSpec) -> Conditions:
    count = len(given.tensors[spec.sample.name])
    arrays = {}
    for item in spec.conditions:
        value = given.tensors[item.name]
        rows = rows_for(value, item.shape, count)
        value = value if rows is None else rows
        arrays[item.name] = np.ascontiguousarray(value.detach().numpy(), item.dtype)
    return Conditions(arrays, count)


def call_label(call: Mapping[str, Any], number: int) -> str:
    """Return what a call's image is of, for reports."""
    for name in ("prompt", "class_labels"):
        if call.get(name) not in (None, ""):
            return str(call[name])
    return f"image {number + 1}"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON has it: lists for tuples, and nothing private."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if not name.startswith("_") or name == "_class_name"
    }
