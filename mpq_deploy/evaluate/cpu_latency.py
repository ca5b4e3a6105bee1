"""How long a call takes in ONNX Runtime on this CPU. Said as such: it is not the target device's latency."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from mpq_deploy.calls.loop import first_samples
from mpq_deploy.evaluate.cache import model_files
from mpq_deploy.evaluate.evaluation_result import CpuLatency, Evaluation
from mpq_deploy.models.spec import FloatModel
from mpq_deploy.runtime.ort import OrtDenoiser

# Both graphs are held at once so that their calls can alternate; beyond this the memory is not worth the number.
LARGEST_PAIR_BYTES = 2 * 2**30
WARM_UP_CALLS, TIMED_CALLS = 2, 7


def with_cpu_latency(evaluation: Evaluation, model: FloatModel, name: str, path: Path) -> Evaluation:
    """Return the evaluation with the median time of a call, of the float model and of the variant ``name``.

    Batch 1, at the last timestep; without times (and with a note) where both are too large to be held at once. Calls
    alternate, so that a drift of the clock rate meets both alike.
    """
    pair = sum(file.stat().st_size for one in (model.path, path) for file in model_files(one))
    if pair > LARGEST_PAIR_BYTES:
        note = f"CPU latency not measured: both graphs together take {pair / 1e9:.1f} GB."
        return replace(evaluation, notes=(*evaluation.notes, note))
    denoisers = (OrtDenoiser(model.path, model.spec), OrtDenoiser(path, model.spec, fake_quant_only=True))
    noise = first_samples(model.spec, np.zeros(1, np.int64), model.conditions, evaluation.settings.seed)
    first = {key: values[:1] for key, values in model.conditions.items()}
    times: tuple[list[float], list[float]] = ([], [])
    for call in range(WARM_UP_CALLS + TIMED_CALLS):
        for denoiser, kept in zip(denoisers, times, strict=True):
            started = time.perf_counter()
            denoiser(noise, evaluation.timesteps[-1], first)
            if call >= WARM_UP_CALLS:
                kept.append(1e3 * (time.perf_counter() - started))
    latency = CpuLatency(
        float_ms=round(median(times[0]), 3),
        variant_ms={name: round(median(times[1]), 3)},
        calls=TIMED_CALLS,
        threads=os.cpu_count() or 1,
    )
    return replace(evaluation, latency=latency)
