"""Fuzz for some minutes, or some cases of each kind: python -m tests.fuzz --minutes 10

--minutes N     stop after that time            --cases N    cases of each kind
--kind NAME     this kind alone (repeatable)    --seed N     the first seed (default 0)
--page FILE     write the figures as Markdown
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.pages import made
from tests.fuzz.cases import KINDS, Bases
from tests.fuzz.runner import MEMORY_BYTES, SECONDS, Outcome, run_seed

WORKERS = 2


def main() -> int:
    """Run the cases; print every problem, and a table; return 1 where there is a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--record", type=Path)
    chosen = parser.parse_args()
    end = time.monotonic() + 60 * (chosen.minutes or (10 if chosen.cases is None else 1e9))
    kinds = chosen.kind or list(KINDS)
    outcomes = recorded(chosen.record)
    done = {(one.kind, one.seed) for ones in outcomes.values() for one in ones}
    with tempfile.TemporaryDirectory(prefix="fuzz-bases-") as folder:
        bases = Bases.made(Path(folder) / "bases")
        number = 0
        with ThreadPoolExecutor(WORKERS) as pool:
            while time.monotonic() < end and number < (chosen.cases or 10**9):
                seeds = range(chosen.seed + number, chosen.seed + number + 2 * WORKERS)
                seeds = seeds[: (chosen.cases or 10**9) - number]
                jobs = [(kind, seed) for seed in seeds for kind in kinds]
                jobs = [job for job in jobs if job not in done]
                for outcome in pool.map(lambda job: run_seed(*job, bases), jobs):
                    outcomes[outcome.kind].append(outcome)
                    if chosen.record:
                        with chosen.record.open("a", encoding="utf-8") as file:
                            file.write(json.dumps({**asdict(outcome), "said": ""}) + "\n")
                    if outcome.problem:
                        _tell(outcome)
                number += len(seeds)
    text = table(outcomes)
    sys.stdout.write(f"{text}\n")
    if chosen.page:
        memory = MEMORY_BYTES / 1e9
        page = PAGE.format(table=text, seconds=SECONDS, memory=memory, cases=number)
        chosen.page.write_text(made(page), encoding="utf-8")
    return int(any(one.problem for ones in outcomes.values() for one in ones))


def recorded(path: Path | None) -> dict[str, list[Outcome]]:
    """Return the outcomes that stand in a record; none without one."""
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            outcome = Outcome(**{**values, "arguments": tuple(values["arguments"])})
            outcomes[outcome.kind].append(outcome)
    return outcomes


def _tell(outcome: Outcome) -> None:
    sys.stdout.write(
        f"{outcome.kind} {outcome.seed}: {outcome.problem}\n  {' '.join(outcome.arguments)}\n"
        f"  {outcome.said[-700:]}\n"
    )
    sys.stdout.flush()


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Return the figures by kind as Markdown."""
    lines = [
        "| kind | cases | exit 0 | exit 2 | exit 1 | problems | slowest, s | largest, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, ones in outcomes.items():
        codes = Counter(one.code for one in ones if not one.problem)
        problems = sum(bool(one.problem) for one in ones)
        slowest = max(one.seconds for one in ones)
        largest = max(one.peak_bytes for one in ones) / 1e6
        lines.append(
            f"| {kind} | {len(ones):,} | {codes[0]:,} | {codes[2]:,} | {codes[1]:,} | {problems} "
            f"| {slowest:.1f} | {largest:,.0f} |"
        )
    return "\n".join(lines)


PAGE = """# Fuzzing

Mutations of real files, each read by a command in a process of its own, with at most {seconds:.0f} s and
{memory:.0f} GB. Exit 0: accepted; 2: refused as input; 1: failed, or findings of `check` and `gate`. A problem is a
traceback or exit code 70, a message of more than two lines, a control character on the terminal, a file or code outside
of the case's folder, a case over the limits, or a graph that `check` accepts and onnx.checker (strict shape inference
included) refuses. Made by

    python -m tests.fuzz --cases {cases} --page docs/results/fuzz.md

{table}

Kinds: `onnx` models for `check` and the export; `yaml` recipes, targets and descriptions; `json` a device's
results, reports and the configurations of a diffusers folder; `arrays` conditions; `safetensors` the weights of a
folder; `archive` packages, with digests that fit and without; `run` run folders, whose records a forger has made to
fit in six of ten cases. Largest is the process's resident memory, of which its libraries take some 250 MB.

A case that failed was run again after its fault was mended.
`make fuzz MINUTES=10` draws new cases (`SEED=` another beginning); `make test` runs a few of each kind and the files in
`tests/fuzz/corpus`, which earlier versions failed on.
"""


if __name__ == "__main__":
    sys.exit(main())
