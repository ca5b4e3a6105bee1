"""What workers cost and save: the stage measure in this process and over N workers, and whether the bytes are the same.

    python benchmarks/workers.py digits --workers 1,2

Prints wall seconds, processor seconds of this process and of the workers, and the largest worker's peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import tempfile
import time
from pathlib import Path

from mpq_deploy.pipeline import open_pipeline
from mpq_deploy.recipe import load_recipe
from mpq_deploy.shards.processes import Processes
from mpq_deploy.shards.work import Crew
from mpq_deploy.talk import Talk


def measured(model: str, run: Path, crew: Crew | None) -> tuple[float, float, float, str]:
    """Make the stage measure anew; return wall, own and workers' seconds, and the digest of its files."""
    shutil.rmtree(run / "measure", ignore_errors=True)
    with open_pipeline(load_recipe(None, {"model": model, "engine.build": False}), run, Talk(), crew) as pipeline:
        pipeline.run_until("candidates")
        before, started = [processor(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)], time.monotonic()
        pipeline.run_until("measure")
        wall = time.monotonic() - started
    own, theirs = (
        processor(who) - was for who, was in zip((resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN), before, strict=True)
    )
    digest = hashlib.sha256(b"".join((run / "measure" / n).read_bytes() for n in ("table.json", "projections.npz")))
    return wall, own, theirs, digest.hexdigest()[:12]


def processor(who: int) -> float:
    """Return the processor seconds so far of this process, or of its children that have ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, comma-separated")
    parser.add_argument("--run", type=Path, help="a run folder to use and keep (default: a temporary one)")
    chosen = parser.parse_args()
    counts = [int(text) for text in chosen.workers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        run = chosen.run or Path(folder) / "run"
        print("| measure of", chosen.model, "| wall s | own s | workers' s | largest worker MB | digest |")
        print("|---|---:|---:|---:|---:|---|")
        for count in (0, *counts):
            wall, own, theirs, digest = measured(chosen.model, run, Processes(count) if count else None)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000 if count else 0
            name = f"{count} worker{'s' if count > 1 else ''}" if count else "this process"
            print(f"| {name} | {wall:.1f} | {own:.1f} | {theirs:.1f} | {peak:.0f} | {digest} |", flush=True)


if __name__ == "__main__":
    main()
