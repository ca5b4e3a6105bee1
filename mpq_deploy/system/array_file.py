"""NumPy's files from others: numbers within limits, or one line that says what is wrong.

NumPy and the standard library only: devices use it, too.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpq_deploy.errors import InputError, MpqError
from mpq_deploy.system.inputs import open_input
from mpq_deploy.system.names import printable

Array = np.ndarray[Any, Any]

# Compressed arrays may unpack to this many times the file's size, and this many bytes more (our
# choice): six megabytes that ask for six gigabytes are refused.
RATIO, SLACK_BYTES = 32, 64 << 20
# Arrays in one file.
MEMBERS = 100_000
_BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    EOFError,
    OSError,
    NotImplementedError,
    KeyError,
    RuntimeError,
)


def read_array(path: Path, *, error: type[MpqError] = InputError, hint: str = "") -> Array:
    """Return the array of a ``.npy`` file. Raises ``error`` for a damaged file or Python objects."""
    with open_input(path, error=error, hint=hint) as file:
        file.seek(0, 2)
        size = file.tell()
        file.seek(0)
        return _array(file, size, f"{printable(str(path))}", error, hint)


def read_arrays(
    path: Path,
    names: tuple[str, ...] | None = None,
    *,
    error: type[MpqError] = InputError,
    hint: str = "",
) -> dict[str, Array]:
    """Return the arrays of a ``.npz`` file by name; ``names``: these alone, each of which must be there.

    Raises ``error`` for a damaged file, Python objects, a name that occurs twice, a header that
    does not fit its data, and content that is too large for the file (``RATIO``).
    """
    shown = printable(str(path))
    with open_input(path, error=error, hint=hint) as file:
        file.seek(0, 2)
        limit = RATIO * file.tell() + SLACK_BYTES
        try:
            archive = zipfile.ZipFile(file)
        except _BAD_ZIP as problem:
            what = f"{shown} is not a file of NumPy arrays (.npz): {printable(str(problem))}."
            raise error(what, hint) from problem
        with archive:
            members = archive.infolist()
            _check_members(members, limit, shown, error, hint)
            arrays = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if names is None or name in names:
                    arrays[name] = _member(
                        archive, member, f"{shown}: '{printable(name)}'", error, hint
                    )
    for name in names or ():
        if name not in arrays:
            raise error(f"{shown} has no array '{name}'.", hint)
    return arrays


def _check_members(
    members: list[zipfile.ZipInfo], limit: int, shown: str, error: type[MpqError], hint: str
) -> None:
    if len(members) > MEMBERS:
        raise error(f"{shown} holds more than {MEMBERS:,} arrays.", hint)
    if len({member.filename for member in members}) < len(members):
        raise error(f"{shown} holds two arrays of one name.", hint)
    total = sum(member.file_size for member in members)
    if total > limit:
        what = f"{shown} unpacks to {total / 1e6:,.0f} MB, more than {limit / 1e6:,.0f} MB"
        raise error(f"{what} ({RATIO} times its size and {SLACK_BYTES >> 20} MB).", hint)


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, shown: str, error: type[MpqError], hint: str
) -> Array:
    try:
        with archive.open(member) as file:
            return _array(file, member.file_size, shown, error, hint)
    except MpqError:
        raise
    except _BAD_ZIP as problem:
        said = printable(str(problem)).rstrip(".")
        raise error(f"{shown} is damaged: {said}.", hint) from problem


def _array(file: Any, size: int, shown: str, error: type[MpqError], hint: str) -> Array:
    """Read one array of ``size`` bytes, header included, from a binary file."""
    try:
        shape, fortran, dtype = _header(file)
    except Exception as problem:
        # NumPy reads a header with Python's own tokenizer and parser, and passes on what these raise.
        text = printable(" ".join(str(problem).split())[:200])
        raise error(f"{shown} is not a NumPy array: {text}.", hint) from problem
    if dtype.hasobject:
        raise error(f"{shown} holds Python objects, which are never loaded.", hint)
    wanted = math.prod(shape) * dtype.itemsize
    if any(one < 0 for one in shape) or wanted != size - file.tell():
        what = f"{shown} has shape {shape} and type {dtype}, {wanted:,} bytes"
        raise error(f"{what}, but {size - file.tell():,} bytes of data.", hint)
    content = _read(file, wanted)
    if len(content) < wanted:
        raise error(f"{shown} is truncated: {len(content):,} of {wanted:,} bytes are there.", hint)
    flat: Array = np.frombuffer(content, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        length = file.read(2)
        return _known_header(length + file.read(int.from_bytes(length, "little")))
    if version != (2, 0):
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, fortran, dtype


@lru_cache(maxsize=256)
def _known_header(text: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    # Python's parser takes longer than most arrays do, and most headers are alike.
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(text))
    return shape, fortran, dtype


def _read(file: BinaryIO, size: int) -> bytearray:
    """Return ``size`` bytes, fewer at the end of the file; a writable buffer, filled in place."""
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        count = file.readinto(view[done : done + (1 << 24)])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    view.release()
    del content[done:]
    return content
