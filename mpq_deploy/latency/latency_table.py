"""Latency tables: milliseconds of each (layer shape, scheme) on a target, and their source.

In and out: a JSON file, made by ``mpq-deploy profile`` on the machine that has the hardware, and
read on the build machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mpq_deploy.errors import UsageError
from mpq_deploy.system.files import canonical_json
from mpq_deploy.system.validated import read_model

FORMAT = 1
Source = Literal["measured", "estimated"]


@dataclass(frozen=True)
class LayerShape:
    """What the time of a layer depends on: its operator, and its shapes with the batch in them."""

    op: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    group: int = 1


class Entry(BaseModel):
    """One row of the file: a layer of this shape under ``scheme``, its activation's quantizer included."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    op: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    group: int = Field(1, ge=1)
    scheme: str
    milliseconds: float = Field(gt=0)

    @property
    def shape(self) -> LayerShape:
        """The layer that it is about."""
        return LayerShape(
            self.op, self.input_shape, self.output_shape, self.weight_shape, self.group
        )


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    target: str
    device: str
    builder: str
    source: Source
    batch: int = Field(ge=1)
    date: str = ""
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds by (shape, scheme name), and their provenance.

    ``device``: the GPU's name (whose figures, where estimated); ``builder``: its name and version
    (empty where estimated); ``source``: measured or estimated; ``date``: when, not digested.
    """

    target: str
    device: str
    builder: str
    source: Source
    batch: int
    entries: dict[tuple[LayerShape, str], float] = field(default_factory=dict)
    date: str = ""

    def save(self, path: Path) -> None:
        """Write the table as JSON, entries sorted."""
        path.write_text(canonical_json({**self._values(), "date": self.date}), encoding="utf-8")

    def digest_fields(self) -> str:
        """Everything that a plan depends on, as text: all but the date."""
        return canonical_json(self._values())

    def _values(self) -> dict[str, object]:
        rows = sorted(self.entries.items(), key=lambda item: (repr(item[0][0]), item[0][1]))
        entries = [
            {**vars(shape), "scheme": scheme, "milliseconds": value}
            for (shape, scheme), value in rows
        ]
        return {
            "format": FORMAT,
            "target": self.target,
            "device": self.device,
            "builder": self.builder,
            "source": self.source,
            "batch": self.batch,
            "entries": entries,
        }

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table. Raises UsageError for a file that is missing or no latency table."""
        read = read_model(_File, path, error=UsageError, hint="Make one with 'mpq-deploy profile'.")
        entries = {(entry.shape, entry.scheme): entry.milliseconds for entry in read.entries}
        return cls(
            read.target, read.device, read.builder, read.source, read.batch, entries, read.date
        )

    def require(self, target: str, batch: int) -> None:
        """Raise UsageError unless the table is of ``target`` and of the ``batch`` that the engine is optimised for."""
        if self.target != target:
            raise UsageError(
                f"The latency table is of the target {self.target}, not of {target}.",
                f"Times of another device do not apply: make one with 'mpq-deploy profile --target {target}'.",
            )
        if self.batch != batch:
            raise UsageError(
                f"The latency table is of batch {self.batch}; the engine's usual batch is {batch} (engine.batch_opt).",
                f"Profile with that batch, or set engine.batch_opt to {self.batch}.",
            )
