"""How long every stage will take and how much memory, before it starts; and what is left of a build.

In: an exported run, the ``Work`` of its stages, the machine's ``Speed``. Out: a ``Forecast``. What
is not a call of the model (rounding, products, Python around each layer) is counted by sizes, with
constants that were fitted on one machine of two cores (the bundled digits, a small transformer, UNets
of 2 M and, for rounding, emoji and 21 M parameters); ``Speed.pace`` says how much slower another is.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpq_deploy.evaluate.variants import kept_images
from mpq_deploy.rounding.hessian import block_widths
from mpq_deploy.rounding.quantizers import (
    TOGETHER_BYTES,
    lanes_of,
    rounding_bytes,
    rounding_threads,
)
from mpq_deploy.run.effort import COUNTS, fitted, get, least
from mpq_deploy.run.machine_speed import FILE, Speed, probe_batch, speed_of
from mpq_deploy.run.memory_model import StageMemory, estimate_engine
from mpq_deploy.run.stage_memory import check_memory, stage_memory
from mpq_deploy.run.stage_work import (
    LayerWork,
    ModelWork,
    Work,
    gain_work,
    hessian_products,
    works,
)
from mpq_deploy.run.view import SAMPLES
from mpq_deploy.sensitivity.measured_calls import HELD_SHARE, STACK_BYTES
from mpq_deploy.stages.calibrate import kept_counts
from mpq_deploy.stages.measure import kept_parts
from mpq_deploy.system import memory
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.parallel.processes import Processes
from mpq_deploy.system.parallel.work import Alone
from mpq_deploy.system.quantities import duration_text
from mpq_deploy.system.threads import physical_cores, threads_here

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.stage import Stage
    from mpq_deploy.run.view import Run

# Rounding a layer, in seconds: of each; per form and column; per form and weight; per refined form,
# weight and column in each round; per column cubed (GPTQ's factor).
LAYER, FORM_COLUMN, FORM_WEIGHT, REFINED, FACTOR = 0.0094, 7.3e-6, 5.3e-8, 1.14e-10, 8e-12
# Observing: per activation, of each call and in the end; per value that is observed.
OBSERVED_CALL, OBSERVED_END, OBSERVED_VALUE = 9e-5, 0.035, 2e-9
# Gathering rows for Hessians: per batch and activation; per value that is gathered.
GATHERED_BATCH, GATHERED_VALUE = 2.5e-4, 8e-9
# Projecting errors: per layer and per range in each batch; per value and range.
PROJECTED_BATCH, ROUNDED_BATCH, ROUNDED_VALUE = 1.5e-3, 9e-5, 7e-9
# Stacking the errors of a layer's forms, per form and weight: read, unpacked, less the float weight.
STACKED = 1.2e-8
# Errors of channels, per layer in each call.
SALIENT_LAYER = 3e-4
# Quantized graphs over float ones: per row of a graph; per layer in each batch.
QUANTIZED, QUANTIZED_LAYER = 1.05, 1e-4
# Writing a graph, per layer and weight; solving, per pair of layer and scheme.
WRITTEN_LAYER, WRITTEN_WEIGHT, SOLVED_PAIR = 0.012, 2e-8, 1.3e-3
# The report, in all and per layer.
REPORT, REPORTED_LAYER = 0.4, 0.01
# Building an engine, in all and per layer; what torch and evaluation need to begin; per image.
ENGINE, ENGINE_LAYER, TORCH, EVALUATION, COMPARED = 1.2, 0.055, 0.8, 1.0, 0.005
# Updates of recovery are worth so many passes back beside their own forward pass (our choice).
TRAINED_BACK = 2.0
# Columns of what is said (our choice).
COLUMNS = 80
# Stages whose memory is known before those before them are made.
CHECKED = ("calibrate", "candidates", "measure", "allocate", "quantize", "evaluate")
# What is worth a forecast: the others take seconds.
LONG = ("calibrate", "candidates", "measure", "recover", "evaluate")
FEWER = {
    "calibrate": ("calibrate.samples", "calibrate.timesteps"),
    "candidates": ("allocate.schemes", "allocate.branches"),
    "measure": ("measure.calls", "measure.timesteps"),
    "recover": ("recover.steps", "recover.trajectories"),
    "controls": ("evaluate.controls",),
    "engine": ("engine.build",),
    "evaluate": ("evaluate.samples", "evaluate.controls"),
}


def rounding_seconds(layer: LayerWork, recipe: Recipe) -> float:
    """Return what rounding ``layer`` takes on the machine that the constants are of."""
    forms, weights = layer.forms, float(layer.weights)
    taken = LAYER + FORM_WEIGHT * forms * weights
    if recipe.quantize.rounding == "nearest":
        return taken
    width = max(block_widths(layer.columns, layer.groups, recipe.quantize))
    refined = REFINED * layer.refined * recipe.quantize.refinements * weights * width
    factor = FACTOR * layer.groups * layer.columns * float(width) ** 2
    return taken + FORM_COLUMN * forms * layer.columns * layer.groups + refined + factor


def _projected_products(layer: LayerWork, probes: int) -> float:
    """Return the multiplications that all errors of a layer take per call, by the cheaper of two ways.

    As ``sensitivity.torch_projection`` chooses it.
    """
    from mpq_deploy.sensitivity.torch_projection import GRADIENT_POSITIONS, PATCH_POSITIONS

    positions = layer.positions
    forward = (layer.forms + 0.1 * layer.promoted) * positions
    gathered = probes * (positions + GRADIENT_POSITIONS) + PATCH_POSITIONS * positions
    ways = (forward, gathered + layer.forms * probes)
    return layer.weights * (min(ways) if layer.groups == 1 else forward)


def _stacked(model: ModelWork, batches: float) -> float:
    """Return the elements of all stacked errors, times how often they are made.

    Once where memory holds them; in each batch where it does not, as with most layers of a large model.
    """
    made = sum(
        layer.weights * (layer.forms + 1 + 2 * bool(layer.promoted)) for layer in model.layers
    )
    whole = sum(4 * layer.weights * (layer.forms + layer.promoted + 2) for layer in model.layers)
    held = min(STACK_BYTES / whole, 1.0) if 0 < whole < HELD_SHARE * STACK_BYTES else 0.0
    return made * (held + (1 - held) * batches)


@dataclass(frozen=True)
class StageForecast:
    """What a stage is expected to take: seconds, bytes at its peak, and settings that make them fewer.

    ``bytes``: 0 where they are not known.
    """

    seconds: float
    bytes: int
    fewer: tuple[str, ...] = ()


def stage_seconds(
    recipe: Recipe, model: ModelWork, speed: Speed, rounders: int = 0
) -> dict[str, float]:
    """Return the seconds of every stage after export; ``rounders``: processes that round at once; 0: this one alone."""
    work, pace, layers = works(recipe, model), speed.pace, len(model.layers)
    written = pace * (
        WRITTEN_LAYER * layers + WRITTEN_WEIGHT * sum(layer.weights for layer in model.layers)
    )
    found = {
        "calibrate": _calls(work["calibrate"], model, speed)
        + pace * OBSERVED_END * len(model.size.patches),
        "candidates": _candidates(recipe, model, speed, rounders),
        "measure": _measure(recipe, model, speed),
        "allocate": pace * SOLVED_PAIR * model.pairs,
        "quantize": written,
        "controls": written * model.controls if recipe.evaluate.controls else 0.0,
        "engine": pace * (ENGINE + ENGINE_LAYER * layers) if _builds(recipe, model) else 0.0,
        "evaluate": _calls(work["evaluate"], model, speed) + pace * EVALUATION,
        "report": pace * (REPORT + REPORTED_LAYER * layers),
    }
    if "correction" in work:
        found["correction"] = _calls(work["correction"], model, speed)
    if recipe.recover.steps:
        found["recover"] = _recover(recipe, model, speed)
    return found


def _builds(recipe: Recipe, model: ModelWork) -> bool:
    return recipe.engine.build and model.builds


def _calls(work: Work, model: ModelWork, speed: Speed) -> float:
    """Return the seconds of a stage's calls in ONNX Runtime, and of what goes with them."""
    row, pace, layers = speed.row(work.batch), speed.pace, len(model.layers)
    values = sum(layer.inputs for layer in model.layers)
    activations = len(model.size.patches)
    observing = pace * (OBSERVED_CALL * activations + OBSERVED_VALUE * values)
    quantized = QUANTIZED * row + pace * QUANTIZED_LAYER * layers / work.batch
    return (
        work.floats * row
        + work.observed * (row + observing)
        + work.quantized * quantized
        + work.sessions * speed.opening
        + work.images * (speed.decoding + pace * COMPARED)
    )


