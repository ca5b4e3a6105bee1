"""Measure what each scheme of each layer costs, by the metric that the user names."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace

import numpy as np

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.sensitivity.methods import METHODS
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable


def measure(method: str, subject: Subject) -> SensitivityTable:
    """Return the table of ``method``, one of ``METHODS``.

    Methods that probe fall back to "gain" where torch is missing or the graph holds an operator
    that torch cannot evaluate here. "trajectory" falls back to "probe" without a sampler that torch
    can differentiate. The table's ``metric`` and ``notes`` name the fallback. Raises UsageError for
    an unknown method.
    """
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise UsageError(
            f"Unknown sensitivity '{method}'.", f"{nearest(method, METHODS)}Known: {known}."
        )
    shares = subject.shares
    if shares is not None and not METHODS[method].weighs_bits:
        even = replace(subject, shares=None)
        return measure(method, even).weighted(np.asarray(shares))
    if not METHODS[method].probes:
        return _measure(method, subject)
    if importlib.util.find_spec("torch") is None:
        return _gain_instead("torch is not installed", subject)
    from mpq_deploy.calls.sampler_tape import NoTrajectory
    from mpq_deploy.onnx_torch.torch_graph import UnsupportedOperator

    try:
        return _measure(method, subject)
    except UnsupportedOperator as error:
        return _gain_instead(error.message, subject)
    except NoTrajectory as error:
        note = f"losses are of single outputs, not of final images: {error.message}"
        subject.talk.warn(note)
        table = measure("probe", subject)
        return replace(table, notes=(*table.notes, note))


def _gain_instead(reason: str, subject: Subject) -> SensitivityTable:
    note = f"losses are from the gain metric instead of probes: {reason}"
    subject.talk.warn(note)
    table = _measure("gain", subject)
    return replace(table, notes=(*table.notes, note))


def _measure(method: str, subject: Subject) -> SensitivityTable:
    name = METHODS[method].module
    module = importlib.import_module(f"mpq_deploy.sensitivity.{name}")
    alone = subject if METHODS[method].any_size else subject.at_one_size()
    table: SensitivityTable = getattr(module, f"measure_{name}")(alone)
    if alone is subject:
        return table
    largest = subject.spec.size_names[subject.calibration.largest(subject.spec)]
    return replace(table, notes=(*table.notes, f"losses are measured at {largest} alone"))
