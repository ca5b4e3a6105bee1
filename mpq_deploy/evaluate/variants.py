"""The graphs of a run beside the float model: ours, corrected, as it was before recovery, and the controls."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from mpq_deploy.calls.loop import first_samples
from mpq_deploy.evaluate.cache import model_files
from mpq_deploy.evaluate.evaluate import Variant, evaluate, kept_samples
from mpq_deploy.evaluate.evaluation_result import CpuLatency, Evaluation
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.models.spec import Array, FloatModel
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.run.stage_memory import batch_within_memory, fitting_batch
from mpq_deploy.run.view import SAMPLES
from mpq_deploy.runtime.correction import Correction
from mpq_deploy.runtime.ort import OrtDenoiser, model_feeds
from mpq_deploy.system.compute import CPU_PROVIDER
from mpq_deploy.system.inputs import read_json
from mpq_deploy.system.names import plain_name
from mpq_deploy.system.quantities import ImageSize
from mpq_deploy.system.validated import model_of

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

LATENCY = "latency.json"
# In the folder of the stage controls.
CONTROLS_FILE = "controls.json"
# The variant that samples the plan's graph with PTQD's correction in front of the sampler.
CORRECTED = "ours+ptqd"
# The plan as it was before recovery, where there was one.
BEFORE = "plan"
# Both graphs are held at once so that their calls can alternate; beyond this the memory is not
# worth the number.
LARGEST_PAIR_BYTES = 2 * 2**30
WARM_UP_CALLS, TIMED_CALLS = 2, 7


class ControlFacts(BaseModel):
    """What is known of a control: its bytes, and its layers counted by family, most first."""

    model_config = ConfigDict(extra="forbid")

    size_bytes: NonNegativeInt
    layers: dict[str, NonNegativeInt]


def read_controls(folder: Path) -> dict[str, Variant]:
    """Return the controls in the stage's ``folder``, by name. Raises InputError."""
    path = folder / CONTROLS_FILE
    found: dict[str, ControlFacts] = model_of(dict[str, ControlFacts], read_json(path), str(path))
    return {
        plain_name(name, "A control's name"): Variant(
            folder / name / SIMULATED, facts.size_bytes, layers=facts.layers, is_control=True
        )
        for name, facts in found.items()
    }


def _settings(run: Run, model: FloatModel, batch: int) -> EvaluateSettings:
    """Return the settings that each of the model's sizes is compared by."""
    settings = run.recipe.evaluate
    if model.spec.timestep is None:
        # A model without timesteps is called once per input that was held out.
        held_out = len(model.conditions[model.spec.sample.name]) - (
            model.spec.calibration_rows or 0
        )
        settings = settings.replace(steps=1, samples=min(settings.samples, held_out))
    sizes = (len(model.spec.sizes) or 1) + (model.spec.between() is not None)
    return settings.replace(
        samples=-(-settings.samples // sizes),
        timesteps=min(settings.timesteps, settings.steps),
        batch_size=batch,
    )


def kept_images(run: Run, controls: bool) -> tuple[int, int]:
    """Return what earlier evaluations have left: images of the float model, and controls.

    Of models of one size; ``controls``: whether these are current.
    """
    model = run.exported.model
    if model.spec.sizes:
        return 0, 0
    settings = _settings(run, model, fitting_batch(run, "evaluate"))
    found = (
        read_controls(run.stage("controls")) if controls and run.recipe.evaluate.controls else {}
    )
    paths = [control.path for control in found.values()]
    return kept_samples(model, settings, paths, run.base / SAMPLES)


def evaluate_variants(
    run: Run,
    ours: Path,
    size_bytes: int,
    latency: bool,
    correction: Correction | None = None,
    before: Path | None = None,
) -> Evaluation:
    """Compare ``ours`` (without and with ``correction``) and the controls with the float model.

    ``before``: the plan's graph where ``ours`` is the recovered one, of the same size. Samples are
    cached by content.
    """
    model = run.exported.model
    settings = _settings(run, model, batch_within_memory(run, "evaluate"))
    variants = {"ours": Variant(ours, size_bytes)}
    if correction is not None:
        variants[CORRECTED] = Variant(ours, size_bytes, correction)
    if before is not None:
        variants[BEFORE] = Variant(before, size_bytes)
    variants |= read_controls(run.stage("controls"))
    sized = [model.at_size(k) for k in range(len(model.spec.sizes) or 1)]
    between = model.between()
    store = run.base / SAMPLES
    found = [
        evaluate(variants, one, settings, run.talk, cache=store, crew=run.crew)
        for one in (*sized, *([] if between is None else [between]))
    ]
    middle = model.spec.middle
    evaluation = found[0].with_sizes(
        model.spec.size_names, found, "" if middle is None else str(ImageSize(*middle))
    )
    model = sized[0]
    if model.pipeline is not None:
        from mpq_deploy.evaluate.pipeline_samples import forget_pipeline

        forget_pipeline()
    return with_cpu_latency(evaluation, model, "ours", ours) if latency else evaluation


def _first_feed(model: FloatModel, evaluation: Evaluation) -> dict[str, Array]:
    """Return the inputs of one call at the last timestep, on noise or as it was recorded."""
    spec = model.spec
    first = {key: values[:1] for key, values in model.conditions.items()}
    if spec.recorded:
        return {
            item.name: np.asarray(
                first[item.name].reshape(1, *item.shape)[slice(None) if item.batched else 0],
                item.dtype,
            )
            for item in spec.inputs
        }
    noise = first_samples(spec, np.zeros(1, np.int64), model.conditions, evaluation.settings.seed)
    return model_feeds(spec, noise, evaluation.timesteps[-1], first)


def with_cpu_latency(
    evaluation: Evaluation, model: FloatModel, name: str, path: Path
) -> Evaluation:
    """Return the evaluation with a call's median CPU time, float and of the variant ``name``.

    In ONNX Runtime on this CPU, which is not the target device's latency. Batch 1, at the last
    timestep; without times (and with a note) where both are too large to be held at once. Calls
    alternate, so that a drift of the clock rate meets both alike.
    """
    pair = sum(file.stat().st_size for one in (model.path, path) for file in model_files(one))
    if pair > LARGEST_PAIR_BYTES:
        note = f"CPU latency not measured: both graphs together take {pair / 1e9:.1f} GB."
        return replace(evaluation, notes=(*evaluation.notes, note))
    denoisers = (
        OrtDenoiser(model.path, model.spec, 0, [CPU_PROVIDER]),
        OrtDenoiser(path, model.spec, 0, [CPU_PROVIDER], fake_quant_only=True),
    )
    feed = _first_feed(model, evaluation)
    times: tuple[list[float], list[float]] = ([], [])
    for call in range(WARM_UP_CALLS + TIMED_CALLS):
        for denoiser, milliseconds in zip(denoisers, times, strict=True):
            started = time.perf_counter()
            denoiser.run(feed)
            if call >= WARM_UP_CALLS:
                milliseconds.append(1e3 * (time.perf_counter() - started))
    latency = CpuLatency(
        float_ms=round(median(times[0]), 3),
        variant_ms={name: round(median(times[1]), 3)},
        calls=TIMED_CALLS,
        threads=os.cpu_count() or 1,
    )
    return replace(evaluation, latency=latency)
