"""The stages in order, over one run folder: each is made only when its inputs changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from mpq_deploy.errors import MpqError, RunFolderError, UsageError
from mpq_deploy.recipe import Recipe
from mpq_deploy.report.collect import Summary, summarise
from mpq_deploy.run.effort import open_counts
from mpq_deploy.run.folder import RECIPE, RunFolder, check_one_run, open_run
from mpq_deploy.run.forecast import LONG, Ahead, Outlook, look_ahead, to_make
from mpq_deploy.run.recipe_check import check_recipe
from mpq_deploy.run.stage import Stage, stages_in_order
from mpq_deploy.run.stage_memory import saying_memory_ran_out
from mpq_deploy.run.view import Run, StageResult
from mpq_deploy.stages import (
    allocate,
    calibrate,
    candidates,
    controls,
    correction,
    engine,
    evaluate,
    export,
    measure,
    quantize,
    recover,
    report,
)
from mpq_deploy.system.compute import AUTO, Compute, compute_on, computing_on, find_compute
from mpq_deploy.system.files import Fields, write_text
from mpq_deploy.system.inputs import read_text
from mpq_deploy.system.memory import metered, spare_address_space
from mpq_deploy.system.parallel.processes import kept_workers
from mpq_deploy.system.parallel.work import Alone, Crew
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import duration_text

# Of an error's text, in a line that goes on.
SAID = 200
# In the order in which they are made.
STAGES = stages_in_order(
    export.STAGE,
    calibrate.STAGE,
    candidates.STAGE,
    measure.STAGE,
    allocate.STAGE,
    quantize.STAGE,
    recover.STAGE,
    controls.STAGE,
    correction.STAGE,
    engine.STAGE,
    evaluate.STAGE,
    report.STAGE,
)


# Seconds from which on a stage's forecast is said when it begins.
WORTH_SAYING = 10


class Pipeline:
    """One recipe on one open run folder. ``run``: the view of its present state."""

    def __init__(
        self, folder: RunFolder, recipe: Recipe, talk: Talk, crew: Crew | None = None
    ) -> None:
        self.results: dict[str, StageResult] = {}
        # Why the recipe's compute device cannot be used; None: it can.
        self.no_device: UsageError | None = None
        self._outlook, self.only_looked = Outlook({}), False
        # No result depends on who computes shards, so the crew is not part of the recipe.
        self.run = Run(recipe, folder, talk, crew or Alone(), self.results)

    def run_until(self, last: str) -> Summary:
        """Make the stage ``last`` and all that it needs current; return a summary."""
        return summarise(self.current(last), last)

    def current(self, *names: str) -> Run:
        """Make the stages ``names`` and all that they need current; return the run."""
        for last in names:
            for name in self._order(last):
                if name not in self.results:
                    self.ensure(name)
                    if name == "export":
                        self._look_ahead(self._order(last)[1:])
        return self.run

    def dry_run(self) -> Ahead:
        """Make the export current; return what a whole build would take then, and make nothing of it."""
        self.ensure("export")
        self.only_looked = True
        return self._fit(self._order("report")[1:])

    def _look_ahead(self, coming: list[str]) -> None:
        """Fit open counts of the recipe to its effort, and say what the stages ``coming`` will take."""
        recipe = self.run.recipe
        asked = bool(open_counts(recipe)) or recipe.time is not None
        making = coming if asked else to_make(self.run, STAGES, coming)
        if not any(name in LONG for name in making):
            return
        try:
            ahead = self._fit(coming)
        except UsageError:
            raise
        except Exception as error:
            # The stage that cannot do without what failed says it as its own.
            if recipe.time is not None:
                raise
            self.run.talk.line(f"no forecast: {_said(error)}")
            return
        if any(name in LONG for name in ahead.forecast.stages):
            for line in ahead.lines:
                self.run.talk.line(line)
            stages = ahead.forecast.stages.items()
            self._outlook = Outlook({name: stage.seconds for name, stage in stages})
            self.run.talk.ahead = self._outlook.text

    def _fit(self, coming: list[str]) -> Ahead:
        ahead = look_ahead(self.run, STAGES, coming)
        if ahead.recipe != self.run.recipe:
            write_text(self.run.path / RECIPE, ahead.recipe.stored())
            self.run = replace(self.run, recipe=ahead.recipe)
        return ahead

    def deployed(self, corrected: bool = False) -> Run:
        """Make the deployed graphs current; with ``corrected`` also the recipe's correction."""
        with_correction = corrected and self.run.recipe.evaluate.correction != "none"
        return self.current(self.run.deployed_stage, *(["correction"] if with_correction else []))

    def ensure(self, name: str) -> StageResult:
        """Make the stage ``name`` unless it is current; what it needs must be current already."""
        stage = STAGES[name]
        inputs = None if stage.inputs is None else stage.fields(self.run)
        changed = None if inputs is None else self.run.folder.changed_fields(name, inputs)
        self.results[name] = (
            self._cached(name) if changed == [] else self._make(stage, inputs, changed)
        )
        return self.results[name]

    def report_as_is(self) -> Summary:
        """Report existing stages only; run none. Raises UsageError without a current plan."""
        order = self._order("report")
        for stage in (STAGES[name] for name in order):
            if stage.inputs is None or not all(
                need in self.results for need in stage.needs if need in order
            ):
                continue
            if self.run.folder.changed_fields(stage.name, stage.fields(self.run)) == []:
                self.results[stage.name] = self._cached(stage.name)
        missing = [name for name in self._order("allocate") if name not in self.results]
        if missing:
            raise UsageError(
                f"There is nothing to report in {self.run.path}: the stage '{missing[0]}' is missing or out of date.",
                f"Make the plan with 'mpq-deploy allocate {self.run.path}'.",
            )
        self.ensure("report")
        return summarise(self.run, "report")

    def _order(self, last: str) -> list[str]:
        needed = {last}
        for name, stage in reversed(STAGES.items()):
            if name in needed:
                needed.update(stage.needs)
        applies = {name for name, stage in STAGES.items() if stage.applies(self.run.recipe)}
        return [name for name in STAGES if name in needed and (name == last or name in applies)]

    def _cached(self, name: str) -> StageResult:
        self._outlook.skip(name)
        timing = self.run.folder.timings().get(name, {})
        self.run.talk.line(f"{name:<10} up to date")
        return StageResult(
            name, timing.get("seconds", 0.0), int(timing.get("peak_rss_bytes", 0)), True
        )

    def _make(self, stage: Stage, inputs: Fields | None, changed: list[str] | None) -> StageResult:
        run, name = self.run, stage.name
        if self.no_device and stage.computes:
            raise self.no_device
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            run.talk.line(f"{name:<10} again: {', '.join(changed[:3])}{more} changed")
        self._outlook.start(name)
        expected = self._outlook.expected.get(name, 0.0)
        if expected >= WORTH_SAYING:
            run.talk.line(f"{name:<10} {duration_text(expected)}, {self._outlook.text()}")
        with metered() as reading:
            note = self._fill(stage, inputs)
        seconds, peak = reading.seconds, reading.peak_rss_bytes
        run.folder.save_timing(name, seconds, peak)
        self._outlook.finish(name, seconds)
        run.talk.line(f"{name:<10} {seconds:6.1f} s  {peak / 1e6:6.0f} MB  {note}".rstrip())
        self.run = run.after(name)
        return StageResult(name, seconds, peak, False)

    def _fill(self, stage: Stage, inputs: Fields | None) -> str:
        """Make the stage's folder; return a few words for the log.

        Where the device was not asked for by name and the stage fails on it, the CPU makes it, which
        is said: drivers and libraries fail in more ways than can be asked for before.
        """
        run, place = self.run, computing_on() if stage.computes else Compute()
        try:
            with self._folder(stage, inputs, place) as folder, saying_memory_ran_out(stage):
                return stage.make(run, folder)
        except Exception as error:
            chosen = place == Compute() or run.recipe.compute.device != AUTO
            if chosen or isinstance(error, UsageError):
                raise
            said = _said(error)
        run.talk.warn(
            f"{stage.name} failed on {place} and runs on the CPU (--device cpu avoids the attempt): {said}"
        )
        with (
            compute_on(Compute()),
            self._folder(stage, inputs, Compute()) as folder,
            saying_memory_ran_out(stage),
        ):
            return stage.make(run, folder)

    def _folder(
        self, stage: Stage, inputs: Fields | None, place: Compute
    ) -> AbstractContextManager[Path]:
        run = self.run
        if inputs is None:
            return nullcontext(run.path)
        return run.folder.writing(stage.name, inputs, str(place))


