"""The stages in order, over one run folder: each is made when its inputs changed, and skipped when not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpq_deploy import stages
from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.recipe import Recipe
from mpq_deploy.report import collect as assemble
from mpq_deploy.run.common import deployed_stage
from mpq_deploy.run.folder import RunFolder, open_run, write_text
from mpq_deploy.run.stage_memory import saying_memory_ran_out
from mpq_deploy.system.parallel.work import Alone, Crew
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.usage import metered

STAGES = (
    "export",
    "calibrate",
    "candidates",
    "measure",
    "allocate",
    "quantize",
    "recover",
    "controls",
    "correction",
    "engine",
    "evaluate",
    "report",
)
# What each stage needs; "report" is made anew each time from all the others.
NEEDS: dict[str, tuple[str, ...]] = {
    "export": (),
    "calibrate": ("export",),
    "candidates": ("export", "calibrate"),
    "measure": ("export", "calibrate", "candidates"),
    "allocate": ("export", "candidates", "measure"),
    "quantize": ("export", "calibrate", "candidates", "allocate"),
    # Only where the recipe wants it.
    "recover": ("export", "calibrate", "candidates", "allocate", "quantize"),
    "controls": ("export", "calibrate", "candidates", "allocate"),
    # Only where the recipe wants one.
    "correction": ("export", "calibrate", "quantize", "recover"),
    "engine": ("export", "allocate", "quantize", "recover"),
    "evaluate": ("export", "allocate", "quantize", "recover", "controls", "correction"),
    "report": ("export", "calibrate", "measure", "allocate", "quantize", "engine", "evaluate"),
}


@dataclass
class StageResult:
    """How a stage was come by in this call."""

    name: str
    seconds: float
    peak_rss_bytes: int
    cached: bool
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """What a command prints: text for people, values for scripts."""

    text: str
    values: dict[str, Any]


class Pipeline:
    """One recipe on one open run folder."""

    def __init__(self, run: RunFolder, recipe: Recipe, talk: Talk, crew: Crew | None = None) -> None:
        self.run, self.recipe, self.talk = run, recipe, talk
        # Who computes shards. No result depends on it, so it is no part of the recipe.
        self.crew: Crew = crew or Alone()
        self.results: dict[str, StageResult] = {}

    def run_until(self, last: str) -> Summary:
        """Make sure that the stage ``last`` and all that it needs are current."""
        for name in self._order(last):
            if name not in self.results:
                self.ensure(name)
        return assemble.summarise(self, last)

    def ensure(self, name: str) -> StageResult:
        """Make the stage ``name`` unless it is current; what it needs must be current already."""
        if name == "report":
            result = self._make_report()
        else:
            inputs = stages.INPUTS[name](self)
            changed = self.run.changed_fields(name, inputs)
            result = self._cached(name) if changed == [] else self._make(name, inputs, changed)
        self.results[name] = result
        return result

    def report_as_is(self) -> Summary:
        """Write the reports from the stages that are current, and make none.

        Raises UsageError when not even the plan is there.
        """
        for name in self._order("report")[:-1]:
            if not all(need in self.results for need in NEEDS[name] if need in self._order(name)):
                continue
            if self.run.changed_fields(name, stages.INPUTS[name](self)) == []:
                self.results[name] = self._cached(name)
        missing = [name for name in self._order("allocate") if name not in self.results]
        if missing:
            raise UsageError(
                f"There is nothing to report in {self.run.path}: the stage '{missing[0]}' is missing or out of date.",
                f"Make the plan with 'mpq-deploy allocate {self.run.path}'.",
            )
        self.ensure("report")
        return assemble.summarise(self, "report")

    def digest(self, name: str) -> str:
        """Digest of a finished stage's outputs."""
        record = self.run.record(name)
        if record is None:
            raise UsageError(f"The stage '{name}' is missing in {self.run.path}.", "Run 'mpq-deploy build' first.")
        return record.digest

    def folder(self, name: str) -> Path:
        """Folder of a finished stage."""
        return self.run.stage(name)

    def sample(self, out: Path, count: int, seed: int, steps: int, controls: bool = False) -> None:
        """Sample the float and the quantized model (and the controls) side by side into the picture ``out``."""
        deployed = deployed_stage(self)
        for name in (deployed, "controls") if controls else (deployed,):
            self.run_until(name)
        assemble.sample_grid(self, out, count, seed, steps, controls)

    def _order(self, last: str) -> list[str]:
        wanted = {last}
        for name in reversed(STAGES):
            if name in wanted:
                wanted.update(NEEDS[name])
        if self.recipe.evaluate.correction == "none" and last != "correction":
            wanted.discard("correction")
        if not self.recipe.recover.steps and last != "recover":
            wanted.discard("recover")
        return [name for name in STAGES if name in wanted]

    def _cached(self, name: str) -> StageResult:
        timing = self.run.timings().get(name, {})
        self.talk.line(f"{name:<10} up to date")
        return StageResult(name, timing.get("seconds", 0.0), int(timing.get("peak_rss_bytes", 0)), True)

    def _make(self, name: str, inputs: dict[str, Any], changed: list[str] | None) -> StageResult:
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            self.talk.line(f"{name:<10} again: {', '.join(changed[:3])}{more} changed")
        with metered() as reading, self.run.writing(name, inputs) as folder, saying_memory_ran_out(name):
            note = stages.MAKERS[name](self, folder)
        self.run.save_timing(name, reading.seconds, reading.peak_rss_bytes)
        self.talk.line(f"{name:<10} {reading.seconds:6.1f} s  {reading.peak_rss_bytes / 1e6:6.0f} MB  {note}")
        return StageResult(name, reading.seconds, reading.peak_rss_bytes, False, changed or [])

    def _make_report(self) -> StageResult:
        with metered() as reading:
            assemble.write_report(self)
        self.run.save_timing("report", reading.seconds, reading.peak_rss_bytes)
        self.talk.line(f"{'report':<10} {reading.seconds:6.1f} s  {reading.peak_rss_bytes / 1e6:6.0f} MB")
        return StageResult("report", reading.seconds, reading.peak_rss_bytes, False)


@contextmanager
def open_pipeline(recipe: Recipe, run: Path, talk: Talk, crew: Crew | None = None) -> Iterator[Pipeline]:
    """Open (and lock) the run folder for ``recipe``, and write the recipe with every default into it.

    ``crew``: who computes what can be spread over workers; None: this process.
    """
    # Mistakes that need no run folder to be found are found before one is made.
    stages.check_recipe(recipe)
    with open_run(run) as folder:
        stored = run / "recipe.yaml"
        before = stored.read_text(encoding="utf-8") if stored.is_file() else None
        write_text(stored, recipe.to_yaml())
        pipeline = Pipeline(folder, recipe, talk, crew)
        try:
            yield pipeline
        except MpqError as error:
            # What was asked for cannot be done: the run folder keeps the recipe that its stages were made by.
            untouched = all(result.cached for result in pipeline.results.values())
            if before is not None and (untouched or isinstance(error, UsageError)):
                write_text(stored, before)
            raise


def default_run(recipe: Recipe) -> Path:
    """Return runs/<name>, with the name taken from the model's path or id."""
    name = Path(recipe.model.rstrip("/")).name if recipe.model else "emoji"
    return Path("runs") / (name.removesuffix(".onnx") or "model")


def read_json(path: Path) -> Any:
    """Read a JSON file that a stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
