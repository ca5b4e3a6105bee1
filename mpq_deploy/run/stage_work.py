"""What each stage computes: calls of the model and sizes of layers, as they follow from the recipe.

In: an exported run. Out: per stage the ``Work`` that making it is. Nothing is timed and nothing is
computed here: the counts are those of the stages' own loops (``tests/run/test_forecast.py`` counts
both).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from mpq_deploy.calibrate.kept_observation import FIRST_PART
from mpq_deploy.calls.guidance import rows_per_step
from mpq_deploy.calls.sampler import keeps_samples_apart, make_sampler
from mpq_deploy.calls.script_calls import ScriptCalls
from mpq_deploy.calls.timesteps import kept_timesteps, sampled_steps
from mpq_deploy.calls.trajectories import has_forward_process
from mpq_deploy.engine.target import builder_present
from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.half import TIMESTEPS as HALF_TIMESTEPS
from mpq_deploy.evaluate.output_error import taken_turns
from mpq_deploy.evaluate.sequential import GROUP
from mpq_deploy.evaluate.variants import TIMED_CALLS, WARM_UP_CALLS
from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.candidates import choices_for
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.shapes import known_shapes
from mpq_deploy.rounding.candidate_store import wanted_schemes
from mpq_deploy.rounding.control_schemes import CONTROLS
from mpq_deploy.rounding.hessian import BATCH_SIZE as HESSIAN_BATCH
from mpq_deploy.rounding.hessian import block_widths
from mpq_deploy.rounding.rounder import LARGE_VARIANTS, LARGE_WEIGHTS
from mpq_deploy.rounding.salient_rows import SALIENCE_SAMPLES, SALIENCE_TIMESTEPS
from mpq_deploy.run.memory_model import ModelSize, hessian_groups
from mpq_deploy.run.stage_memory import hessian_room
from mpq_deploy.sensitivity.chosen_method import chosen_method
from mpq_deploy.sensitivity.gain import GAIN_SAMPLES
from mpq_deploy.sensitivity.methods import METHODS, ORM_CONTROLS
from mpq_deploy.stages.correction import CORRECTION_CALLS

if TYPE_CHECKING:
    from mpq_deploy.formats.scheme import Scheme
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.models.spec import DenoiserSpec
    from mpq_deploy.recipe import EvaluateSettings, Recipe
    from mpq_deploy.run.view import Run


@dataclass(frozen=True)
class LayerWork:
    """A layer as work: its weight is [``rows``, ``columns``] in ``groups``, applied at ``positions`` per call.

    ``inputs``: values that one call gives it; ``forms``: weights that are rounded, ``refined`` of
    them afterwards, ``promoted``: schemes that take channels from two of them; ``ranges``: ways in
    which its input is rounded; ``pairs``: schemes that it may take.
    """

    rows: int
    columns: int
    groups: int
    positions: int
    inputs: int
    forms: int
    refined: int
    promoted: int
    ranges: int
    pairs: int

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Work:
    """Calls of the model in a stage: one row of a batch each.

    ``floats``: of the float graph in ONNX Runtime, ``observed`` of them while activations are
    observed, ``gathered`` while rows are gathered; ``quantized``: of quantized graphs; ``batch``:
    rows that run at once; ``adjoints``: evaluations in torch, ``directions`` passes back each;
    ``sessions``: graphs that are opened; ``images``: decoded and compared.
    """

    floats: int = 0
    observed: int = 0
    gathered: int = 0
    quantized: int = 0
    batch: int = 1
    adjoints: int = 0
    directions: int = 0
    sessions: int = 0
    images: int = 0


@dataclass(frozen=True)
class ModelWork:
    """What work depends on that no count changes: the model's ``size``, its ``layers``, its ``controls``.

    ``guided``: rows of the model per sample and step; ``available``: calls to calibrate on and to
    compare on, where somebody recorded them or a component has inputs of its own; None: any number.
    ``builds``: whether the target's engine can be built here; ``kept``: trajectories that were run before,
    and calls of each timestep that were observed before; ``probed``: timesteps, or trajectories; ``sampled``: images of
    the float model, and controls, that were sampled before (``forecast`` sets them); ``shared_by``: as in
    ``chosen_method``; ``free``: bytes for Hessians beyond the recipe's limit (``HessianPlan.of``).
    """

    spec: DenoiserSpec
    size: ModelSize
    layers: tuple[LayerWork, ...]
    controls: int
    guided: int
    available: tuple[int, int] | None
    builds: bool = True
    kept: tuple[int, int] = (0, 0)
    probed: int = 0
    sampled: tuple[int, int] = (0, 0)
    own_pairs: int = 0
    shared_by: str = ""
    free: int = 0
    _steps: dict[tuple[int, str], int] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, run: Run, *later: Run) -> ModelWork:
        """Read the exported model of ``run``; targets ``later`` are rounded for and measured with it."""
        exported, spec = run.exported, run.exported.spec
        _, shapes = known_shapes(exported.path, spec.input_shapes())
        own, *others = (
            list(map(_Choices(one), one.exported.graph.layers)) for one in (run, *later)
        )
        layers = [
            _layer_work(layer, [*{s.name: s for some in schemes for s in some}.values()], shapes)
            for layer, *schemes in zip(exported.graph.layers, own, *others, strict=True)
        ]
        controls = [
            control.needs
            for control in CONTROLS.values()
            if not control.needs
            or any(
                not run.target.refusal(layer, SCHEMES[name])
                for name in control.needs
                for layer in {_kind(layer): layer for layer in exported.graph.layers}.values()
            )
        ]
        return cls(
            spec,
            exported.size,
            tuple(layers),
            len(controls),
            rows_per_step(spec),
            _available(run),
            run.target.builder != "none" and builder_present(run.target),
            own_pairs=sum(1 + len(schemes) for schemes in own),
            shared_by=run.shared_by,
            free=hessian_room(run),
        )

    @cached_property
    def pairs(self) -> int:
        """Pairs of a layer and a scheme that the plan chooses from."""
        return self.own_pairs or sum(layer.pairs for layer in self.layers)

    def steps(self, recipe: Recipe, wanted: int) -> int:
        """Return how many steps the sampler takes where ``wanted`` are asked for."""
        spec, kind = self.spec, recipe.evaluate.sampler
        if spec.timestep is None or spec.recorded:
            return 1 if spec.timestep is None else wanted
        if spec.pipeline is not None:
            from mpq_deploy.calls.pipeline_runs import STEPS

            # Its own scheduler's, unless its call says how many.
            wanted, kind = int(spec.pipeline.calls[0].get(STEPS, wanted)), "folder"
        if (wanted, kind) not in self._steps:
            try:
                count = len(make_sampler(spec.scheduler, wanted, 0, kind).timesteps)
            except UsageError:
                # Of pipelines that set their timesteps themselves.
                count = wanted
            self._steps[wanted, kind] = count
        return self._steps[wanted, kind]


def works(recipe: Recipe, model: ModelWork) -> dict[str, Work]:
    """Return the work of every stage that calls the model, by name."""
    found = {
        "calibrate": _calibrate(recipe, model),
        "candidates": _candidates(recipe, model),
        "measure": _measure(recipe, model),
        "evaluate": _evaluate(recipe, model),
    }
    if recipe.evaluate.correction != "none":
        calls = min(CORRECTION_CALLS, split_calls(recipe, model)[1])
        count = calls * timesteps(recipe, model)
        batch = recipe.calibrate.batch_size
        found["correction"] = Work(floats=count, quantized=count, batch=batch, sessions=2)
    return found


def timesteps(recipe: Recipe, model: ModelWork) -> int:
    """Return how many timesteps are recorded."""
    if model.spec.timestep is None:
        return 1
    wanted = recipe.calibrate.timesteps
    return wanted if model.spec.recorded else min(wanted, recipe.calibrate.steps)


def recorded_calls(recipe: Recipe, model: ModelWork) -> int:
    """Return the calls that are recorded at each timestep."""
    samples = recipe.calibrate.samples
    if model.available is not None:
        samples = min(samples, model.available[0])
    return samples * model.guided


def split_calls(recipe: Recipe, model: ModelWork) -> tuple[int, int]:
    """Return the calls of a timestep that weights are rounded on, and those measured on."""
    recorded = recorded_calls(recipe, model)
    rest = recorded - recipe.measure.samples
    return (recorded, recorded) if rest < recorded / 5 else (rest, recipe.measure.samples)


def _calibrate(recipe: Recipe, model: ModelWork) -> Work:
    section, steps = recipe.calibrate, timesteps(recipe, model)
    recorded = recorded_calls(recipe, model)
    seen = min(section.observed, recorded)
    parts = 1 + ((seen - 1) // FIRST_PART).bit_length()
    observed = max(seen - model.kept[1], 0) * steps
    sampled = 0
    if not model.spec.recorded:
        total = model.steps(recipe, section.steps)
        # Trajectories end with the last step that is recorded; pipelines go to their end.
        kept = kept_timesteps(total, steps)
        last = int(sampled_steps(total, kept)[-1]) + 1 if model.spec.sampled else total
        sampled = max(recorded - model.kept[0] * model.guided, 0) * last
    # One call of each timestep is looked at for values beyond FP16, and compared with a script's.
    looked = steps * (1 + model.spec.recorded)
    floats = sampled + looked
    return Work(floats=floats, observed=observed, batch=section.batch_size, sessions=2 + parts)


def _candidates(recipe: Recipe, model: ModelWork) -> Work:
    section, steps = recipe.quantize, timesteps(recipe, model)
    rounded, _ = split_calls(recipe, model)
    work = Work(batch=HESSIAN_BATCH)
    if section.rounding != "nearest":
        draws = section.noise_draws if has_forward_process(model.spec) else 0
        groups = hessian_groups(model.size, recipe, model.free)
        gathered = groups * steps * rounded * max(draws, 1)
        work = replace(work, gathered=gathered, sessions=groups)
    promoting = any(layer.promoted for layer in model.layers) and has_torch()
    if promoting and section.salience == "probe":
        calls = min(steps, SALIENCE_TIMESTEPS) * min(rounded, SALIENCE_SAMPLES)
        work = replace(work, adjoints=calls, directions=1)
    return work


def _measure(recipe: Recipe, model: ModelWork) -> Work:
    section, (_, held_out) = recipe.measure, split_calls(recipe, model)
    chosen = chosen_method(recipe, model.spec, model.shared_by)
    calls, method = min(chosen.calls, section.samples, held_out), METHODS[chosen.name]
    count = max(min(section.timesteps, timesteps(recipe, model)) - model.probed, 0) * calls
    batch = min(section.batch_size, calls)
    if method.images:
        left = max(calls - model.probed, 0)
        count = model.steps(recipe, recipe.calibrate.steps) * model.guided * left
    if method.probes:
        floats = count if method.images else 0
        directions = section.replace(method=chosen.name).directions
        return Work(floats=floats, adjoints=count, directions=directions, batch=batch)
    if section.method == "exhaustive":
        return Work(floats=count * (1 + model.pairs), batch=batch, sessions=1)
    if section.method == "gain":
        return replace(gain_work(recipe, model), batch=batch)
    local = section.method in ("local_error", "orm")
    return Work(floats=count, batch=batch, sessions=1) if local else Work()


def gain_work(recipe: Recipe, model: ModelWork) -> Work:
    """Return the work of measuring gains: a call for each layer, and local errors beside them."""
    section, (_, held_out) = recipe.measure, split_calls(recipe, model)
    steps, calls = min(section.timesteps, timesteps(recipe, model)), min(section.calls, held_out)
    noisy = steps * min(calls, GAIN_SAMPLES) * (1 + len(model.layers))
    return Work(floats=steps * calls + noisy, sessions=2)


def _evaluate(recipe: Recipe, model: ModelWork) -> Work:
    section, spec = recipe.evaluate, model.spec
    samples = (
        section.samples if model.available is None else min(section.samples, model.available[1])
    )
    variants = 1 + (recipe.evaluate.correction != "none") + (recipe.recover.steps > 0)
    controls = model.controls + (len(ORM_CONTROLS) if recipe.measure.method == "orm" else 0)
    controls = max(controls * section.controls - model.sampled[1], 0)
    steps = model.steps(recipe, section.steps)
    compared = min(section.timesteps, steps)
    turns = compared * taken_turns(samples * model.guided, compared, section.calls).shape[1]
    sampled = samples * model.guided * steps
    first = sampled * max(samples - model.sampled[0], 0) // samples
    if spec.recorded:
        # A script's calls are run at the timesteps that are compared, images are those of the last.
        first, sampled = samples * compared, samples
    # Of a control as many images as settle most comparisons, and its share of the calls.
    shown = images_of_control(section, spec, samples)
    shares = -(-turns // compared * shown // samples) * compared
    half, timed = min(HALF_TIMESTEPS, timesteps(recipe, model)), WARM_UP_CALLS + TIMED_CALLS
    return Work(
        floats=first + 2 * half + timed,
        quantized=variants * (sampled + turns)
        + controls * (sampled * shown // samples + shares)
        + 2 * half
        + timed,
        batch=section.batch_size * (1 if spec.recorded else model.guided),
        sessions=variants + controls + 7,
        images=samples * (1 + variants) + shown * controls,
    )


def images_of_control(section: EvaluateSettings, spec: DenoiserSpec, samples: int) -> int:
    """Return the images of a control in the first of the groups that are compared (``evaluate.sequential``)."""
    if section.controls_images == "all" or spec.recorded:
        return samples
    if spec.pipeline is None:
        sampler = make_sampler(spec.scheduler, section.steps, section.seed, section.sampler)
        if not keeps_samples_apart(sampler):
            return samples
    return min(GROUP, samples)


def has_torch() -> bool:
    """Whether graphs can be evaluated in torch."""
    return importlib.util.find_spec("torch") is not None


def _kind(layer: Layer) -> tuple[Any, ...]:
    window = (layer.window, layer.no_product)
    return (layer.op, layer.weight_shape, layer.out_axis, layer.group, len(layer.uses), window)


class _Choices:
    """The schemes that a layer may take beside FP16; what its inputs' values decide counts as allowed."""

    def __init__(self, run: Run) -> None:
        self._target, self._schemes = run.target, wanted_schemes(run.recipe)
        self._by_timestep = run.exported.spec.timestep is not None
        self._known: dict[tuple[Any, ...], list[Scheme]] = {}

    def __call__(self, layer: Layer) -> list[Scheme]:
        # Layers alike in all but their name may take the same schemes.
        kind = _kind(layer)
        if kind not in self._known:
            found = choices_for(layer, self._schemes, self._refusal).schemes
            self._known[kind] = [scheme for scheme in found if scheme.quantized]
        return self._known[kind]

    def _refusal(self, layer: Layer, scheme: Scheme) -> str:
        if scheme.range.by_timestep and not self._by_timestep:
            return "no timestep"
        amount = getattr(scheme.branch, "amount", None) if scheme.branch.rescales else None
        if layer.weights > LARGE_WEIGHTS and amount in TENTHS[LARGE_VARIANTS:]:
            return "of a layer this large, some exponents are left out"
        return self._target.refusal(layer, scheme)


