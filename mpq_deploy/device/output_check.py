"""Compare what an engine gave with what it must give, and sum latencies up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.manifest import Reference
from mpq_deploy.device.run import Run

Array = np.ndarray[Any, np.dtype[Any]]
PERCENTILES = (50, 90, 99)


def relative_squared_error(found: Array, wanted: Array) -> float:
    """||found - wanted||^2 / ||wanted||^2; infinite for shapes that differ or numbers that are not finite."""
    if found.shape != wanted.shape or not np.all(np.isfinite(found)):
        return float("inf")
    wanted = wanted.astype(np.float64)
    return float(np.sum((found.astype(np.float64) - wanted) ** 2) / max(np.sum(wanted**2), np.finfo(np.float64).tiny))


def compare(run: Run, reference: Reference, folder: Path) -> dict[str, Any]:
    """Return the section ``reference`` of results.json. An infinite error is written as null."""
    if run.why:
        return {"ran": False, "why": run.why, "passed": None, "cases": {}}
    with np.load(folder / reference.file, allow_pickle=False) as data:
        errors = {
            case: relative_squared_error(run.outputs[case], data[f"{case}/{reference.output}"])
            for case in reference.cases
        }
    return {
        "ran": True,
        "why": "",
        "passed": all(error <= reference.tolerance_nmse for error in errors.values()),
        "cases": {case: error if np.isfinite(error) else None for case, error in errors.items()},
        "tolerance_nmse": reference.tolerance_nmse,
        "made_by": reference.made_by,
    }


def latency(run: Run) -> Mapping[str, float] | None:
    """Return mean and percentiles in milliseconds of the timed calls; None where nothing was timed."""
    if not run.milliseconds:
        return None
    times = np.asarray(run.milliseconds, np.float64)
    percentiles = {f"p{percentile}_ms": float(np.percentile(times, percentile)) for percentile in PERCENTILES}
    return {"mean_ms": float(times.mean()), "calls": len(times), **percentiles}