def _said(error: Exception) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split())[:SAID] or type(error).__name__


@contextmanager
def open_pipeline(
    recipe: Recipe,
    run: Path,
    talk: Talk,
    crew: Crew | None = None,
    *,
    computes: bool = True,
    coming: Sequence[tuple[Recipe, Path]] = (),
) -> Iterator[Pipeline]:
    """Open and lock the run folder for ``recipe``; write the recipe with every default into it.

    ``crew``: who computes what can be spread over workers; None: this process. ``computes`` False:
    only stages run the model, so a compute device that is not here is refused by the first of
    those that must be made. ``coming``: as a ``Run`` has them. Raises UsageError for a device that is not here.
    """
    spare_address_space()
    if run.is_dir():
        check_one_run(run)
    check_recipe(recipe)
    place, no_device = Compute(), None
    try:
        place = find_compute(recipe.compute.device)
    except UsageError as error:
        if computes or not run.is_dir():
            raise
        no_device = error
    if place != Compute():
        talk.line(f"computing on {place}")
    with open_run(run) as folder, compute_on(place), kept_workers():
        stored = run / RECIPE
        before = read_text(stored, error=RunFolderError) if stored.is_file() else None
        write_text(stored, recipe.stored())
        pipeline = Pipeline(folder, recipe, talk, crew)
        pipeline.run = replace(pipeline.run, coming=tuple(coming))
        pipeline.no_device = no_device
        try:
            yield pipeline
            if before is not None and pipeline.only_looked:
                write_text(stored, before)
        except MpqError as error:
            # The request cannot be met: the folder keeps the recipe that made its stages.
            untouched = all(result.cached for result in pipeline.results.values())
            if before is not None and (untouched or isinstance(error, UsageError)):
                write_text(stored, before)
            raise


def default_run(recipe: Recipe) -> Path:
    """Return runs/<name>, with the name taken from the model's path or id."""
    name = Path(recipe.model.rstrip("/")).name if recipe.model else "emoji"
    return Path("runs") / (name.removesuffix(".onnx").removesuffix(".safetensors") or "model")
