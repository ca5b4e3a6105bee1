"""How long a call takes in ONNX Runtime on this CPU. Said as such: it is not the target device's latency."""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

import numpy as np

from mpq_deploy.calls.loop import first_samples
from mpq_deploy.evaluate.cache import model_files
from mpq_deploy.evaluate.evaluation_result import CpuLatency, EvaluationOptions
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.runtime.ort import OrtDenoiser

# Both graphs are held at once so that their calls can alternate; beyond this the memory is not worth the number.
LARGEST_PAIR_BYTES = 2 * 2**30
WARM_UP_CALLS = 2


def cpu_latency(
    float_model: Path,
    name: str,
    variant: Path,
    spec: DenoiserSpec,
    conditions: dict[str, Array],
    options: EvaluationOptions,
    timestep: float,
) -> tuple[CpuLatency | None, tuple[str, ...]]:
    """Return the median time of a call of batch 1 at ``timestep`` of both graphs, and notes.

    None (with a note) where both are too large to be held at once.

    Calls alternate, so that a drift of the clock rate meets both alike.
    """
    pair = sum(file.stat().st_size for path in (float_model, variant) for file in model_files(path))
    if pair > LARGEST_PAIR_BYTES:
        return None, (f"CPU latency not measured: both graphs together take {pair / 1e9:.1f} GB.",)
    denoisers = (OrtDenoiser(float_model, spec), OrtDenoiser(variant, spec, fake_quant_only=True))
    noise = first_samples(spec, np.zeros(1, np.int64), dict(conditions), options.seed)
    first = {key: values[:1] for key, values in conditions.items()}
    times: tuple[list[float], list[float]] = ([], [])
    for call in range(WARM_UP_CALLS + options.latency_calls):
        for denoiser, kept in zip(denoisers, times, strict=True):
            started = time.perf_counter()
            denoiser(noise, timestep, first)
            if call >= WARM_UP_CALLS:
                kept.append(1e3 * (time.perf_counter() - started))
    latency = CpuLatency(
        float_ms=round(median(times[0]), 3),
        variant_ms={name: round(median(times[1]), 3)},
        calls=options.latency_calls,
        threads=os.cpu_count() or 1,
    )
    return latency, ()
