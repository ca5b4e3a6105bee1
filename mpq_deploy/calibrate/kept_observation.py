"""What was observed of the first calls, for a calibration on more of them.

In: the order in which calls are observed, and what observes some of them. Out: the observation of
all, and that of the parts that a longer order begins with alike. Parts end at 12, 24, 48 calls and so
on, whatever their number, so that sums are the same whether some of them were kept or none.
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

# Calls of the first part; each later one doubles all before it (our choice: an effort's least).
FIRST_PART = 12


@dataclass(frozen=True)
class KeptObservation:
    """``seen`` of the ``calls`` int64 [N], in the order in which they were observed."""

    seen: Observation
    calls: Array

    def save(self, path: Path) -> None:
        """Write everything into one .npz (no pickle); names as JSON text."""
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
    """Return what is seen of the calls ``order``, and of its whole parts (None: there are none)."""
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
