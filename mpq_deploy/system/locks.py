"""Locks between processes of a machine. They end with the process that holds them, however it ends."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# In a folder that is held: what is locked, and the process id of the holder. Two files, since
# Windows lets nobody read a locked one.
LOCK, OWNER = ".lock", ".owner"


class HeldError(Exception):
    """Another process holds a folder; the text is its process id, or "unknown"."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for the block. Raises HeldError where another process does, OSError where it is not writable."""
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        said = owner.read_text(encoding="utf-8").strip() if owner.is_file() else ""
        raise HeldError(said or "unknown") from None
    try:
        owner.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time work on ``path``, which may be read-only.

    Raises OSError where the folder for temporary files is not.
    """
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    with FileLock(user_folder() / f"{name}.lock"):
        yield


def user_folder() -> Path:
    """Return this user's own folder below that of temporary files."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    folder = Path(tempfile.gettempdir()) / f"mpq-deploy{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
