"""The files of a job: a folder that holds them all, and their paths relative to it."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
