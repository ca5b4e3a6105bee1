"""The control groups of Linux that bound this process: where each keeps its files.

Containers and batch systems limit memory and processor time by them. Sources: cgroup-v2.rst and
cgroup-v1 in the kernel's Documentation/admin-guide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ControlGroup:
    """A group: its ``folder``, its ``name`` for messages, and whether it is of the ``first`` version."""

    folder: Path
    name: str
    first: bool


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[ControlGroup]:
    """Yield the groups of ``controller``, from the process's own up to the top of what is mounted.

    ``root``: where the file system with the files about control groups begins.
    """
    paths = _own_groups(root)
    for line in kernel_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(), "", "", ""][:3]
        first = kind == "cgroup" and controller in options.split(",")
        if not first and kind != "cgroup2":
            continue
        top, place = (_unescaped(field) for field in before.split()[3:5])
        own = paths.get(controller if first else "")
        if own is None:
            continue
        mounted = root / place.lstrip("/")
        for folder in _upwards(mounted, _below(own, top)):
            name = "/" + folder.relative_to(mounted).as_posix().lstrip(".")
            yield ControlGroup(folder, name, first)


def kernel_text(path: Path) -> str:
    """Return what a file of the kernel says; "" where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _own_groups(root: Path) -> dict[str, str]:
    """Return the process's groups by controller ("" for the second version)."""
    found = {}
    for line in kernel_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _below(group: str, top: str) -> str:
    """Return where ``group`` lies below the group ``top``, which is what is mounted; "" where it lies elsewhere."""
    relative = os.path.relpath(group, top)
    return "" if relative.startswith("..") or relative == "." else relative


def _upwards(mounted: Path, below: str) -> Iterator[Path]:
    folder = mounted / below
    yield folder
    while folder != mounted:
        folder = folder.parent
        yield folder


def _unescaped(field: str) -> str:
    """Return a path as it is: the kernel writes blanks and backslashes of it as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)
