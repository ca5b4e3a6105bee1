"""A run of a whole pipeline: a run of each part below ``components/NAME``, under one budget.

In: a recipe and the parts of its pipeline. Out: the runs, and pipeline.json, the joint view. All
parts are measured first; one program then gives each its bytes, within which its own run plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpq_deploy.allocate.joint import PartProblem, Share, solve_jointly
from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import InfeasibleBudgetError, InfeasibleLatencyError, ModelError, UsageError
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.latency.plan_latency import check_latency, needs_latency
from mpq_deploy.models.open import additions_of
from mpq_deploy.models.pipeline_parts import TEXT, Parts
from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.recipe import Recipe, load_recipe, make_recipe
from mpq_deploy.run.effort import with_counts_of
from mpq_deploy.run.folder import (
    COMPONENTS,
    PIPELINE,
    RECIPE,
    RunFolder,
    begin_run,
    open_run,
    sharing_with,
)
from mpq_deploy.run.forecast import Ahead
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.pipeline_file import PartFigures, PipelineFile
from mpq_deploy.run.stage import version_of
from mpq_deploy.run.view import Run
from mpq_deploy.system.files import Fields, canonical_json, file_digest
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.parallel.processes import kept_workers
from mpq_deploy.system.parallel.work import Crew
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import Budget
from mpq_deploy.system.validated import model_of

GAINS_FORMAT = IMAGES_FORMAT = CALLED_FORMAT = 1
GAINS, IMAGES, CALLED = "gains", "images", "called"
# Images of the pipeline that are compared at most: each is run once per part and twice more.
MOST_IMAGES = 8
Runs = Sequence[tuple[Recipe, Path]]
# Stages of a whole pipeline's run: parts are measured, planned, or finished.
STAGES = ("export", "measure", "allocate", "report")


@dataclass(frozen=True)
class _Measured:
    """A part whose losses are known."""

    problem: PartProblem
    spec: DenoiserSpec
    digest: str
    fp16_bytes: int
    weights: int
    timed: bool


class WholeRun:
    """The runs of a pipeline's parts below one open folder.

    ``coming``: recipes and folders of the targets that are built after this one in the same call.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        parts: Parts,
        talk: Talk,
        crew: Crew | None,
        coming: Runs = (),
    ) -> None:
        self.recipe, self.folder, self.parts = recipe, folder, parts
        self._coming = [WholeRun(own, RunFolder(run), parts, talk, crew) for own, run in coming]
        self._talk, self._crew = talk, crew
        self._given = recipe.model_dump(mode="json", exclude_unset=True)
        self._pipeline: Any = None

    def run_until(self, last: str) -> PipelineFile:
        """Make the runs of all parts up to the stage ``last`` current; return the joint view."""
        self.leave_out_uncalled()
        view = self.view()
        self.mark()
        for later in self._coming:
            # What is measured for it lies in its folder before its turn.
            begin_run(later.folder.path)
            later.parts = self.parts
            later.mark()
        if last in ("export", "measure"):
            for name in self.parts.names:
                self._in_part(name, self.own_recipe(name), last, lambda run: None)
            return view
        self._export_all()
        measured = {
            name: self._in_part(name, self.own_recipe(name), "measure", self._measured)
            for name in self.parts.names
        }
        gains = self._gains(measured)
        batch = self.recipe.engine.batch_opt
        measured = {name: _weighted(part, gains[name], batch) for name, part in measured.items()}
        shares, budget = self._shares(measured, self.recipe.budget)
        for name, share in shares.items():
            size = measured[name].fp16_bytes
            self._talk.line(
                f"  {name}: {share.bytes:,} bytes ({share.bytes / size:.4f} of its FP16), "
                f"predicted error of the images {share.loss:.2e}"
            )
        plans = {
            name: self._in_part(name, self.own_recipe(name, share), last, _planned)
            for name, share in shares.items()
        }
        view = _joint_view(view, measured, gains, plans, budget)
        if last == "report":
            from mpq_deploy.delivery.whole_results import whole_devices

            view = self._with_images(view, measured)
            devices = whole_devices(self.folder.path, view, batch, self._talk)
            view = view.model_copy(update={"devices": devices})
        view.save(self.folder.path)
        return view

    def _export_all(self) -> None:
        """Export the parts that were not yet: one that cannot be is known before another is measured."""
        for name in self.parts.names:
            if RunFolder(self._path(name)).stage("export").is_dir():
                continue
            try:
                self._in_part(name, self.own_recipe(name), "export", lambda run: None)
            except (ModelError, UsageError) as error:
                others = [other for other in self.parts.names if other != name]
                # Calls that the pipeline does not take are the same for every part.
                call = self.recipe.call
                of_call = call is not None and str(call) in error.message
                if name != self.parts.denoiser and not of_call:
                    error.hint += f" Or leave the {name} as it is: --only {','.join(others)}."
                raise

    def leave_out_uncalled(self) -> None:
        """Leave out the parts that nobody named and that the pipeline never calls.

        It is run up to its denoiser to find out, once for the same calls: the answer is kept.
        """
        unnamed = sorted(self.parts.where_called)
        if not unnamed:
            return
        call = str(self.recipe.call)
        inputs: Fields = {
            "format": CALLED_FORMAT,
            "parts": unnamed,
            "call": file_digest(Path(call)),
        }
        inputs |= {"pipeline": self.parts.class_name, **version_of("diffusers")}

        def make(folder: Path) -> None:
            from mpq_deploy.models.component import called_parts

            additions = additions_of(self.own_recipe(unnamed[0]))
            made = called_parts(self.parts.folder, unnamed, additions)
            (folder / "called.json").write_text(canonical_json({"parts": made}), encoding="utf-8")

        found = read_json_object(self._current(CALLED, inputs, make) / "called.json")
        absent = [name for name in unnamed if name not in found["parts"]]
        for name in absent:
            self._talk.line(f"part {name}: left out, {self.parts.class_name} does not call it here")
        names = tuple(name for name in self.parts.names if name not in absent)
        self.parts = replace(self.parts, names=names)

    def sweep(
        self, budgets: Sequence[Budget]
    ) -> list[PipelineFile | InfeasibleBudgetError | InfeasibleLatencyError]:
        """Return the joint view of the plan of each budget, or why there is none.

        The parts stay as they are: their runs are read, and what is measured is not measured again.
        """
        runs = {name: Run.opened(self._path(name), self._talk) for name in self.parts.names}
        solvers = {name: PlanSolver(run) for name, run in runs.items()}
        known = {name: self._measured(run, solvers[name]) for name, run in runs.items()}
        gains, batch = self._gains(known), self.recipe.engine.batch_opt
        measured = {name: _weighted(part, gains[name], batch) for name, part in known.items()}

        def solved(budget: Budget) -> PipelineFile:
            shares, limit = self._shares(measured, budget)
            plans = {}
            for name, share in shares.items():
                own = self.own_recipe(name, share)
                solvers[name].section = own.allocate
                plans[name] = _figures(solvers[name].solve(own.budget))
            return _joint_view(self.view(), measured, gains, plans, limit)

        found: list[PipelineFile | InfeasibleBudgetError | InfeasibleLatencyError] = []
        with self._talk.bar("solve budgets", len(budgets)) as advance:
            for budget in budgets:
                try:
                    found.append(solved(budget))
                except (InfeasibleBudgetError, InfeasibleLatencyError) as error:
                    found.append(error)
                advance(1)
        return found

    def mark(self) -> None:
        """Make the folder a whole pipeline's run; what an earlier build found stays until the next plan."""
        if not (self.folder.path / PIPELINE).is_file():
            self.view().save(self.folder.path)

    def view(self) -> PipelineFile:
        """Return the joint view before anything is planned."""
        pinned = self.parts.pinned
        states = {
            name: PartFigures(state="pinned" if name in pinned else "quantized")
            for name in self.parts.names
        }
        source = str(self.recipe.model)
        return PipelineFile(
            class_name=self.parts.class_name,
            source=source,
            denoiser=self.parts.denoiser,
            recipe=self._given,
            directory=str(Path.cwd()),
            parts=states,
        )

    def own_recipe(self, name: str, share: Share | None = None) -> Recipe:
        """Return the recipe of a part's run; before there is a ``share``, with the whole's budget."""
        given = {k: v for k, v in self._given.items() if k != "pinned"} | {"component": name}
        if name.startswith(TEXT):
            given.pop("sizes", None)
        if name.startswith("vae"):
            # LoRAs update denoisers and text encoders.
            given.pop("lora_slots", None)
        section = dict(given.get("allocate", {}))
        section |= {"objective": "quality", "max_latency": None, "max_loss": None}
        if name in self.parts.pinned:
            given |= {"budget": "1.0", "recover": {}}
            given["evaluate"] = {**given.get("evaluate", {}), "controls": False}
            section |= {"schemes": ["fp16"], "branches": []}
        elif share is not None:
            given["budget"] = f"{share.bytes}B"
            if share.latency_ns:
                section["max_latency"] = f"{share.latency_ns / 1000:.3f}us"
        made = make_recipe({**given, "allocate": section})
        own = self._path(name)
        for run in (own, *sharing_with(own)):
            # Targets share calls, so a part has the counts that were fitted for the first of them.
            former = load_recipe(run / RECIPE) if (run / RECIPE).is_file() else None
            if former is not None and (former.effort, former.time) == (made.effort, made.time):
                return with_counts_of(made, former)
        return made

    def _path(self, name: str) -> Path:
        return self.folder.path / COMPONENTS / name

    def _in_part(self, name: str, recipe: Recipe, last: str, then: Callable[[Run], Any]) -> Any:
        """Make a part's run current up to ``last``; return what ``then`` makes of it."""
        self._talk.line(f"part {name}")
        coming = [(later.own_recipe(name), later._path(name)) for later in self._coming]
        with open_pipeline(
            recipe, self._path(name), self._talk, self._crew, computes=False, coming=coming
        ) as pipeline:
            if last == "report":
                pipeline.run_until(last)
                return then(pipeline.current("allocate"))
            return then(pipeline.current(last))

    def _measured(self, run: Run, solver: PlanSolver | None = None) -> _Measured:
        solver = solver or PlanSolver(run)
        if not solver.table.predicts_nmse:
            raise UsageError(
                f"The metric {solver.table.metric} only ranks the layers of one part, so parts cannot share a budget.",
                "Measure by probe (--sensitivity probe), or build one part alone: --only NAME.",
            )
        return _Measured(
            PartProblem(solver.timed_problem(), 0.0),
            run.exported.spec,
            run.digest("export"),
            solver.fp16_size,
            solver.weights,
            solver.costs is not None,
        )

    def _gains(self, measured: Mapping[str, _Measured]) -> dict[str, Any]:
        """Return the gain of each part, measured where its graphs changed."""
        from mpq_deploy.sensitivity.image_gain import IMAGES as COUNT
        from mpq_deploy.sensitivity.image_gain import SIZES, Gain, measure_gains

        steps, seed = self.recipe.evaluate.steps, self.recipe.measure.seed
        free = [name for name in measured if name not in self.parts.pinned]
        inputs: Fields = {
            **self._fields(measured, GAINS_FORMAT),
            "noise": [free, COUNT, SIZES, steps, seed],
        }

        def make(folder: Path) -> None:
            made = measure_gains(self._opened(measured), free, steps, seed, self._talk)
            values = {name: gain.model_dump() for name, gain in made.items()}
            (folder / "gains.json").write_text(canonical_json(values), encoding="utf-8")

        path = self._current(GAINS, inputs, make) / "gains.json"
        found = {name: model_of(Gain, v, str(path)) for name, v in read_json_object(path).items()}
        for name, gain in found.items():
            apart = "" if gain.quadratic else f"; {gain.at_larger:.3g} for larger noise"
            if name in free:
                self._talk.line(
                    f"  {name}: gain {gain.gain:.3g}{apart}, {gain.rows:g} rows per image"
                )
        return found

    def _fields(self, measured: Mapping[str, _Measured], number: int) -> Fields:
        digests = {name: part.digest for name, part in measured.items()}
        versions = version_of("torch", "diffusers", "transformers", "numpy")
        return {"format": number, "export": digests, **versions}

    def _current(self, name: str, inputs: Fields, make: Callable[[Path], None]) -> Path:
        """Make a folder of the whole's own unless it is current; return it."""
        if self.folder.changed_fields(name, inputs) != []:
            with self.folder.writing(name, inputs) as folder:
                make(folder)
        return self.folder.stage(name)

    def _opened(self, measured: Mapping[str, _Measured]) -> Any:
        """Return the float pipeline, loaded once."""
        from mpq_deploy.calls.whole_pipeline import WholePipeline

        if self._pipeline is None:
            specs = {name: part.spec for name, part in measured.items()}
            parts = self.parts
            if parts.denoiser not in specs:
                raise UsageError(
                    f"The {parts.denoiser} is not among {', '.join(parts.names)}, and images need its calls.",
                    f"Add it: --only {','.join((*parts.names, parts.denoiser))}; or build parts one by one.",
                )
            lora = self.recipe.lora
            self._pipeline = WholePipeline(parts.folder, parts.denoiser, specs, lora)
        return self._pipeline

    def _shares(
        self, measured: Mapping[str, _Measured], wanted: Budget
    ) -> tuple[dict[str, Share], int]:
        fp16 = sum(part.fp16_bytes for part in measured.values())
        weights = sum(part.weights for part in measured.values())
        budget = wanted.bytes(fp16, weights)
        timed = all(part.timed for part in measured.values())
        untimed = [name for name, part in measured.items() if not part.timed]
        if untimed and needs_latency(self.recipe):
            raise UsageError(
                f"No latency is known of {', '.join(untimed)}, and a limit or objective is of all parts' calls.",
                "Leave --max-latency and --objective latency out; or build the other parts alone: --only.",
            )
        problems = {name: part.problem for name, part in measured.items()}
        try:
            return solve_jointly(problems, budget, self.recipe.allocate, timed), budget
        except InfeasibleBudgetError as error:
            raise _too_small(wanted, budget, measured, self.parts.pinned, error.smallest) from error

    def _with_images(self, view: PipelineFile, measured: Mapping[str, _Measured]) -> PipelineFile:
        """Compare the final images, and add what was measured to the joint view."""
        from mpq_deploy.evaluate.final_images import FinalImages, compare_images
        from mpq_deploy.report.read import read_report

        section = self.recipe.evaluate
        count = min(section.samples, MOST_IMAGES)
        runs = {
            name: Run.opened(self._path(name), self._talk)
            for name in measured
            if name not in self.parts.pinned
        }
        inputs: Fields = {
            **self._fields(measured, IMAGES_FORMAT),
            "deployed": {name: run.digest(run.deployed_stage) for name, run in runs.items()},
            "images": [count, section.steps, section.seed],
        }

        def make(folder: Path) -> None:
            graphs = {name: run.deployed / SIMULATED for name, run in runs.items()}
            pipeline = self._opened(measured)
            made = compare_images(pipeline, graphs, count, section.steps, section.seed, self._talk)
            (folder / "images.json").write_text(canonical_json(made.model_dump()), encoding="utf-8")

        path = self._current(IMAGES, inputs, make) / "images.json"
        found: FinalImages = model_of(FinalImages, read_json_object(path), str(path))
        parts = {
            name: part.model_copy(
                update={
                    "measured_nmse": read_report(self._path(name)).measured_nmse,
                    "measured_image_error": found.alone.get(name),
                }
            )
            for name, part in view.parts.items()
        }
        return view.model_copy(
            update={
                "parts": parts,
                "measured_image_error": found.together,
                "psnr_db": found.psnr_db,
                "images": found.images,
            }
        )


