"""What workers cost and save: stages in this process and over N workers, and whether the bytes are the same.

    python benchmarks/workers.py digits --workers 1,2 --threads 1

MODEL is what `mpq-deploy build` takes. Each stage of --stages is made by this process and by N workers, at the threads
that one process takes and at those of --threads. Wall seconds, and processor seconds of this process and of the
workers; "times" is how many times as fast as one worker of the same threads. The exit code is 1 when the bytes of a
stage depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.recipe import Recipe
from mpq_deploy.run.pipeline import STAGES, open_pipeline
from mpq_deploy.system.parallel.processes import Processes
from mpq_deploy.system.parallel.work import Crew
from mpq_deploy.system.progress import Talk

STAGES_TIMED = "calibrate,measure,evaluate"
# Not in the default recipe, and the engine, which is not looked at.
LEFT_OUT = ("recover", "correction", "engine")
# What finished shards leave beside the stages.
KEPT = (".samples", ".shards")
# What the clock said is not the same for equal inputs.
CLOCKS = ("latency.json",)


@dataclass(frozen=True)
class Cost:
    """Seconds, and the digest of what a stage made."""

    wall: float
    own: float
    theirs: float
    digest: str


def measured(recipe: Recipe, run: Path, stage: str, crew: Crew | None) -> Cost:
    """Make ``stage`` anew in the folder ``run``."""
    for name in (stage, *KEPT):
        shutil.rmtree(run / name, ignore_errors=True)
    with open_pipeline(recipe, run, Talk(), crew) as pipeline:
        for before in list(STAGES)[: list(STAGES).index(stage)]:
            if before not in LEFT_OUT:
                pipeline.ensure(before)
        marks, started = [processor(who) for who in WHO], time.monotonic()
        pipeline.ensure(stage)
        wall = time.monotonic() - started
    own, theirs = (processor(who) - mark for who, mark in zip(WHO, marks, strict=True))
    outputs = json.loads((run / stage / "stage.json").read_text(encoding="utf-8"))["outputs"]
    kept = json.dumps(
        {name: digest for name, digest in sorted(outputs.items()) if name not in CLOCKS}
    )
    return Cost(wall, own, theirs, hashlib.sha256(kept.encode()).hexdigest()[:12])


WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def processor(who: int) -> float:
    """Return the processor seconds so far of this process, or of its children that have ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def rows_of(costs: dict[tuple[int, int | None], Cost]) -> list[list[str]]:
    """Return one row per (workers, threads); 0 workers is this process."""
    rows = []
    for (workers, threads), cost in costs.items():
        name = f"{workers} worker{'s' if workers > 1 else ''}" if workers else "this process"
        alone = costs.get((1, threads))
        times = f"{alone.wall / cost.wall:.2f}" if workers and alone else ""
        seconds = [f"{value:.1f}" for value in (cost.wall, cost.own, cost.theirs)]
        rows.append([name, str(threads or "default"), *seconds, times, cost.digest])
    return rows


def main() -> None:
    """Print the tables."""
    parser = bench_parser(__doc__)
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument(
        "--stages", default=STAGES_TIMED, help=f"comma-separated (default: {STAGES_TIMED})"
    )
    parser.add_argument("--workers", default="1,2", help="numbers of workers, comma-separated")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of a worker, beside the default ones"
    )
    parser.add_argument(
        "--run", type=Path, help="a run folder to use and keep (default: a temporary one)"
    )
    chosen = parser.parse_args()
    counts = [int(text) for text in chosen.workers.split(",")]
    recipe = bench_recipe(None, chosen.set, {"model": chosen.model, "engine.build": False})
    page, checks = Page(f"Workers: {Path(chosen.model).name}"), []
    with tempfile.TemporaryDirectory() as folder:
        run = chosen.run or Path(folder) / "run"
        for stage in chosen.stages.split(","):
            costs = {(0, None): measured(recipe, run, stage, None)}
            for threads in (None, chosen.threads):
                for count in counts:
                    costs[count, threads] = measured(recipe, run, stage, Processes(count, threads))
            header = ("", "threads", "wall s", "own CPU s", "workers' CPU s", "times", "digest")
            page.say(f"## {stage}\n\n{markdown(header, rows_of(costs))}")
            for threads in (None, chosen.threads):
                found = {cost.digest for (_, of), cost in costs.items() if of == threads}
                said = f"{stage}: the same bytes for every number of workers at {threads or 'the default'} threads"
                checks.append(
                    (len(found) == 1, verdict(len(found) == 1, said, ", ".join(sorted(found))))
                )
    page.say(f"{os.cpu_count()} cores. Settings: {', '.join(chosen.set) or 'the default recipe'}.")
    page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
