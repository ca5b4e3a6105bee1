"""The stages in order, over one run folder: each is made when its inputs changed, and skipped when not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpq_deploy import stages
from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.recipe import Recipe
from mpq_deploy.report import collect as assemble
from mpq_deploy.run.folder import RunFolder, open_run
from mpq_deploy.run.stage_memory import saying_memory_ran_out
from mpq_deploy.run.view import RECIPE, Run, StageResult
from mpq_deploy.system.files import write_text
from mpq_deploy.system.parallel.work import Alone, Crew
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.usage import Reading, metered

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


class Pipeline:
    """One recipe on one open run folder: the stages in their order. ``run`` is what it looks like now."""

    def __init__(self, folder: RunFolder, recipe: Recipe, talk: Talk, crew: Crew | None = None) -> None:
        self.results: dict[str, StageResult] = {}
        # No result depends on who computes shards, so the crew is no part of the recipe.
        self.run = Run(recipe, folder, talk, crew or Alone(), self.results)

    def run_until(self, last: str) -> assemble.Summary:
        """Make sure that the stage ``last`` and all that it needs are current, and say what there is."""
        return assemble.summarise(self.current(last), last)

    def current(self, *names: str) -> Run:
        """Make sure that the stages ``names`` and all that they need are current; return the run."""
        for last in names:
            for name in self._order(last):
                if name not in self.results:
                    self.ensure(name)
        return self.run

    def deployed(self, corrected: bool = False) -> Run:
        """Make the graphs that are deployed current; with ``corrected`` also the correction, if the recipe wants it."""
        wanted = corrected and self.run.recipe.evaluate.correction != "none"
        return self.current(self.run.deployed_stage, *(["correction"] if wanted else []))

    def ensure(self, name: str) -> StageResult:
        """Make the stage ``name`` unless it is current; what it needs must be current already."""
        if name == "report":
            result = self._make_report()
        else:
            inputs = stages.INPUTS[name](self.run)
            changed = self.run.folder.changed_fields(name, inputs)
            result = self._cached(name) if changed == [] else self._make(name, inputs, changed)
        self.results[name] = result
        return result

    def report_as_is(self) -> assemble.Summary:
        """Write the reports from the stages that are current, and make none.

        Raises UsageError when not even the plan is there.
        """
        for name in self._order("report")[:-1]:
            if not all(need in self.results for need in NEEDS[name] if need in self._order(name)):
                continue
            if self.run.folder.changed_fields(name, stages.INPUTS[name](self.run)) == []:
                self.results[name] = self._cached(name)
        missing = [name for name in self._order("allocate") if name not in self.results]
        if missing:
            raise UsageError(
                f"There is nothing to report in {self.run.path}: the stage '{missing[0]}' is missing or out of date.",
                f"Make the plan with 'mpq-deploy allocate {self.run.path}'.",
            )
        self.ensure("report")
        return assemble.summarise(self.run, "report")

    def _order(self, last: str) -> list[str]:
        wanted = {last}
        for name in reversed(STAGES):
            if name in wanted:
                wanted.update(NEEDS[name])
        if self.run.recipe.evaluate.correction == "none" and last != "correction":
            wanted.discard("correction")
        if not self.run.recipe.recover.steps and last != "recover":
            wanted.discard("recover")
        return [name for name in STAGES if name in wanted]

    def _cached(self, name: str) -> StageResult:
        timing = self.run.folder.timings().get(name, {})
        self.run.talk.line(f"{name:<10} up to date")
        return StageResult(name, timing.get("seconds", 0.0), int(timing.get("peak_rss_bytes", 0)), True)

    def _make(self, name: str, inputs: dict[str, Any], changed: list[str] | None) -> StageResult:
        run = self.run
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            run.talk.line(f"{name:<10} again: {', '.join(changed[:3])}{more} changed")
        with metered() as reading, run.folder.writing(name, inputs) as folder, saying_memory_ran_out(name):
            note = stages.MAKERS[name](run, folder)
        return self._made(name, reading, note)

    def _make_report(self) -> StageResult:
        with metered() as reading:
            assemble.write_report(self.run)
        return self._made("report", reading)

    def _made(self, name: str, reading: Reading, note: str = "") -> StageResult:
        run, seconds, peak = self.run, reading.seconds, reading.peak_rss_bytes
        run.folder.save_timing(name, seconds, peak)
        run.talk.line(f"{name:<10} {seconds:6.1f} s  {peak / 1e6:6.0f} MB  {note}".rstrip())
        # Another view, with nothing opened: what the stage opened goes, and what was opened of its former self.
        self.run = replace(run)
        return StageResult(name, seconds, peak, False)


@contextmanager
def open_pipeline(recipe: Recipe, run: Path, talk: Talk, crew: Crew | None = None) -> Iterator[Pipeline]:
    """Open (and lock) the run folder for ``recipe``, and write the recipe with every default into it.

    ``crew``: who computes what can be spread over workers; None: this process.
    """
    # Mistakes that need no run folder to be found are found before one is made.
    stages.check_recipe(recipe)
    with open_run(run) as folder:
        stored = run / RECIPE
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
