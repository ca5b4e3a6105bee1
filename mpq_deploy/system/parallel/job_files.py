"""The files of a job: a folder that holds them all, and their paths relative to it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """``root`` holds every file; ``names`` are their paths relative to it."""

    root: Path
    names: tuple[str, ...]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Files:
        """Return the files with the smallest folder that holds them all."""
        found = [path.resolve() for path in paths]
        root = Path(os.path.commonpath([path.parent for path in found]))
        return cls(root, tuple(dict.fromkeys(path.relative_to(root).as_posix() for path in found)))

    def below(self, path: Path) -> Path:
        """Return ``path`` relative to the root."""
        return path.resolve().relative_to(self.root)


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time do something with the file ``path``."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
