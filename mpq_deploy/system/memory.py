"""Memory: what is there, what new work may take, what this process holds, running out.

The least of three bounds counts: the machine's free memory, the limits of this process's control
groups (the kernel kills what exceeds one of them, whatever the machine has left), and its limit on
address space. psutil says what the machine has. Devices may lack it: there the kernel's own files
do. Nothing else outside the standard library is needed.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.system.control_groups import control_groups, kernel_text

# What a user knows better than the system: so much may be taken, whatever is found.
VARIABLE = "MPQ_DEPLOY_MEMORY"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
# The first version of control groups writes "no limit" as the largest number of whole pages.
UNLIMITED = 1 << 62
MACHINE, ADDRESS_SPACE, SAID = (
    "this machine",
    "the limit on address space (ulimit -v)",
    f"the variable {VARIABLE}",
)
# glibc's malloc.h: M_ARENA_MAX; M_MMAP_THRESHOLD, from which size on a block is a mapping of its own.
ARENAS, APART = (-8, 1), (-3, 1 << 20)
# How NumPy, ONNX Runtime, torch, CUDA's libraries and the system say that an allocation failed.
FAILED = (
    "bad_alloc",
    "bad allocation",
    "MemoryError",
    "allocate memory",
    "Unable to allocate",
    "out of memory",
    "is smaller than requested bytes",
    "smaller than requested bytes",
    "ALLOC_FAILED",
)


@dataclass(frozen=True)
class Machine:
    """Bytes of memory: all, and what is free or can be freed."""

    total: int
    available: int


@dataclass(frozen=True)
class Room:
    """Bytes that new work may take, and what sets that bound, in words before "has ... free"."""

    bytes: int
    whose: str

    def holds(self, size: int) -> bool:
        """Whether work of ``size`` bytes may start: the limit for stages, workers and recovery alike."""
        return size <= self.bytes

    def __str__(self) -> str:
        return f"{self.whose} has {self.bytes / 1e9:.1f} GB free"


@dataclass
class Reading:
    """What a ``metered`` block took; filled when the block ends."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0


class MemoryRanOutError(MpqError):
    """An allocation failed in the middle of the work."""


@dataclass(frozen=True)
class _Files:
    """Where a version of control groups keeps its numbers: limits, use, and what of the use can be dropped."""

    limits: tuple[str, ...]
    used: str
    reclaimable: str


# memory.high throttles, memory.max kills.
SECOND = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
FIRST = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def refuse_too_large(
    work: str, parts: Mapping[str, int], room: Room | None, hint: str, held: int = 0
) -> None:
    """Raise UsageError when ``work`` needs more than the ``room`` (None: not known).

    ``parts``: bytes by what they are for. ``held``: bytes of them that this process holds already.
    """
    total = sum(parts.values())
    if room is None or room.holds(total - held):
        return
    figures = ", ".join(f"{size / 1e9:.1f} for {what}" for what, size in parts.items())
    raise UsageError(
        f"{work} would need about {total / 1e9:.1f} GB of memory ({figures}), and {room}.", hint
    )


