"""Keep what was observed of the first calls, so that a calibration on more calls can continue.

In: the order of the calls to observe, and a function that observes some of them. Out: the
observation of all calls, and the one to keep. Calls are observed in parts that always end at 12,
24, 48, ... calls. So the floating-point sums are the same whether the first parts were kept or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.calibrate.observers import Observation, merge
from mpq_deploy.models.spec import Array
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.inputs import whole

# Calls of the first part; each later part doubles the number of calls (our choice).
FIRST_PART = 12


@dataclass(frozen=True)
class KeptObservation:
    """The observation ``seen`` of the ``calls`` int64 [N], in the order of observing."""

    seen: Observation
    calls: Array

    def save(self, path: Path) -> None:
        """Write all fields into one .npz without pickle; tensor names are stored as JSON text."""
        arrays = {
            item.name: np.asarray(getattr(self.seen, item.name)) for item in fields(self.seen)
        }
        arrays["names"] = np.array(json.dumps(self.seen.names))
        np.savez(path, calls=self.calls, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> KeptObservation:
        """Read what ``save`` wrote."""
        values: dict[str, Any] = dict(read_arrays(path))
        with whole(path):
            calls, names = values.pop("calls"), tuple(json.loads(str(values["names"])))
            reservoir = int(values["reservoir"])
            return cls(Observation(**{**values, "names": names, "reservoir": reservoir}), calls)


def observe_parts(
    order: Array, kept: KeptObservation | None, observe: Callable[[Array], Observation]
) -> tuple[Observation, KeptObservation | None]:
    """Return the observation of the calls ``order``, and that of its complete parts (None: none).

    ``kept`` is used where its calls are the first of ``order``.
    """
    ends = [0, FIRST_PART]
    while ends[-1] < len(order):
        ends.append(2 * ends[-1])
    known = (
        kept
        if kept is not None and kept.calls.tolist() == order[: len(kept.calls)].tolist()
        else None
    )
    seen, begun = (None, 0) if known is None else (known.seen, len(known.calls))
    for first, last in pairwise(ends):
        if first < begun:
            continue
        part = observe(order[first:last])
        seen = part if seen is None else merge(seen, part)
        if last <= len(order):
            known = KeptObservation(seen, order[:last])
    assert seen is not None
    return seen, known
