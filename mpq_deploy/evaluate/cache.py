"""Results kept by what they were made from, so that float and the controls are not sampled twice.

An entry is one .npz file named by the digest of its key, with the SHA-256 of that file after it
(readers of archives pass over what follows one). It is written aside and moved into place; an entry
that is truncated or altered is made again: an archive's own checksums do not cover all of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from mpq_deploy.errors import InputError
from mpq_deploy.graph.load import read_proto
from mpq_deploy.models.spec import Array
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.progress import Talk

CHUNK_BYTES = 1 << 20
# Of the SHA-256 behind an entry.
SEAL_BYTES = 32


class SampleCache:
    """Arrays by key, in ``folder``; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, talk: Talk) -> None:
        self._folder = folder
        self._talk = talk

    def get(self, key: Mapping[str, Any], make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """Return the arrays of ``key``: those kept, or else what ``make`` returns, which is then kept."""
        kept = self.find(key)
        return self.keep(key, make()) if kept is None else kept

    def find(self, key: Mapping[str, Any]) -> dict[str, Array] | None:
        """Return the arrays kept for ``key``; None where there are none that can be read."""
        path, text = self._entry(key)
        return None if path is None else self._read(path, text)

    def keep(self, key: Mapping[str, Any], arrays: dict[str, Array]) -> dict[str, Array]:
        """Keep ``arrays`` for ``key``, and return them."""
        path, text = self._entry(key)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = npz_bytes({**arrays, "key": np.array(text)})
            write_aside(path, content, hashlib.sha256(content).digest())
        return arrays

    def keys(self) -> Iterator[dict[str, Any]]:
        """Yield the keys of what is kept; damaged entries are passed over."""
        for path in sorted(self._folder.glob("*.npz")) if self._folder else ():
            with suppress(InputError, ValueError):
                yield json.loads(str(read_arrays(path, ("key",))["key"]))

    def _entry(self, key: Mapping[str, Any]) -> tuple[Path | None, str]:
        text = json.dumps(key, sort_keys=True)
        name = f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
        return None if self._folder is None else self._folder / name, text

    def _read(self, path: Path, text: str) -> dict[str, Array] | None:
        if not path.exists():
            return None
        try:
            damage = "" if _sealed(path) else "it was truncated or altered"
        except OSError as error:
            damage = str(error)
        if damage:
            self._talk.warn(
                f"The cache entry {path.name} cannot be read ({damage}); it is made again."
            )
            return None
        arrays = read_arrays(path)
        if str(arrays.pop("key", "")) != text:
            self._talk.warn(
                f"The cache entry {path.name} belongs to something else; it is made again."
            )
            return None
        return arrays


def _sealed(path: Path) -> bool:
    """Whether the file ends with the SHA-256 of all before it."""
    left, digest = path.stat().st_size - SEAL_BYTES, hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
        return left == 0 and file.read() == digest.digest()


def write_aside(path: Path, *parts: bytes) -> None:
    """Write ``parts`` beside ``path``, then move them into place: a killed write leaves nothing half done."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.writelines(parts)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    """Return ``arrays`` as an .npz file: the same bytes for the same arrays, no pickle."""
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"The array {name} holds Python objects.")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def arrays_digest(arrays: Mapping[str, Array]) -> str:
    """Return the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def folder_stamp(folder: Path) -> list[list[Any]]:
    """Return name, size and time of writing of every file below ``folder``, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    ]


def model_digest(path: Path) -> str:
    """Return the SHA-256 of an ONNX file and of the external data files that it names.

    Raises ModelError when a file is missing or truncated, is not ONNX, or names data outside its
    folder.
    """
    digest = hashlib.sha256()
    for file in model_files(path):
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
        digest.update(b"|")
    return digest.hexdigest()


def model_files(path: Path) -> list[Path]:
    """Return an ONNX file and the external data files that it names."""
    tensors = [
        tensor for tensor in read_proto(path).graph.initializer if uses_external_data(tensor)
    ]
    locations = sorted({ExternalDataInfo(tensor).location for tensor in tensors})
    return [path, *(path.parent / location for location in locations)]
