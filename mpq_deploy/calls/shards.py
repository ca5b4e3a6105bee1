"""Recorded inputs on disk: safetensors shards of rows, and an index that says what each call has.

A folder holds ``calls-00000.safetensors`` and so on, each with some rows of one input or several
(input name -> [rows, ...]), and ``index.safetensors`` with columns of whole and real numbers, one
entry per call; ``index.NAME`` are positions among all rows of that input. Rows are written as they
come and read from their files, so memory never holds all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.errors import InputError
from mpq_deploy.models.spec import Array
from mpq_deploy.system.names import printable

INDEX, SHARD = "index.safetensors", "calls-{:05d}.safetensors"
# Rows are gathered up to so many bytes before they are written (our choice).
SHARD_BYTES = 64 << 20
AGAIN = "Record the calls again."
DIGEST_BYTES = 16


class ShardWriter:
    """Writes rows of inputs into shards of about ``SHARD_BYTES``; ``finish`` writes the index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[str, list[Array]] = {}
        self._counts: dict[str, int] = {}
        self._bytes = self._shards = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, row: Array) -> int:
        """Write one row [...] of an input; return its position among that input's rows."""
        self._rows.setdefault(name, []).append(row)
        self._counts[name] = self._counts.get(name, 0) + 1
        self._bytes += row.nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()
        return self._counts[name] - 1

    def add_all(self, name: str, values: Any, index: Array) -> Array:
        """Write the rows of ``values`` [U, ...] that ``index`` names, equal ones once.

        Return the same index of what is written, so that files depend on the calls alone.
        """
        places: dict[int, int] = {}
        known: dict[bytes, int] = {}
        for row in index.ravel():
            if int(row) not in places:
                content = np.array(values[row])
                digest = blake2b(content.tobytes(), digest_size=DIGEST_BYTES).digest()
                if digest not in known:
                    known[digest] = self.add(name, content)
                places[int(row)] = known[digest]
        return np.array([places[int(row)] for row in index.ravel()], np.int64)

    def finish(self, columns: Mapping[str, Array]) -> None:
        """Write the last shard and the index with its ``columns``."""
        self._flush()
        self._write(INDEX, {name: np.ascontiguousarray(c) for name, c in columns.items()})

    def _write(self, name: str, tensors: dict[str, Array]) -> None:
        from safetensors.numpy import save

        # Not by the library: its errors do not say that a disk is full.
        (self._folder / name).write_bytes(save(tensors))

    def _flush(self) -> None:
        if self._rows:
            tensors = {name: np.stack(rows) for name, rows in self._rows.items()}
            self._write(SHARD.format(self._shards), tensors)
            self._rows, self._bytes, self._shards = {}, 0, self._shards + 1


class ShardRows:
    """The rows of one input over all shards, mapped: NumPy arrays by position."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *parts[0].shape[1:])
        self.dtype: np.dtype[Any] = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        """Return the given rows: one position, or an array of positions."""
        wanted = np.asarray(rows)
        shards = np.searchsorted(self._starts, wanted.ravel(), side="right") - 1
        found = np.empty((wanted.size, *self.shape[1:]), self.dtype)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._parts[shard][wanted.ravel()[here] - self._starts[shard]]
        return found.reshape((*wanted.shape, *self.shape[1:]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return all rows in memory."""
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)


def read_shards(folder: Path) -> tuple[dict[str, Array], dict[str, ShardRows]]:
    """Return the index's columns, and each input's rows.

    Raises InputError for a folder that is not one of recorded calls, damaged files, and positions
    that no row has.
    """
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder} holds no recorded calls: there is no {INDEX}.", AGAIN)
    columns = {name: np.array(values) for name, values in _mapped(index).items()}
    lengths = {values.shape for values in columns.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise InputError(f"The columns of {index} are not one entry per call.", AGAIN)
    parts: dict[str, list[Array]] = {}
    for path in sorted(folder.glob(SHARD.format(0).replace("00000", "*"))):
        for name, values in _mapped(path).items():
            parts.setdefault(name, []).append(values)
    for name, rows in parts.items():
        column = columns.get(f"index.{name}")
        kinds = {(part.dtype, part.shape[1:]) for part in rows}
        count = sum(len(part) for part in rows)
        if column is None or column.dtype.kind not in "iu" or len(kinds) != 1:
            raise InputError(f"The rows of '{printable(name)}' in {folder} do not fit.", AGAIN)
        if len(column) and not 0 <= column.min() <= column.max() < count:
            raise InputError(
                f"{index} names row {column.max()} of '{printable(name)}', which has {count}.",
                AGAIN,
            )
    return columns, {name: ShardRows(rows) for name, rows in parts.items()}


def _mapped(path: Path) -> dict[str, Array]:
    """Return the tensors of a safetensors file, mapped. Raises InputError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header and that every tensor lies in the file.
        with safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
            empty = [n for n in names if 0 in file.get_slice(n).get_shape() or not n]
            scalars = [n for n in names if not file.get_slice(n).get_shape()]
        if empty or scalars:
            raise ValueError(f"'{printable((empty + scalars)[0])}' holds no rows")
        with path.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(size))
        return {name: _one(path, header[name], 8 + size) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        said = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise InputError(f"{path} cannot be read: {said}.", AGAIN) from error


# Of safetensors, those that inputs of a model have.
_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def _one(path: Path, entry: dict[str, Any], data: int) -> Array:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"the type {printable(str(entry['dtype']))} is of no input")
    dtype, (start, _) = np.dtype(_TYPES[entry["dtype"]]), entry["data_offsets"]
    # Sizes of one axis: NumPy maps from any offset.
    return np.memmap(path, dtype, "r", data + start, tuple(entry["shape"]))