def _planned(run: Run) -> tuple[int, float | None, float | None]:
    return _figures(run.plan)


def _figures(plan: PrecisionPlan) -> tuple[int, float | None, float | None]:
    """Return a part's bytes, predicted error and milliseconds of one call."""
    return plan.size_bytes, plan.predicted_loss, plan.latency.ours_ms if plan.latency else None


def _too_small(
    wanted: Budget,
    budget: int,
    measured: Mapping[str, _Measured],
    pinned: Collection[str],
    smallest: int,
) -> InfeasibleBudgetError:
    """Say the smallest budget of all parts, and how small each part can be."""
    fp16 = sum(part.fp16_bytes for part in measured.values())
    ratio = math.ceil(smallest / fp16 * 1e4) / 1e4
    each = []
    for name, part in measured.items():
        least = part.problem.problem.plan_bytes(part.problem.problem.smallest_plan())
        each.append(
            f"{name} {least / part.fp16_bytes:.4f} of its {part.fp16_bytes:,} bytes in FP16"
        )
    kept = sorted(set(pinned) & set(measured))
    fewer = f"Pin fewer parts than {', '.join(kept)}, or allow" if kept else "Allow"
    return InfeasibleBudgetError(
        f"No plan of all parts fits the budget {wanted} ({budget:,} bytes).",
        f"The smallest feasible budget is {ratio:.4f} ({smallest:,} bytes); the parts alone: "
        f"{', '.join(each)}. {fewer} smaller schemes (allocate.schemes).",
        smallest,
    )