@contextmanager
def saying_memory_ran_out(where: str, hint: str) -> Iterator[None]:
    """Turn a failed allocation in the block into MemoryRanOutError; every other error passes as it is."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise MemoryRanOutError(f"Memory ran out in {where}: {said}", hint) from error


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in FAILED)


@contextmanager
def metered() -> Iterator[Reading]:
    """Measure the block: wall seconds, and the peak resident memory of this process during it.

    On Linux the kernel's high-water mark is reset first; elsewhere, or where that is forbidden, the
    peak is the process's own since its start. Child processes count with their largest peak so far,
    when that is larger.
    """
    reading = Reading()
    _reset_peak()
    children = children_peak_bytes()
    started = time.monotonic()
    try:
        yield reading
    finally:
        reading.seconds = time.monotonic() - started
        after = children_peak_bytes()
        reading.peak_rss_bytes = max(peak_rss_bytes(), after if after > children else 0)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, since its start or the begin of the last ``metered``."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", kernel_text(Path("/proc/self/status")), re.M)
    if found:
        return int(found.group(1)) * 1024
    psutil = _psutil()
    peak = getattr(psutil.Process().memory_info(), "peak_wset", 0) if psutil else 0  # Windows
    return peak or _largest("RUSAGE_SELF")


def children_peak_bytes() -> int:
    """Largest peak of the child processes that have ended; 0 where the system does not say."""
    return _largest("RUSAGE_CHILDREN")


def _largest(whose: str) -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(getattr(resource, whose)).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        # No such file (not Linux) or forbidden (containers): the peak is then that of the whole
        # process.
        return


def held_memory() -> int:
    """Return the bytes that this process holds already, mapped files aside; 0 where the system does not say."""
    psutil = _psutil()
    if psutil is None:
        return 0
    held = psutil.Process().memory_info()
    return int(held.rss) - int(getattr(held, "shared", 0))


def spare_address_space() -> None:
    """Where address space is limited, have the allocator of C (glibc's) give back what is freed.

    By default blocks of up to 32 MiB come from a heap that tensors of many sizes leave full of
    holes, and each thread reserves 64 MiB. Calls without such a limit are spared the system's work.
    """
    if any(_address_space()):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for setting in ARENAS, APART:
            if mallopt is not None:
                mallopt(*setting)


def memory_room(root: Path = Path("/")) -> Room | None:
    """Return the least of what bounds memory; None where the system says nothing.

    ``root``: where the file system with the files about control groups begins. Raises UsageError
    when the variable MPQ_DEPLOY_MEMORY is set and no amount.
    """
    said = os.environ.get(VARIABLE, "")
    if said:
        return Room(_amount(said), SAID)
    machine = machine_memory()
    rooms = [Room(machine.available, MACHINE)] if machine else []
    return min(
        [*rooms, *_address_space(), *_groups(root)], key=lambda room: room.bytes, default=None
    )


def machine_memory() -> Machine | None:
    """Return what the machine has; None where neither psutil nor the kernel says it."""
    psutil = _psutil()
    if psutil is not None:
        found = psutil.virtual_memory()
        return Machine(found.total, found.available)
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", kernel_text(Path("/proc/meminfo")), re.M))
    if "MemAvailable" not in sizes:
        return None
    return Machine(int(sizes["MemTotal"]) * 1024, int(sizes["MemAvailable"]) * 1024)


def _psutil() -> ModuleType | None:
    """Return psutil; None where it is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil


def _amount(text: str) -> int:
    amount = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?I?)B?", text.strip().upper())
    if amount is None or amount.group(2) not in UNITS:
        raise UsageError(
            f"Invalid amount of memory '{text}' in {VARIABLE}.", f"Write {VARIABLE}=12GB."
        )
    return int(float(amount.group(1)) * UNITS[amount.group(2)])


def _address_space() -> Iterator[Room]:
    """Yield what the process may still map, if limited. It maps more than it holds, so it can really use less."""
    psutil = _psutil()
    if psutil is None or not hasattr(psutil, "RLIMIT_AS"):
        return  # Linux alone limits it
    process = psutil.Process()
    limit, _ = process.rlimit(psutil.RLIMIT_AS)
    if limit != psutil.RLIM_INFINITY:
        yield Room(max(limit - process.memory_info().vms, 0), ADDRESS_SPACE)


def _groups(root: Path) -> Iterator[Room]:
    """Yield what every control group leaves."""
    for group in control_groups("memory", root):
        left = _left(group.folder, FIRST if group.first else SECOND)
        if left is not None:
            yield Room(left, f"the control group {group.name}")


def _left(folder: Path, files: _Files) -> int | None:
    """Return the least limit of a group less its use; pages of files that are dropped when needed are no use."""
    limits = [
        int(text) for name in files.limits if (text := kernel_text(folder / name).strip()).isdigit()
    ]
    used = kernel_text(folder / files.used).strip()
    if not limits or min(limits) >= UNLIMITED or not used.isdigit():
        return None
    dropped = re.search(rf"^{files.reclaimable} (\d+)$", kernel_text(folder / "memory.stat"), re.M)
    return max(min(limits) - int(used) + (int(dropped.group(1)) if dropped else 0), 0)