def _layer_work(
    layer: Layer, schemes: list[Scheme], shapes: dict[str, tuple[int, ...]]
) -> LayerWork:
    forms = {s.weight_form: s for s in schemes if not s.branch.promotes}
    outputs = sum(prod(shapes.get(use.output, ())) for use in layer.uses)
    return LayerWork(
        layer.out_channels,
        layer.reduction,
        layer.group,
        outputs // max(layer.out_channels, 1),
        sum(prod(shapes.get(use.input, ())) for use in layer.uses),
        len(forms),
        sum(getattr(scheme.weight, "refined", False) for scheme in forms.values()),
        sum(1 for scheme in schemes if scheme.branch.promotes),
        len({scheme.activation_form for scheme in schemes if scheme.activation_form}),
        1 + len(schemes),
    )


def _available(run: Run) -> tuple[int, int] | None:
    """Return how many calls there are to calibrate on and to compare on; None: as many as wanted."""
    model, recipe = run.exported.model, run.recipe
    if model.spec.recorded and model.calls is not None:
        parts = ScriptCalls.open(model.calls).parts(recipe.calibrate.timesteps)
        return parts[0].count, parts[1].count
    rows = model.spec.calibration_rows
    if model.spec.timestep is None and rows is not None:
        return rows, len(model.conditions[model.spec.sample.name]) - rows
    return None


def hessian_products(recipe: Recipe, model: ModelWork) -> float:
    """Return the multiplications that X^T X takes for all Hessians: half of a product's, by symmetry."""
    if recipe.quantize.rounding == "nearest":
        return 0.0
    total = 0.0
    for patches in model.size.patches:
        width = max(block_widths(patches.columns, patches.group, recipe.quantize))
        rows = max(recipe.quantize.hessian_rows, 2 * width)
        total += rows * patches.group * patches.columns * width / 2
    return total


__all__ = ["LayerWork", "ModelWork", "Work", "hessian_products", "works"]
