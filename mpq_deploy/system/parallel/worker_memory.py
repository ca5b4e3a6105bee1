"""What workers hold in memory, said before they begin, and refused where there is less."""

from __future__ import annotations

from mpq_deploy.errors import UsageError
from mpq_deploy.system.available import Room, memory_room
from mpq_deploy.system.parallel.work import Job
from mpq_deploy.system.progress import Talk

# What a worker with a tiny model holds at most (benchmarks/workers.py), mostly torch's code, here its CPU build.
PROCESS_BYTES = 400_000_000


def check_workers(workers: int, job: Job, talk: Talk) -> None:
    """Say what ``workers`` on this machine are estimated to hold; raises UsageError where there is less."""
    each = job.memory_bytes + PROCESS_BYTES
    talk.line(f"  {job.name} on {_many(workers)}, an estimated {each / 1e9:.1f} GB each")
    room = memory_room()
    if room is not None and workers * each > room.bytes:
        raise UsageError(
            f"{_many(workers)} would need about {workers * each / 1e9:.1f} GB of memory for {job.name} "
            f"({each / 1e9:.1f} GB each), and {room}.",
            _hint(room.bytes // each, room),
        )


def _many(workers: int) -> str:
    return f"{workers} workers" if workers > 1 else "1 worker"


def _hint(fitting: int, room: Room) -> str:
    if fitting > 1:
        first = f"Give --workers {fitting}, which fit"
    else:
        first = "Leave --workers and --threads out: one process holds less" if fitting else "Not one of them fits"
    return f"{first}; or set MPQ_DEPLOY_MEMORY to what may be taken if you know better."
