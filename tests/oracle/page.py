"""What the pages of the oracle begin with: the command that made them, and the versions."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def made_by(
    module: str, packages: Sequence[str], only: Sequence[str], path: Path | None
) -> tuple[str, str]:
    """Return the command that makes a page by ``python -m module``, and the versions of ``packages``."""
    listed = ", ".join(f"{name} {version(name)}" for name in packages)
    words = [*(word for name in only for word in ("--only", name))]
    words += ["--page", path.as_posix()] if path else []
    command = shlex.join(["python", "-m", module, *words])
    return command, f"Python {platform.python_version()}, {listed}; {os.cpu_count()} cores"