def _adjoints(work: Work, model: ModelWork, speed: Speed) -> float:
    """Return the seconds of evaluations in torch with their passes back, the projections aside."""
    return work.adjoints * (speed.forward + work.directions * speed.back)


def _candidates(recipe: Recipe, model: ModelWork, speed: Speed, rounders: int) -> float:
    work, pace = works(recipe, model)["candidates"], speed.pace
    found = pace * sum(
        rounding_seconds(layer, recipe) / (rounders or _side_by_side(layer, recipe))
        for layer in model.layers
    )
    found += work.sessions * speed.opening
    if work.gathered:
        jobs, batches = len(model.size.patches), work.gathered / work.batch
        rows = sum(
            max(recipe.quantize.hessian_rows, 2 * p.columns) * p.group * p.columns
            for p in model.size.patches
        )
        found += work.gathered * speed.row(work.batch)
        found += pace * (GATHERED_BATCH * batches * jobs / max(work.sessions, 1))
        found += pace * GATHERED_VALUE * rows + speed.product * hessian_products(recipe, model)
    if work.adjoints:
        products = sum(layer.weights * layer.positions for layer in model.layers)
        found += _adjoints(work, model, speed) + TORCH * pace
        found += work.adjoints * (
            products * speed.product + pace * SALIENT_LAYER * len(model.layers)
        )
    return found


