"""Files that others read: whole or not at all, canonical JSON, digests, disk errors.

Standard library only: devices use it, too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpq_deploy.errors import DiskError, InputError, MpqError, UsageError
from mpq_deploy.system.inputs import parse_json, read_text
from mpq_deploy.system.names import printable

# The entry of a sealed JSON file with the digest of all others.
SEAL = "sha256"

Fields = dict[str, Any]


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def sealed_json(values: Fields) -> str:
    """Return JSON of ``values`` with their digest beside them (``SEAL``), for ``unsealed``."""
    return canonical_json({**values, SEAL: _values_digest(values)})


def unsealed(text: str) -> Fields:
    """Return the values that ``sealed_json`` wrote. Raises ValueError where they are not those."""
    try:
        values = parse_json(text, "it")
    except InputError as error:
        raise ValueError(error.message) from error
    if not isinstance(values, dict) or SEAL not in values:
        raise ValueError(f"it holds no {SEAL}")
    if values.pop(SEAL) != _values_digest(values):
        raise ValueError(f"its {SEAL} is not that of its values: it was altered")
    return values


def read_sealed(path: Path) -> Fields:
    """Return the values of a file that ``sealed_json`` wrote. Raises InputError for any other."""
    text = read_text(path)
    try:
        return unsealed(text)
    except ValueError as problem:
        what = f"{printable(str(path))} cannot be used: {printable(str(problem))}."
        raise InputError(what, "Create it again.") from problem


def _values_digest(values: Fields) -> str:
    # As they will be read: tuples become lists.
    return hashlib.sha256(canonical_json(json.loads(canonical_json(values))).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: Any) -> str:
    found = hashlib.sha256()
    while piece := file.read(1 << 20):
        found.update(piece)
    return found.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file and move it into place, so that no reader ever sees half of it.

    A link at ``path`` is replaced, not followed. Raises OSError naming a folder at ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    # What a killed process left, or a link that somebody put there.
    aside.unlink(missing_ok=True)
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        # The system does not say which file could not grow.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` at the end, and is removed on failure.

    Raises UsageError where ``path`` holds anything, or the folder around it is missing.
    """
    path = path.absolute()
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty.", "Give a new folder.")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} is not a folder.", "Give a new folder.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {path.parent}.", "Create it first.")
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        if path.is_dir():
            path.rmdir()
        aside.replace(path)
    except OSError as error:
        raise disk_error(error, path.parent) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_links(folder: Path, error: type[MpqError] = InputError) -> None:
    """Raise ``error`` where ``folder`` holds a link, a named pipe or a device, however deep.

    For folders that came from elsewhere and are written into: what is written through a link
    replaces files outside, and a pipe never ends.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise error(
                    f"{printable(str(path))} is {kind}; nothing is written into a folder that holds one.",
                    "Copy the folder without it: cp -rL copies what links point to.",
                )


# The file in a run folder that who writes into it holds.
LOCK = ".lock"
# How the system says that a file cannot grow, and that none can be made.
FULL, FORBIDDEN = (
    (errno.ENOSPC, errno.EDQUOT),
    (
        *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
        # A file lies where a folder would.
        *(errno.EEXIST, errno.ENOTDIR),
    ),
)


def disk_error(error: OSError, path: Path | None) -> MpqError:
    """Turn an operating system's error into a message for the user.

    ``path``: where was written, if the error itself does not name it; None: nobody knows.
    """
    place = Path(os.fsdecode(error.filename)) if error.filename else path
    named = printable(str(place)[:300]) if place is not None else "a file"
    if error.errno in FULL:
        if place is None:
            what = "A disk is full."
        else:
            there = next((one for one in (place, *place.absolute().parents) if one.is_dir()), None)
            free = shutil.disk_usage(there).free if there is not None else 0
            what = f"The disk is full: {free / 1e6:.0f} MB are left under {printable(str(there))}."
        return DiskError(
            what, "Free some space, or give another run folder with -o; finished work is kept."
        )
    if error.errno in FORBIDDEN and place is not None and place.name == LOCK:
        return DiskError(
            f"The run folder {printable(str(place.parent)[:300])} cannot be written: {error.strerror}.",
            "This command writes into it: copy it (cp -r) and name the copy; a build takes another folder with -o.",
        )
    if error.errno in FORBIDDEN:
        return DiskError(
            f"{named} cannot be written: {error.strerror}.",
            "Write elsewhere with -o, or copy a run folder that is read-only (cp -r).",
        )
    return MpqError(f"{printable(error.strerror or str(error))}: {named}")