def _weighted(part: _Measured, gain: Any, batch: int) -> _Measured:
    """Return a part with its gain and its calls per image, times being those of ``batch`` rows."""
    problem = PartProblem(part.problem.problem, gain.gain, gain.rows / batch)
    return _Measured(problem, part.spec, part.digest, part.fp16_bytes, part.weights, part.timed)


def _joint_view(
    view: PipelineFile,
    measured: Mapping[str, _Measured],
    gains: Mapping[str, Any],
    plans: Mapping[str, tuple[int, float | None, float | None]],
    budget: int,
) -> PipelineFile:
    parts = {}
    for name, (size, loss, latency) in plans.items():
        gain = gains[name]
        pinned = view.parts[name].state == "pinned"
        parts[name] = PartFigures(
            state=view.parts[name].state,
            fp16_size_bytes=measured[name].fp16_bytes,
            size_bytes=size,
            gain=None if pinned else gain.gain,
            quadratic=None if pinned else gain.quadratic,
            rows=gain.rows,
            predicted_nmse=loss,
            predicted_image_error=0.0 if pinned else gain.gain * (loss or 0.0),
            latency_ms=latency,
            image_ms=None if latency is None else latency * measured[name].problem.calls,
        )
    times = [part.image_ms for part in parts.values() if part.image_ms is not None]
    return view.model_copy(
        update={
            "parts": parts,
            "budget_bytes": budget,
            "fp16_size_bytes": sum(part.fp16_bytes for part in measured.values()),
            "size_bytes": sum(part.size_bytes or 0 for part in parts.values()),
            "weights": sum(part.weights for part in measured.values()),
            "predicted_image_error": sum(p.predicted_image_error or 0.0 for p in parts.values()),
            "image_ms": sum(times) if len(times) == len(parts) else None,
            "notes": _notes(parts),
        }
    )


