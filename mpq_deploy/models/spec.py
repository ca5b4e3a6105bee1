"""What a denoiser takes and gives: inputs, prediction, scheduler. Saved as denoiser.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from mpq_deploy.device.generate.generation_folder import range_text
from mpq_deploy.errors import ModelError
from mpq_deploy.system.quantities import ImageSize
from mpq_deploy.system.validated import read_model

Array = np.ndarray[Any, np.dtype[Any]]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction", "trigflow"]
# What to do with a model that takes one size alone.
EACH_SIZE = "Build a run for each size, without --sizes."
SPEC_HINT = "Export the model again, or correct the file."


class Sized(BaseModel):
    """What may be of several sizes; of one it is written as it was before there were several."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _of_one_size(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {k: v for k, v in values.items() if v or k not in ("sizes", "size_step")}


class InputSpec(Sized):
    """One input of the ONNX graph; ``shape`` without batch axis, () for one number per sample.

    ``sizes``: its shape at each of the model's sizes where they differ; ``shape`` then is the least
    that holds all of them.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: Literal["float32", "float16", "int64", "int32", "bool"] = "float32"
    # An input such as a scalar timestep that ONNX declares without a batch axis.
    batched: bool = True
    sizes: tuple[tuple[int, ...], ...] = ()

    def with_sizes(self, shapes: Sequence[tuple[int, ...]]) -> InputSpec:
        """Return the input with its shape at each of the model's sizes."""
        shape = tuple(map(max, zip(*shapes)))
        sizes = tuple(shapes) if len(set(shapes)) > 1 else ()
        return self.model_copy(update={"shape": shape, "sizes": sizes})

    def at_size(self, number: int) -> InputSpec:
        """Return the input at one of the model's sizes."""
        if not self.sizes:
            return self
        return self.model_copy(update={"shape": self.sizes[number], "sizes": ()})

    def between(self, sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> InputSpec | None:
        """Return the input at another (width, height) than the model's ``sizes``; None where that is unknown.

        An axis that the size changes is in proportion to the width, the height or (tokens) both.
        """
        shape = list(self.shape)
        sides = [(width, height, width * height) for width, height in (*sizes, size)]
        for axis in self.open_axes:
            known = [one[axis] for one in self.sizes]
            fitting = (
                known[0] * new // first[0]
                for *first, new in zip(*sides)
                if all(
                    n * first[0] == known[0] * side for n, side in zip(known, first, strict=True)
                )
                and known[0] * new % first[0] == 0
            )
            found = next(fitting, None)
            if found is None:
                return None
            shape[axis] = found
        return self.model_copy(update={"shape": tuple(shape), "sizes": ()})

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that it may have."""
        return self.sizes or (self.shape,)

    @property
    def open_axes(self) -> tuple[int, ...]:
        """The axes of ``shape`` that the size changes."""
        return tuple(axis for axis, found in enumerate(zip(*self.sizes)) if len(set(found)) > 1)


class PipelineSpec(BaseModel):
    """A diffusers pipeline that calls the model: its class, the part that the model is, its calls.

    ``calls``: keyword arguments of the pipeline's ``__call__``, one mapping per image, used in turn;
    of a model of several sizes each call at each of them, one after the other.
    ``scheduler``: a configuration in place of the pipeline's own.
    ``fixed``: what the pipeline gives the model beside the graph's inputs, which the graph has as
    constants: name -> digest of a tensor (``sha256:...``) or the value as text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: str
    component: str
    calls: tuple[dict[str, Any], ...]
    scheduler: dict[str, Any] | None = None
    fixed: dict[str, str] = {}


class LoraUse(BaseModel):
    """A LoRA that was fused: its file, and how many layers of each part it changed.

    ``left_out``: layers of parts that were not opened, such as text encoders of a lone UNet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sha256: str
    scale: float
    layers: dict[str, int]
    left_out: dict[str, int] = {}

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return Path(self.file).name


class DenoiserSpec(Sized):
    """How to call a denoiser and how to sample with it.

    ``scheduler`` is a diffusers scheduler configuration (with ``_class_name``). ``labels`` name the
    rows of conditions.npz, and ``uncond_row`` is the row for classifier-free guidance (used when
    ``guidance_scale`` is not 1). ``pixel_range`` is given when samples are images; latents have a
    decoder file or are compared as such. ``config`` is the diffusers model's own configuration;
    empty for an ONNX file.

    ``timestep`` None: a component that is called once (a VAE's decoder, a text encoder). Its
    samples are rows of conditions.npz by their input's name: the first ``calibration_rows`` to
    calibrate with, the others to compare with. ``first_tokens``: by condition, the first token of every text, for which
    alone the graph holds (``graph.passes.first_token``). ``pooled_factor``: of a text encoder of which
    its pipeline takes two outputs; ``output`` is then the states in a row and behind them the pooled
    vector times this factor, so that both weigh alike (``models.component``). ``pipeline``: the model's calls are those
    of a diffusers pipeline; then ``conditions.npz`` holds those of one call alone. ``recorded``: its calls
    were recorded by somebody's script, and there is nothing to sample with. ``loras``: fused into the
    graph and, where a pipeline calls the model, into its text encoders whenever it is run. ``sizes``:
    the (width, height) that the graph takes, as the user names them, where these are several;
    ``size_step``: 0 for a list; else all multiples of it (in the same units) between them are taken, too.
    """

    name: str
    source: str
    sample: InputSpec
    timestep: InputSpec | None
    calibration_rows: int | None = None
    conditions: tuple[InputSpec, ...] = ()
    output: str = "out_sample"
    prediction_type: PredictionType = "epsilon"
    scheduler: dict[str, Any]
    guidance_scale: float = 1.0
    uncond_row: int | None = None
    labels: tuple[str, ...] = ()
    pixel_range: tuple[float, float] | None = None
    decoder: str | None = None
    synthetic: str = ""
    first_tokens: dict[str, tuple[float, ...]] = {}
    pooled_factor: float | None = None
    recorded: bool = False
    pipeline: PipelineSpec | None = None
    loras: tuple[LoraUse, ...] = ()
    config: dict[str, Any] = {}
    sizes: tuple[tuple[int, int], ...] = ()
    size_step: int = 0

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """All inputs of the graph: the sample, the timestep where there is one, the conditions."""
        return (self.sample, *(() if self.timestep is None else (self.timestep,)), *self.conditions)

    @property
    def sampled(self) -> bool:
        """Whether our own sampler makes the model's calls."""
        return self.timestep is not None and self.pipeline is None and not self.recorded

    def input_shapes(self, calls: int = 1) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input for so many calls, by name."""
        return {
            item.name: (calls, *item.shape) if item.batched else item.shape for item in self.inputs
        }

    def at_size(self, number: int) -> DenoiserSpec:
        """Return the description of the model at one of its sizes alone."""
        if not self.sizes:
            return self
        inputs = {
            "sample": self.sample.at_size(number),
            "conditions": tuple(item.at_size(number) for item in self.conditions),
        }
        pipeline = self.pipeline
        if pipeline is not None:
            calls = pipeline.calls[number :: len(self.sizes)]
            pipeline = pipeline.model_copy(update={"calls": calls})
        own: dict[str, Any] = {**inputs, "pipeline": pipeline, "sizes": (), "size_step": 0}
        if self.calibration_rows is not None:
            own["calibration_rows"] = self.calibration_rows // len(self.sizes)
            own["labels"] = self.labels[number :: len(self.sizes)]
        return self.model_copy(update=own)

    @property
    def middle(self) -> tuple[int, int] | None:
        """The size in the middle of a range, in its steps; None of a list, and where it is one of ``sizes``."""
        if not self.size_step:
            return None
        ends = [(min(sides), max(sides)) for sides in zip(*self.sizes)]
        steps = self.size_step
        width, height = (low + (high - low) // steps // 2 * steps for low, high in ends)
        return None if (width, height) in self.sizes else (width, height)

    def between(self) -> DenoiserSpec | None:
        """Return the description at the ``middle`` of a range alone; None where there is none."""
        return None if self.middle is None else self.within(self.middle)

    def within(self, size: tuple[int, int]) -> DenoiserSpec | None:
        """Return the description at another (width, height) of the range; None where a shape is unknown.

        Samples, where a model without timesteps has some, are those of the largest size, to be cut.
        """
        sample, *conditions = (
            item.between(self.sizes, size) for item in (self.sample, *self.conditions)
        )
        if sample is None or None in conditions:
            return None
        found = self.at_size(self.largest_first[0])
        own: dict[str, Any] = {"sample": sample, "conditions": tuple(conditions)}
        if found.pipeline is not None:
            shape = dict(zip(("width", "height"), size))
            calls = tuple({**call, **shape} for call in found.pipeline.calls)
            own["pipeline"] = found.pipeline.model_copy(update={"calls": calls})
        return found.model_copy(update=own)

    def cut(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the first part of each row of ``arrays`` that has the shape of its input."""
        shapes = {item.name: item.shape for item in self.inputs}
        return {name: cut_to(values, shapes[name]) for name, values in arrays.items()}

    def conditions_at(self, number: int, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the rows of one size: each size has the next one where they are samples or change with it."""
        in_turn = self.timestep is None or any(item.sizes for item in self.conditions)
        if not self.sizes or not in_turn:
            return dict(arrays)
        every = slice(number, None, len(self.sizes))
        return self.at_size(number).cut({name: values[every] for name, values in arrays.items()})

    def size_of(self, sample: Array) -> int:
        """Return the number of the size that ``sample`` [N, ...] has; 0 where there is one."""
        return self.sample.sizes.index(tuple(sample.shape[1:])) if self.sizes else 0

    @property
    def size_names(self) -> tuple[str, ...]:
        """The sizes as the user names them."""
        return tuple(str(ImageSize(*size)) for size in self.sizes)

    @property
    def sample_step(self) -> int:
        """The step of a range in the sample's own units."""
        return self.size_step * self.sample.shape[-1] // max((w for w, _ in self.sizes), default=1)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether samples may have the ``shape`` (without the batch) by the model's sizes."""
        sizes = self.sample.shapes
        if not self.size_step or tuple(shape) in sizes:
            return tuple(shape) in sizes
        ends = zip(map(min, zip(*sizes)), shape, self.sample.shape)
        inside = len(shape) == len(sizes[0]) and all(low <= one <= high for low, one, high in ends)
        # Tokens in a row do not say of which height and width they are.
        sides = self.sample.open_axes if len(shape) == 3 else ()
        return inside and not any(shape[axis] % self.sample_step for axis in sides)

    @property
    def taken_sizes(self) -> str:
        """What the graph takes, for a message."""
        if self.size_step:
            return range_text(self.sizes, self.size_step)
        if not self.sample.sizes:
            return str(list(self.sample.shape))
        shapes = zip(self.size_names, self.sample.sizes)
        return ", ".join(f"{name} ({list(one)})" for name, one in shapes)

    @property
    def largest_first(self) -> tuple[int, ...]:
        """The numbers of the sizes, those of the largest samples first."""
        return tuple(
            sorted(range(len(self.sizes)), key=lambda k: -prod(self.sample.at_size(k).shape))
        )

    @property
    def timestep_name(self) -> str:
        """The timestep's input; empty where there is none."""
        return "" if self.timestep is None else self.timestep.name

    def save(self, path: Path) -> None:
        """Write the specification as JSON with sorted keys."""
        import json

        path.write_text(
            json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n",
            encoding="utf-8",
        )

    @classmethod
    def load(cls, path: Path) -> DenoiserSpec:
        """Read what ``save`` wrote. Raises ModelError naming the first field that is wrong."""
        return read_model(cls, path, infinite=True, error=ModelError, hint=SPEC_HINT)


@dataclass(frozen=True)
class FloatModel:
    """A float ONNX file and how to call it: ``conditions`` by input name, one row per condition.

    ``pipeline``: the folder of the diffusers pipeline that calls it, where ``spec`` names one;
    ``calls``: the folder of its calls where somebody's script recorded them.
    """

    path: Path
    spec: DenoiserSpec
    conditions: dict[str, Array]
    pipeline: Path | None = None
    calls: Path | None = None

    def at_size(self, number: int) -> FloatModel:
        """Return the model at one of its sizes alone."""
        conditions = self.spec.conditions_at(number, self.conditions)
        return replace(self, spec=self.spec.at_size(number), conditions=conditions)

    def between(self) -> FloatModel | None:
        """Return the model at the middle of a range of sizes alone (``DenoiserSpec.between``)."""
        spec = self.spec.between()
        if spec is None:
            return None
        largest = self.spec.conditions_at(self.spec.largest_first[0], self.conditions)
        return replace(self, spec=spec, conditions=spec.cut(largest))


def cut_to(values: Array, shape: tuple[int, ...]) -> Array:
    """Return the first ``shape`` of each row of ``values`` [N, ...]."""
    place = (slice(None), *map(slice, shape))
    return values[place]


def fill_to(values: Array, shape: tuple[int, ...]) -> Array:
    """Return ``values`` [N, ...] with zeros behind each row, [N, *shape]."""
    more = [(0, most - here) for most, here in zip(shape, values.shape[1:], strict=True)]
    return np.pad(values, [(0, 0), *more])
