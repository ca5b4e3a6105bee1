"""From options to workers."""

from __future__ import annotations

from mpq_deploy.system.parallel.work import Crew


def crew_for(workers: int | None, ray: str | None, threads: int | None) -> Crew | None:
    """Return who computes what can be spread: processes, a Ray cluster, or None.

    ``workers`` processes (or workers on the cluster at the address ``ray``) of ``threads`` each.
    Raises UsageError for less than one.
    """
    if ray is not None:
        from mpq_deploy.system.parallel.cluster import Cluster

        return Cluster(ray, workers, threads)
    if threads is None and workers in (None, 1):
        return None
    from mpq_deploy.system.parallel.processes import Processes

    return Processes(1 if workers is None else workers, threads)
