"""Builds that are killed at random moments: does every restart end with the bytes of a build that nobody disturbed?

    python benchmarks/kills.py [MODEL] [--kills 50] [--seed 0] [--set KEY=VALUE]

One build runs to its end. Then builds of the same recipe, each in a new folder, are killed with SIGKILL (the whole
process group, so that no child does its parent's work), started again on the same folder, and so on until all kills
are spent; the last ones run to their end. The moment is drawn anew each time: within the start of Python, or up to a
time that lets the longest stage end now and then. No file of the run may then be linked from elsewhere, as sessions
over its external weights (in calibrate, candidates and evaluate) once left them. Every finished folder must hold the
same bytes in every stage. Engines are compared by the list of their kernels and by their record without digest and
size of the engine's file: two builds of one graph by TensorRT differ there in a few bytes. After each kill no process
of the build may be left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.engine.builder import LAYERS, RECORD
from mpq_deploy.run.folder import RunFolder
from mpq_deploy.run.pipeline import STAGES
from mpq_deploy.system.files import file_digest

QUICK: dict[str, Any] = {
    "calibrate.samples": 16,
    "calibrate.observed": 8,
    "calibrate.timesteps": 4,
    "measure.samples": 8,
    "measure.calls": 4,
    "measure.timesteps": 4,
    "measure.probes": 2,
    "recover.steps": 24,
    "recover.check_every": 8,
    "recover.round_steps": 12,
    "recover.trajectories": 8,
    "recover.held_out": 4,
    "evaluate.samples": 8,
}
# Made again each time: the report. Its sources are compared.
COMPARED = tuple(name for name in STAGES if name not in ("engine", "report"))
# What the record of an engine says of the engine's own file, of which no two builds by TensorRT are alike.
OWN_FILE = ("sha256", "bytes")
SHORTEST_START = 0.5  # seconds


class Builds:
    """Child builds of one recipe."""

    def __init__(self, recipe: Path) -> None:
        self._recipe = recipe

    def start(self, run: Path) -> subprocess.Popen[bytes]:
        """Start or go on with a build in ``run``, leading a process group of its own."""
        code = "from mpq_deploy.cli import main; main()"
        command = [
            sys.executable,
            "-c",
            code,
            "--quiet",
            "build",
            "-r",
            str(self._recipe),
            "-o",
            str(run),
        ]
        return subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def finish(self, run: Path) -> float:
        """Build to the end; return the seconds."""
        started = time.monotonic()
        child = self.start(run)
        _, said = child.communicate()
        if child.returncode:
            sys.exit(f"a build failed ({child.returncode}): {said.decode()[-500:]}")
        return time.monotonic() - started

    def kill_after(self, run: Path, seconds: float) -> bool:
        """Build and kill after ``seconds``; return whether it was still at work."""
        child = self.start(run)
        try:
            _, said = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if left := processes_of(child.pid):
                sys.exit(f"processes {left} are left after a kill")
            return True
        if child.returncode:
            sys.exit(f"a restart failed ({child.returncode}): {said.decode()[-500:]}")
        return False


def processes_of(group: int) -> list[int]:
    """Return the processes of a group that are not zombies."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, member = (
                    (folder / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[:3]
                )
            except OSError:
                continue
            if int(member) == group and state != "Z":
                found.append(int(folder.name))
    return found


def linked_files(run: Path) -> list[Path]:
    """Return the run's files that are linked from elsewhere: sessions must map weights where they lie."""
    return [path for path in run.rglob("*") if path.is_file() and path.stat().st_nlink > 1]


def contents(run: Path) -> dict[str, str]:
    """Return the digest of every compared file of a run, and what is compared of its engine."""
    files = [
        path for name in COMPARED for path in sorted((run / name).rglob("*")) if path.is_file()
    ]
    found = {path.relative_to(run).as_posix(): file_digest(path) for path in files}
    record = run / "engine" / RECORD
    if record.is_file():
        found[f"engine/{LAYERS}"] = file_digest(run / "engine" / LAYERS)
        values = json.loads(record.read_text(encoding="utf-8"))
        found[f"engine/{RECORD}"] = json.dumps(
            {k: v for k, v in values.items() if k not in OWN_FILE}, sort_keys=True
        )
    return found


def next_stage(run: Path) -> str:
    """Return the first stage that is not in its place."""
    return next(
        (name for name in STAGES if name != "correction" and not (run / name).is_dir()), "report"
    )


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("model", nargs="?", default="digits", help="what `mpq-deploy build` takes")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    page = Page("Killed at random")
    rng = np.random.default_rng(chosen.seed)
    killed: Counter[str] = Counter()
    same, finished = True, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = bench_recipe(None, chosen.set, {**QUICK, "model": chosen.model})
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8"
        )
        builds = Builds(folder / "recipe.yaml")
        whole = builds.finish(folder / "reference")
        expected = contents(folder / "reference")
        timings = RunFolder(folder / "reference").timings()
        longest = max(float(timing["seconds"]) for timing in timings.values())
        start = max(SHORTEST_START, builds.finish(folder / "reference") / 2)
        while killed.total() < chosen.kills:
            run = folder / f"run{finished}"
            while killed.total() < chosen.kills:
                seconds = (
                    rng.uniform(0, start)
                    if rng.random() < 0.2
                    else start + rng.uniform(0, 1.3 * longest)
                )
                if not builds.kill_after(run, seconds):
                    break
                if linked := linked_files(run):
                    sys.exit(f"{linked[0]} has another link after a kill")
                stage = next_stage(run)
                killed[stage] += 1
                print(
                    f"{killed.total()}: killed after {seconds:.1f} s, in {stage}", file=sys.stderr
                )
            builds.finish(run)
            finished += 1
            found = contents(run)
            different = sorted(
                name
                for name in expected.keys() | found.keys()
                if expected.get(name) != found.get(name)
            )
            same = same and not different
            print(f"finished: {different or 'the same bytes'}", file=sys.stderr)
    page.say(
        f"{chosen.model}: a whole build took {whole:.0f} s, its longest stage {longest:.0f} s."
    )
    page.say(
        markdown(
            ("while making", "kills"),
            [[name, str(killed[name])] for name in STAGES if killed[name]],
        )
    )
    found_text = f"{killed.total()} kills, {finished} finished builds, {len(expected)} files each"
    page.say(verdict(same, "every restart ended with the reference's bytes", found_text))
    page.save(chosen.page)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
