"""A pipeline by our code beside the same by diffusers alone: differences of inputs and of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.calls.pipeline_runs import image_seed
from mpq_deploy.calls.record_pipeline import Runs, record_pipeline
from mpq_deploy.calls.recorded import INDEX, STEP
from mpq_deploy.calls.shards import read_shards
from mpq_deploy.models.additions import Additions
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.models.spec import FloatModel
from mpq_deploy.system.progress import Talk
from tests.oracle.pipelines import COMPONENTS, STEPS, Case
from tests.oracle.recording import Array, Observed, observe

SEED = 3
Compute = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Comparison:
    """``inputs``: the largest difference of any input at any step; ``images``: of what was returned.

    Both are parts of the largest value of the tensor that is compared, at least 1.

    ``constants``: tensors that are not inputs of the graph, as they are the same in every call.
    """

    denoiser: str
    names: tuple[str, ...]
    constants: tuple[str, ...]
    calls: int
    steps: int
    inputs: float
    images: float


def open_case(case: Case) -> Denoiser:
    """Open the denoiser of the case's pipeline as a build does."""
    return open_denoiser(
        str(case.folder), Additions(call=case.call, component=COMPONENTS.get(case.name))
    )


def compare(case: Case, denoiser: Denoiser, compute: Compute, folder: Path) -> Comparison:
    """Run the pipeline twice, ``compute`` being the denoiser once; record in ``folder``.

    Raises AssertionError where other inputs, calls or steps were recorded.
    """
    spec = denoiser.spec
    assert spec.pipeline is not None
    component = spec.pipeline.component
    observed = observe(case.folder, component, case.arguments, STEPS, image_seed(SEED, 0))
    model = FloatModel(folder / "none.onnx", spec, dict(denoiser.conditions.arrays), case.folder)
    runs = Runs((0,), STEPS, SEED)
    record = record_pipeline(model, runs, None, folder / "calls", Talk(), compute)
    columns, rows = read_shards(folder / "calls")
    recorded = {name: values[columns[f"{INDEX}{name}"]] for name, values in rows.items()}
    counts = [_rows(call, spec.sample.name) for call in observed.calls]
    assert columns[STEP].tolist() == np.repeat(observed.steps, counts).tolist()
    names = tuple(item.name for item in spec.inputs)
    assert set(recorded) == set(names)
    inputs = max(_largest(name, recorded[name], observed, counts) for name in names)
    return Comparison(
        denoiser=str(spec.config["_class_name"]),
        names=names,
        constants=_constants(names, observed),
        calls=len(observed.calls),
        steps=len(set(observed.steps)),
        inputs=inputs,
        images=_difference(_channels_first(observed.images), record.images),
    )


def _rows(call: dict[str, Array], sample: str) -> int:
    return len(call[sample])


def _largest(name: str, recorded: Array, observed: Observed, counts: list[int]) -> float:
    """Return the largest difference between the rows of an input, as recorded and as observed."""
    begin, largest = 0, 0.0
    for call, count in zip(observed.calls, counts):
        expected = call[name]
        got = recorded[begin : begin + count].astype(np.float64)
        if expected.size == got.size:
            # Several rows of one sample, such as a video's frames, are an axis of their own.
            expected = expected.reshape(got.shape)
        elif expected.ndim == 0 or len(expected) != count:
            expected = np.broadcast_to(expected.reshape(1, *got.shape[1:]), got.shape)
        largest, begin = max(largest, _difference(expected, got)), begin + count
    assert begin == len(recorded), f"{len(recorded)} rows of {name}, {begin} were given"
    return largest


def _difference(expected: Array, got: Array) -> float:
    assert expected.shape == got.shape, f"{got.shape} instead of {expected.shape}"
    largest = float(np.max(np.abs(expected), initial=1.0))
    return float(np.max(np.abs(expected.astype(np.float64) - got), initial=0.0)) / largest


def _constants(names: tuple[str, ...], observed: Observed) -> tuple[str, ...]:
    """Return the tensors that are not inputs. Raises AssertionError for one that changes or comes and goes."""
    first = observed.calls[0]
    constants = tuple(name for name in first if name not in names)
    for call in observed.calls:
        assert set(call) == set(first), f"{set(call) ^ set(first)} come and go"
        for name in constants:
            assert np.array_equal(call[name], first[name]), f"{name} changes"
    return constants


def _channels_first(images: Array) -> Array:
    return np.moveaxis(images, -1, 1) if images.shape[-1] in (1, 3, 4) else images
