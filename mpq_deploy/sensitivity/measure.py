"""Measure what each scheme of each layer costs, by the metric that the user names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.sensitivity.measured_calls import MeasureOptions
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable

METHODS = ("probe", "gain", "local_error", "exhaustive", "kurtosis", "orm", "size-only", "random")
# They weigh bits by an importance of their own, and the timesteps with it.
IMPORTANCE_METHODS = ("kurtosis", "orm", "size-only", "random")
Metric = Callable[[Subject], SensitivityTable]


def measure(
    method: str,
    subject: Subject,
) -> SensitivityTable:
    """Return the table of ``method``, one of ``METHODS``. ``options.shares``: what each timestep counts for.

    Where torch is missing, or the graph holds an operator that torch cannot evaluate here, "probe" becomes "gain":
    the table's ``metric`` and ``notes`` say so. Raises UsageError for an unknown method.
    """
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise UsageError(f"Unknown sensitivity '{method}'.", f"{nearest(method, METHODS)}Known: {known}.")
    if subject.options.shares is not None and method not in IMPORTANCE_METHODS:
        even = replace(subject, options=replace(subject.options, shares=None))
        return measure(method, even).weighted(np.asarray(subject.options.shares))
    if method != "probe":
        return _metric(method)(subject)
    if importlib.util.find_spec("torch") is None:
        return _instead("torch is not installed", subject)
    from mpq_deploy.onnx_torch.torch_graph import UnsupportedOperator

    try:
        return _metric("probe")(subject)
    except UnsupportedOperator as error:
        return _instead(error.message, subject)


def _instead(reason: str, subject: Subject) -> SensitivityTable:
    note = f"losses are from the gain metric instead of probes: {reason}"
    subject.talk.warn(note)
    table = _metric("gain")(subject)
    return replace(table, notes=(*table.notes, note))


def _metric(method: str) -> Metric:
    if method == "probe":
        from mpq_deploy.sensitivity.probe import measure_probe

        return measure_probe
    if method == "gain":
        from mpq_deploy.sensitivity.gain import measure_gain

        return measure_gain
    if method == "local_error":
        from mpq_deploy.sensitivity.local_error import measure_local_error

        return measure_local_error
    if method == "kurtosis":
        from mpq_deploy.sensitivity.kurtosis import measure_kurtosis

        return measure_kurtosis
    if method in IMPORTANCE_METHODS:
        from mpq_deploy.sensitivity import orm

        return {"orm": orm.measure_orm, "size-only": orm.measure_size_only, "random": orm.measure_random}[method]
    from mpq_deploy.sensitivity.exhaustive import measure_exhaustive

    return measure_exhaustive


__all__ = ["IMPORTANCE_METHODS", "METHODS", "MeasureOptions", "measure"]