def _notes(parts: Mapping[str, PartFigures]) -> tuple[str, ...]:
    curved = [name for name, part in parts.items() if part.quadratic is False]
    notes = [
        "Predicted errors of images are a part's predicted error times its gain, measured by noise of 1 % on the "
        "part's float output, half of a denoiser's the same at each step. A quantized part's error is no such noise."
    ]
    if curved:
        notes.append(f"Not quadratic between noises of 1 % and 3 %: {', '.join(curved)}.")
    pinned = [name for name, part in parts.items() if part.state == "pinned"]
    if pinned:
        notes.append(f"Pinned to FP16, and run in float here: {', '.join(pinned)}.")
    return tuple(notes)


def forecast_whole(
    recipe: Recipe, run: Path, parts: Parts, talk: Talk, crew: Crew | None = None
) -> dict[str, Ahead]:
    """Export each part; return what its own run would take. Runs for the final images come on top."""
    found = {}
    check_latency(recipe, load_target(recipe.target))
    with open_run(run) as folder:
        whole = WholeRun(recipe, folder, parts, talk, crew)
        whole.leave_out_uncalled()
        whole.mark()
        for name in whole.parts.names:
            own, path = whole.own_recipe(name), run / COMPONENTS / name
            with open_pipeline(own, path, talk, crew) as pipeline:
                found[name] = pipeline.dry_run()
    return found


def build_whole(
    recipe: Recipe, run: Path, parts: Parts, last: str, talk: Talk, crew: Crew | None = None
) -> PipelineFile:
    """Make the runs of a pipeline's parts current up to the stage ``last`` (one of ``STAGES``)."""
    return build_first([(recipe, run)], parts, last, talk, crew)


def build_first(
    runs: Runs, parts: Parts, last: str, talk: Talk, crew: Crew | None = None
) -> PipelineFile:
    """Make the first of ``runs`` current, as ``build_whole``.

    ``runs``: recipe and folder of each target of one run; those that follow share what is measured.
    """
    (recipe, run), *coming = runs
    if "," in recipe.target:
        raise UsageError(
            f"One call builds a whole pipeline for one target, not for '{recipe.target}'.",
            "Give one target; the command line builds several in turn.",
        )
    check_latency(recipe, load_target(recipe.target))
    with open_run(run) as folder, kept_workers():
        return WholeRun(recipe, folder, parts, talk, crew, coming).run_until(last)
