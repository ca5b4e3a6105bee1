"""What workers hold in memory, said before they begin."""

from __future__ import annotations

from pathlib import Path

from mpq_deploy.shards.work import Job
from mpq_deploy.talk import Talk

# What a worker with a tiny model holds at most (benchmarks/workers.py), mostly torch's code, here its CPU build.
PROCESS_BYTES = 400_000_000


def say_memory(workers: int, job: Job, talk: Talk) -> None:
    """Say what ``workers`` on this machine are estimated to hold; warn where that is more than is available."""
    each = job.memory_bytes + PROCESS_BYTES
    many = f"{workers} workers" if workers > 1 else "1 worker"
    talk.line(f"  {job.name} on {many}, an estimated {each / 1e9:.1f} GB each")
    available = available_bytes()
    if available is not None and workers * each > available:
        talk.warn(
            f"{many} may need {workers * each / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available: "
            "give fewer --workers"
        )


def available_bytes() -> int | None:
    """Return the memory that this process and its children may still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    if free is None or not limit.isdigit():
        return free
    return min(free, max(int(limit) - used, 0))
