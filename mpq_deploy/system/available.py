"""How much memory new work may take: of the machine, of the control groups of this process, of its own limits.

Out: a ``Room``, the least of what all of them leave. In a container the machine's free memory says little: the kernel
kills what exceeds the limit of the process's control group, or of any group above it. Standard library only, since
devices ask too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpq_deploy.errors import UsageError

# What a user knows better than the system: so much may be taken, whatever is found.
VARIABLE = "MPQ_DEPLOY_MEMORY"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
# The first version of control groups writes "no limit" as the largest number of whole pages.
UNLIMITED = 1 << 62
MACHINE, ADDRESS_SPACE, SAID = "this machine", "the limit on address space (ulimit -v)", f"the variable {VARIABLE}"


@dataclass(frozen=True)
class Room:
    """Bytes that new work may take, and what sets that bound, in words before "has ... free"."""

    bytes: int
    whose: str

    def __str__(self) -> str:
        return f"{self.whose} has {self.bytes / 1e9:.1f} GB free"


@dataclass(frozen=True)
class _Files:
    """Where a version of control groups keeps its numbers: limits, use, and what of the use can be dropped."""

    limits: tuple[str, ...]
    used: str
    reclaimable: str


# Documentation/admin-guide of Linux: cgroup-v2.rst (memory.high throttles, memory.max kills) and cgroup-v1/memory.rst.
SECOND = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
FIRST = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def memory_room(root: Path = Path("/")) -> Room | None:
    """Return the least of what bounds memory; None where the system says nothing. ``root``: of the file system read.

    Raises UsageError when the variable MPQ_DEPLOY_MEMORY is set and no amount.
    """
    said = os.environ.get(VARIABLE, "")
    if said:
        return Room(_amount(said), SAID)
    found = [room for room in (_machine(root), _address_space(root)) if room is not None]
    return min([*found, *_groups(root)], key=lambda room: room.bytes, default=None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of ``memory_room``; None where the system says nothing."""
    room = memory_room(root)
    return None if room is None else room.bytes


def held_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process holds already, mapped files aside; 0 where the system does not say."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", _text(root / "proc/self/status"), re.M)
    return int(found.group(1)) * 1024 if found else 0


def _amount(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?I?)B?", text.strip().upper())
    if found is None or found.group(2) not in UNITS:
        raise UsageError(f"{VARIABLE} is '{text}', which is no amount of memory.", f"Write {VARIABLE}=12GB.")
    return int(float(found.group(1)) * UNITS[found.group(2)])


def _machine(root: Path) -> Room | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.M)
    return Room(int(found.group(1)) * 1024, MACHINE) if found else None


def _address_space(root: Path) -> Room | None:
    """Return what the process may still map. It maps more than it holds, so this is more than it can really use."""
    try:
        import resource
    except ModuleNotFoundError:
        return None  # Windows has neither the module nor the limit
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text(root / "proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return Room(max(limit - int(pages[0]) * resource.getpagesize(), 0), ADDRESS_SPACE)


def _groups(root: Path) -> Iterator[Room]:
    """Yield what every control group leaves, from the process's own up to the top of what is mounted."""
    paths = _own_groups(root)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(), "", "", ""][:3]
        first = kind == "cgroup" and "memory" in options.split(",")
        if not first and kind != "cgroup2":
            continue
        top, place = (_unescaped(field) for field in before.split()[3:5])
        own = paths.get("memory" if first else "")
        if own is None:
            continue
        mounted = root / place.lstrip("/")
        for folder in _upwards(mounted, _below(own, top)):
            room = _left(folder, FIRST if first else SECOND)
            if room is not None:
                name = "/" + folder.relative_to(mounted).as_posix().lstrip(".")
                yield Room(room, f"the control group {name}")


def _own_groups(root: Path) -> dict[str, str]:
    """Return the process's groups by controller ("" for the second version)."""
    found = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
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


def _left(folder: Path, files: _Files) -> int | None:
    """Return the least limit of a group less its use; pages of files that are dropped when needed are no use."""
    limits = [int(text) for name in files.limits if (text := _text(folder / name).strip()).isdigit()]
    used = _text(folder / files.used).strip()
    if not limits or min(limits) >= UNLIMITED or not used.isdigit():
        return None
    dropped = re.search(rf"^{files.reclaimable} (\d+)$", _text(folder / "memory.stat"), re.M)
    return max(min(limits) - int(used) + (int(dropped.group(1)) if dropped else 0), 0)


def _unescaped(field: str) -> str:
    """Return a path as it is: the kernel writes blanks and backslashes of it as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)


def _text(path: Path) -> str:
    """Return what a file of the kernel says; "" where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
