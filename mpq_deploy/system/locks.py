"""Locks between processes of a machine, released when the process that holds them ends, however it ends."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mpq_deploy.errors import UsageError
from mpq_deploy.system.files import LOCK as LOCK

# In a folder that is held, beside what is locked: the process id of the holder. Two files, since
# Windows lets nobody read a locked one.
OWNER = ".owner"


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
    """Return this user's own folder below that of temporary files.

    Raises UsageError where it is a link, another user's, or open to others: whoever may write there
    could hand over files in our name.
    """
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    folder = Path(tempfile.gettempdir()) / f"mpq-deploy{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)
    return folder


def check_private(folder: Path) -> None:
    """Raise UsageError unless ``folder`` is a folder of this user that no other may write into."""
    status = folder.lstat()
    reason = ""
    if not stat.S_ISDIR(status.st_mode):
        reason = "is a link or a file"
    elif hasattr(os, "getuid") and status.st_uid != os.getuid():
        reason = f"belongs to another user (uid {status.st_uid})"
    elif hasattr(os, "getuid") and status.st_mode & 0o022:
        reason = f"may be written by others (mode {status.st_mode & 0o777:o})"
    if reason:
        raise UsageError(
            f"{folder} {reason}, so files in it cannot be trusted.",
            "Remove it, or set TMPDIR to a folder of your own.",
        )


@contextmanager
def scratch_folder(name: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder in ``parent`` (None: this user's own), removed at the end.

    Those that a killed process has left there are removed first: a lock beside each tells whether
    its process lives.
    """
    place = user_folder() if parent is None else parent
    for left in place.glob(f"{name}-*.lock"):
        with suppress(Timeout, OSError), FileLock(left, timeout=0):
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        with lock:
            yield folder
    finally:
        # Windows removes no file that ONNX Runtime has mapped: the next start does.
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
