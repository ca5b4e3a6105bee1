"""How many threads compute, chosen in one place, since last digits may depend on it.

Sums that are split over other numbers of threads round otherwise. A worker process gets the numbers
of the process that started it, through its environment: so both compute the same bits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import psutil

from mpq_deploy.system.control_groups import control_groups, kernel_text

# Set for worker processes: threads of ONNX Runtime, which waits for them sleeping where the
# variable is set.
RUNTIME_THREADS = "MPQ_DEPLOY_THREADS"
TORCH_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS")
# Several processes share the cores, so threads that wait should sleep: how they wait changes no
# result.
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Threads:
    """Threads of ONNX Runtime, of torch, and of NumPy's BLAS."""

    runtime: int
    torch: int
    blas: int

    @classmethod
    def equal(cls, count: int) -> Threads:
        """Return ``count`` threads of each."""
        return cls(count, count, count)

    def environment(self) -> dict[str, str]:
        """Return what a worker process must find in its environment to compute with these threads."""
        return {
            RUNTIME_THREADS: str(self.runtime),
            **dict.fromkeys(TORCH_THREADS, str(self.torch)),
            **dict.fromkeys(BLAS_THREADS, str(self.blas)),
            **SLEEPING,
        }


def threads_here() -> Threads:
    """Return the threads that this process computes with."""
    torch, cores = sys.modules.get("torch"), physical_cores()
    given = _number(os.environ, TORCH_THREADS[0])
    return Threads(
        runtime_threads(),
        int(torch.get_num_threads()) if torch is not None else given or cores,
        _number(os.environ, BLAS_THREADS[0]) or given or available_cores(),
    )


def runtime_threads() -> int:
    """Return the threads of an ONNX Runtime session: one per physical core, which is also that library's choice."""
    return _number(os.environ, RUNTIME_THREADS) or physical_cores()


def may_spin() -> bool:
    """Whether threads of ONNX Runtime may wait by spinning: fast for one process, wasteful for several."""
    return RUNTIME_THREADS not in os.environ


def available_cores() -> int:
    """Return the cores that this process may use."""
    return min(_allowed_cores(), quota_cores() or sys.maxsize)


def physical_cores() -> int:
    """Return the physical cores among those that this process may use; all it may use where the system hides them."""
    return min(_allowed_physical_cores(), quota_cores() or sys.maxsize)


def quota_cores(root: Path = Path("/")) -> int:
    """Return the processor time that control groups allow (``docker run --cpus``), in whole cores; 0: no limit.

    A process of more threads spends its share before its period ends, and then all of them stand still.
    """
    return min((max(1, ceil(quota)) for quota in _quotas(root)), default=0)


def keep_to_quota() -> None:
    """Let libraries that are imported later take as many threads as control groups allow, not one per core.

    What the user has set stays.
    """
    quota = quota_cores()
    if 0 < quota < _allowed_cores():
        for name in (*TORCH_THREADS, *BLAS_THREADS):
            os.environ.setdefault(name, str(quota))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each group allows."""
    for group in control_groups("cpu", root):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if group.first else ("cpu.max",)
        words = [word for name in names for word in kernel_text(group.folder / name).split()]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
            yield int(words[0]) / int(words[1])


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allowed_physical_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or _allowed_cores()
    try:
        return len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})
    except OSError:
        # A container may hide it.
        return _allowed_cores()


@cache
def _core_of(cpu: int) -> tuple[str, ...]:
    """Return package and number of the core that a logical CPU belongs to."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    names = ("physical_package_id", "core_id")
    return tuple((topology / name).read_text(encoding="utf-8").strip() for name in names)


def _number(environment: Mapping[str, str], name: str) -> int:
    """Return the positive number in an environment variable; 0 where there is none."""
    # OMP_NUM_THREADS may be a list, by level of nesting.
    text = environment.get(name, "").split(",")[0].strip()
    return int(text) if text.isdigit() else 0
