"""The conditions that a denoiser is called with: arrays by input name, one row per condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpq_deploy.errors import ModelError, UsageError, nearest
from mpq_deploy.models.spec import Array, InputSpec
from mpq_deploy.system.array_file import read_arrays

# Entries of the file that are not inputs: the number of rows (an unconditional denoiser has one row
# and no array), the row for classifier-free guidance, and what the rows are called.
ROWS, UNCOND_ROW, LABELS = "_rows", "_uncond_row", "_labels"

# How users make the file.
WRITE = "Write it with numpy.savez, plain numbers only."


@dataclass(frozen=True)
class Conditions:
    """``arrays`` by input name, ``rows`` rows each; without conditions one row and no array."""

    arrays: dict[str, Array] = field(default_factory=dict)
    rows: int = 1
    uncond_row: int | None = None
    labels: tuple[str, ...] = ()

    def take(self, rows: Array) -> dict[str, Array]:
        """Return the given rows of every array."""
        return {name: values[rows] for name, values in self.arrays.items()}

    def save(self, path: Path) -> None:
        """Write the arrays as one .npz file (no pickle)."""
        extra: dict[str, Array] = {ROWS: np.array(self.rows)}
        if self.uncond_row is not None:
            extra[UNCOND_ROW] = np.array(self.uncond_row)
        if self.labels:
            extra[LABELS] = np.array(self.labels)
        np.savez(path, **self.arrays, **extra)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Conditions:
        """Read what ``save`` wrote, or a user's file. Raises UsageError or ModelError."""
        path = path.expanduser()
        if not path.exists():
            raise UsageError(
                f"There is no conditions file at {path}.", "Give a .npz file, one array per input."
            )
        entries = read_arrays(path, error=ModelError, hint=WRITE)
        for name in (ROWS, UNCOND_ROW):
            if name in entries and (
                entries[name].size != 1 or entries[name].dtype.kind not in "iu"
            ):
                raise ModelError(f"'{name}' in {path} is not a whole number.", WRITE)
        labels = tuple(str(label) for label in entries.pop(LABELS, np.array(())))
        uncond = entries.pop(UNCOND_ROW, None)
        declared = entries.pop(ROWS, None)
        sizes = {len(values) if values.ndim else 0 for values in entries.values()}
        sizes |= set() if declared is None else {int(declared.item())}
        if len(sizes) != 1 or min(sizes) < 1:
            shapes = {name: values.shape for name, values in entries.items()}
            raise UsageError(
                f"The arrays in {path} do not have one common number of rows: {shapes}.",
                "Give one row per condition in every array.",
            )
        return cls(entries, sizes.pop(), None if uncond is None else int(uncond.item()), labels)


@dataclass(frozen=True)
class WantedInput:
    """A condition that a model takes; ``shape`` without rows, None for sizes that the array has."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype} [rows{', ' if sizes else ''}{sizes}]"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Say whether an array of ``shape`` (rows first) may be this input."""
        sizes = shape[1:]
        return len(sizes) == len(self.shape) and all(
            w in (None, s) for w, s in zip(self.shape, sizes)
        )


def list_inputs(wanted: Sequence[WantedInput]) -> str:
    """Return one line that says which arrays are needed."""
    return "; ".join(str(item) for item in wanted)


def check_conditions(
    conditions: Conditions, wanted: Sequence[WantedInput], origin: str
) -> tuple[InputSpec, ...]:
    """Return the inputs with the shapes of the given arrays.

    Raises UsageError naming what is missing, unknown, of another shape or type.
    """
    names = [item.name for item in wanted]
    for name in conditions.arrays:
        if name not in names:
            raise UsageError(
                f"{origin} holds an array '{name}', which is not an input of the model.",
                f"{nearest(name, names)}Needed: {list_inputs(wanted) or 'no array, only _rows'}.",
            )
    inputs = []
    for item in wanted:
        values = conditions.arrays.get(item.name)
        if values is None:
            raise UsageError(
                f"{origin} has no array '{item.name}'.", f"Needed: {list_inputs(wanted)}."
            )
        if not item.fits(values.shape):
            raise UsageError(
                f"The array '{item.name}' of {origin} has shape {values.shape}.", f"Needed: {item}."
            )
        if not np.isfinite(values).all():
            raise ModelError(f"The array '{item.name}' of {origin} holds NaN or infinite values.")
        if item.dtype.startswith("int") and not np.issubdtype(values.dtype, np.integer):
            raise UsageError(
                f"The array '{item.name}' of {origin} has type {values.dtype}.", f"Needed: {item}."
            )
        inputs.append(
            InputSpec.model_validate(
                {"name": item.name, "shape": values.shape[1:], "dtype": item.dtype}
            )
        )
    return tuple(inputs)
