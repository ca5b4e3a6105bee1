"""Compare an engine's outputs with the references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.manifest import Reference
from mpq_deploy.device.run import Run, reference_arrays

Array = np.ndarray[Any, np.dtype[Any]]


def relative_squared_error(output: Array, reference: Array) -> float:
    """||output - reference||^2 / ||reference||^2; infinite where shapes differ or it is not finite."""
    if output.shape != reference.shape or not np.all(np.isfinite(output)):
        return float("inf")
    reference = reference.astype(np.float64)
    error = np.sum((output.astype(np.float64) - reference) ** 2)
    return float(error / max(np.sum(reference**2), np.finfo(np.float64).tiny))


def compare(run: Run, reference: Reference, folder: Path) -> dict[str, Any]:
    """Return the section ``reference`` of results.json. An infinite error is written as null."""
    if run.why:
        return {"ran": False, "why": run.why, "passed": None, "cases": {}}
    data = reference_arrays(folder, reference)
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
