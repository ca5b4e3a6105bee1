"""Seconds and peak memory of a piece of work."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Reading:
    """What a ``metered`` block took; filled when the block ends."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0


@contextmanager
def metered() -> Iterator[Reading]:
    """Measure the block: wall seconds, and the peak resident memory of this process during it.

    On Linux the kernel's high-water mark is reset first; elsewhere, or where that is forbidden, the peak is the
    process's own since its start. Child processes count with their largest peak so far, when that is larger.
    """
    reading = Reading()
    _resetpeak_rss_bytes()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    started = time.monotonic()
    try:
        yield reading
    finally:
        reading.seconds = time.monotonic() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        reading.peak_rss_bytes = max(peak_rss_bytes(), after * 1024 if after > children else 0)


def _resetpeak_rss_bytes() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        # No such file (not Linux) or forbidden (containers): the peak is then that of the whole process.
        return


def peak_rss_bytes() -> int:
    """The peak resident memory of this process so far."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