def _measure(recipe: Recipe, model: ModelWork, speed: Speed) -> float:
    work, pace = works(recipe, model)["measure"], speed.pace
    if work.adjoints and not speed.forward:
        # What torch cannot evaluate is measured by gains.
        work = gain_work(recipe, model)
    if not work.adjoints:
        forms = sum(layer.forms * layer.weights * layer.positions for layer in model.layers)
        local = work.floats / max(len(model.layers), 1) * forms * speed.product
        return _calls(work, model, speed) + local + pace * TORCH
    batches = work.adjoints / probe_batch(recipe, model)
    ranges = sum(layer.ranges for layer in model.layers)
    rounded = sum(layer.ranges * layer.inputs for layer in model.layers)
    products = sum(_projected_products(layer, work.directions) for layer in model.layers)
    # Trajectories are sampled in torch before anything goes back through them.
    found = _adjoints(work, model, speed) + work.floats * speed.forward + pace * TORCH
    found += pace * batches * (PROJECTED_BATCH * len(model.layers) + ROUNDED_BATCH * ranges)
    found += pace * STACKED * _stacked(model, batches)
    return found + work.adjoints * (products * speed.product + pace * ROUNDED_VALUE * rounded)


def _recover(recipe: Recipe, model: ModelWork, speed: Speed) -> float:
    """Return the seconds of training: updates, and the trajectories that each round records anew."""
    section = recipe.recover
    update = section.batch_size * (speed.forward + TRAINED_BACK * speed.back)
    rounds = -(-section.steps // section.round_steps)
    recorded = (rounds * section.trajectories + section.held_out) * recipe.calibrate.steps
    return section.steps * update + recorded * model.guided * speed.row(section.batch_size)


@dataclass(frozen=True)
class Forecast:
    """What the stages that are to be made will take, in their order."""

    stages: Mapping[str, StageForecast]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def peak_bytes(self) -> int:
        """The most that a stage holds."""
        return max((stage.bytes for stage in self.stages.values()), default=0)

    def lines(self) -> list[str]:
        """Return the table, in 80 columns."""
        rows = [f"{'forecast':<10} {'time':>8} {'memory':>9}  fewer or smaller"]
        for name, stage in self.stages.items():
            rows.append(_row(name, stage.seconds, stage.bytes, ", ".join(stage.fewer)))
        rows.append(_row("together", self.seconds, self.peak_bytes, "as timed on this machine"))
        return [row.rstrip() for row in (*rows, *self.notes)]

    def values(self) -> dict[str, Any]:
        """Return the same for scripts: seconds and bytes."""
        stages = {
            name: {
                "seconds": round(s.seconds, 1),
                "memory_bytes": s.bytes or None,
                "fewer": list(s.fewer),
            }
            for name, s in self.stages.items()
        }
        return {
            "stages": stages,
            "seconds": round(self.seconds, 1),
            "memory_bytes": self.peak_bytes,
            "notes": list(self.notes),
        }


def _side_by_side(layer: LayerWork, recipe: Recipe) -> int:
    """Return how many threads of this process round layers like ``layer``."""
    if computing_on().torch is not None:
        return 1
    width = max(block_widths(layer.columns, layer.groups, recipe.quantize))
    size = rounding_bytes(layer.weights, width, layer.forms, recipe.quantize.rounding != "nearest")
    threads = rounding_threads(threads_here().blas)
    # Parts of a layer are rounded side by side where layers are not.
    return min(threads, max(1, TOGETHER_BYTES // max(size, 1)) * lanes_of(size, threads))


def _row(name: str, seconds: float, size: int, rest: str) -> str:
    memory = f"{size / 1e9:.1f} GB" if size else "-"
    return f"{name:<10} {duration_text(seconds):>8} {memory:>9}  {rest}"


def forecast(run: Run, model: ModelWork, speed: Speed, stages: Iterable[str]) -> Forecast:
    """Return what making ``stages`` will take, by the recipe of ``run``."""
    crew = run.crew
    rounders = min(crew.workers, physical_cores()) if isinstance(crew, Processes) else 0
    stages = list(stages)
    if "calibrate" in stages:
        model = replace(model, kept=kept_counts(run))
    elif "measure" in stages and "candidates" not in stages:
        model = replace(model, probed=kept_parts(run))
    if "evaluate" in stages and (run.base / SAMPLES).is_dir():
        model = replace(model, sampled=kept_images(run, "controls" not in stages))
    seconds = stage_seconds(run.recipe, model, speed, rounders)
    # Libraries that earlier stages have loaded stay.
    held = memory.held_memory()
    found = {}
    for name in (stage for stage in stages if stage in seconds):
        # Training's depends on the plan.
        taken = None if name == "recover" else _memory(run, model, name)
        size = taken.total + max(held - taken.code, 0) if taken else 0
        found[name] = StageForecast(seconds[name], size, _fewer(run.recipe, name))
    notes = []
    if model.spec.pipeline is not None:
        notes.append("what a pipeline computes besides its denoiser is not included")
    if not isinstance(crew, Alone):
        notes.append("workers are counted as faster for rounding only")
    return Forecast(found, tuple(notes))


def _fewer(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """Return the settings that make a stage shorter, but for those that are off."""
    off = {"evaluate.controls"} if not recipe.evaluate.controls else set()
    off |= {"engine.build"} if not recipe.engine.build else set()
    return tuple(name for name in FEWER.get(stage, ()) if name not in off)


def _memory(run: Run, model: ModelWork, stage: str) -> StageMemory:
    """Return the memory of a stage, when those before it are not made yet."""
    recipe = run.recipe
    if stage == "engine":
        weights = sum(layer.weights for layer in model.layers)
        whole = int(run.exported.facts["fp16_size_bytes"])
        size = recipe.budget.bytes(whole, weights) if _builds(recipe, model) else 0
        return estimate_engine(size, model.size.nodes)
    if stage == "correction":
        # A float and a quantized session, as evaluation has them.
        return stage_memory(run, "evaluate", recipe.calibrate.batch_size)
    return stage_memory(run, stage)


@dataclass
class Outlook:
    """What is left of a build: the forecast of its stages, corrected by what finished ones took."""

    expected: dict[str, float]
    clock: Callable[[], float] = time.monotonic
    taken: dict[str, float] = field(default_factory=dict)
    _started: tuple[str, float] = ("", 0.0)

    # Of a whole build's forecast: so much counts as seen to have taken what was expected, so that a
    # short first stage says little of the others (our choice).
    PRIOR = 0.1

    def start(self, stage: str) -> None:
        """A stage begins."""
        self._started = (stage, self.clock())

    def finish(self, stage: str, seconds: float) -> None:
        """A stage has ended."""
        self.taken[stage], self._started = seconds, ("", 0.0)

    def skip(self, stage: str) -> None:
        """A stage turns out to be current."""
        self.expected.pop(stage, None)

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        prior = self.PRIOR * sum(self.expected.values())
        seen = sum(self.expected.get(stage, 0.0) for stage in self.taken)
        known = sum(taken for stage, taken in self.taken.items() if stage in self.expected)
        ratio = (known + prior) / (seen + prior) if seen + prior else 1.0
        running, since = self._started
        gone = self.clock() - since if running else 0.0
        return sum(
            max(ratio * seconds - (gone if stage == running else 0.0), 0.0)
            for stage, seconds in self.expected.items()
            if stage not in self.taken
        )

    def text(self) -> str:
        """Return the same in words; empty where hardly anything is left."""
        left = self.left
        return f"{duration_text(left)} left in all" if left >= 1 else ""


@dataclass(frozen=True)
class Ahead:
    """What lies ahead of a run: its recipe with fitted counts, the forecast, and lines about both."""

    recipe: Recipe
    forecast: Forecast
    note: str

    def values(self) -> dict[str, Any]:
        """Return the forecast for scripts, with the counts it is of."""
        counts = {count.setting: get(self.recipe, count.setting) for count in COUNTS}
        effort = self.recipe.effort
        return {**self.forecast.values(), "effort": effort, "counts": counts, "note": self.note}

    @property
    def lines(self) -> list[str]:
        """Both for people, in 80 columns."""
        return [*textwrap.wrap(self.note, COLUMNS, subsequent_indent="  "), *self.forecast.lines()]


def look_ahead(run: Run, stages: Mapping[str, Stage], coming: Iterable[str]) -> Ahead:
    """Fit the recipe's counts and forecast what of the stages ``coming`` is to be made.

    ``stages``: all of them in order. Export must be current. Raises UsageError where the recipe's
    time is too short or a stage needs more memory than there is.
    """
    coming, model = list(coming), ModelWork.of(run)
    if not (run.path / FILE).is_file():
        # What is timed takes memory as the stages do, with the least counts.
        _check(replace(run, recipe=least(run.recipe)), stages, coming)
    speed = speed_of(run, model, lambda layer: rounding_seconds(layer, run.recipe))
    model = ModelWork.of(run, *run.later()) if run.coming else model
    names = [stage.name for stage in stages.values() if stage.applies(run.recipe)]

    def whole(recipe: Recipe) -> float:
        seconds = stage_seconds(recipe, model, speed)
        return sum(seconds.get(name, 0.0) for name in names)

    recipe, note = fitted(run.recipe, whole)
    run = replace(run, recipe=recipe)
    making = to_make(run, stages, coming)
    _check(run, stages, making)
    return Ahead(recipe, forecast(run, model, speed, making), note)


def _check(run: Run, stages: Mapping[str, Stage], names: Iterable[str]) -> None:
    """Refuse the first stage that needs more memory than there is. Raises UsageError."""
    for name in names:
        if name in CHECKED:
            check_memory(run, stages[name])


def to_make(run: Run, stages: Mapping[str, Stage], coming: Iterable[str]) -> list[str]:
    """Return which of ``coming`` are not current, or hang on one that is not."""
    found: list[str] = []
    for stage in (stages[name] for name in coming):
        if (
            stage.inputs is None
            or any(need in found for need in stage.needs)
            or run.folder.changed_fields(stage.name, stage.fields(run), outputs=False) != []
        ):
            found.append(stage.name)
    return found
