"""What each stage reads (``INPUTS``: digests and settings) and how it is made (``MAKERS``), for the pipeline.

Every maker gets the pipeline and an empty folder, fills the folder, and returns a few words for the log.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy import __version__
from mpq_deploy.allocate import (
    LayerChoice,
    PrecisionPlan,
    Problem,
    allocate_with_fee,
    budget_in_bytes,
    kernel_charge,
    plan_bytes,
    protected_schemes,
)
from mpq_deploy.artefacts import Fields, canonical_json, file_digest
from mpq_deploy.calibrate.stats import CalibrationSet, CalibrationStats, dealt
from mpq_deploy.denoisers.spec import Array
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import Target, load_target
from mpq_deploy.engine.trtexec import find_trtexec
from mpq_deploy.errors import InfeasibleBudgetError, MissingDependencyError, MpqError, UsageError
from mpq_deploy.graph.layers import Layer, LayerGraph, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.passes.branches import bias_refusal
from mpq_deploy.graph.passes.quantize_layers import LayerRewrite, weight_array
from mpq_deploy.graph.write import DEPLOYED, SIMULATED, fp16_bytes, write_quantized
from mpq_deploy.precision.branches import row_kurtosis
from mpq_deploy.precision.candidates import (
    Choices,
    LayerCandidates,
    choices_for,
    load_candidates,
    load_choices,
    round_candidates,
    save_candidates,
    weight_matrix,
    with_promoted_rows,
)
from mpq_deploy.precision.deployed import FP16_BYTES, weight_bytes
from mpq_deploy.precision.scheme import FP16, SCHEMES, Scheme, branches_of, schemes_named
from mpq_deploy.refine import CrossTerms, Solved, allocate_with_cross_terms
from mpq_deploy.runtime.correction import FILE as CORRECTION
from mpq_deploy.runtime.correction import FORMAT as CORRECTION_FORMAT
from mpq_deploy.runtime.correction import Correction, load_correction
from mpq_deploy.sensitivity.table import SensitivityTable

if TYPE_CHECKING:
    from mpq_deploy.calibrate.hessian import Hessian
    from mpq_deploy.evaluate.result import Evaluation
    from mpq_deploy.pipeline import Pipeline
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.sensitivity.feeds import MeasureOptions

RTX = "tensorrt_rtx"
LATENCY = "latency.json"
# Layer number -> its output channels, most salient first, beside the candidates' files.
ROW_ORDERS = "row-orders.npz"
# Ranking channels needs fewer calls than measuring schemes.
SALIENCE_TIMESTEPS, SALIENCE_SAMPLES = 8, 12
# Raised with every change of what calibration leaves behind.
CALIBRATION_FORMAT = 2
# Calls that the correction is fitted on.
CORRECTION_CALLS = 48
# Raised with every change of what the candidates' files hold, so that older run folders make theirs again.
CANDIDATES_FORMAT = 3
# As above, for evaluation.json: 2 has the PSNR as a mean over images, and the pooled one.
EVALUATION_FORMAT = 2

# Controls: what a user would get without this tool, at the same rounding: one scheme for every layer that may
# take it (FP16 for the others).
CONTROLS = {"int8": ("w8a8", "w8a16"), "int4": ("w4a16-b32", "w4a16-b64", "w4a16-b128")}

# What orm is reported beside, at the same budget: the same programme without any ORM.
ORM_CONTROLS = ("size-only", "random")


# The variant that samples the plan's graph with PTQD's correction in front of the sampler.
CORRECTED = "ours+ptqd"


def version_of(*packages: str) -> Fields:
    """Return ``version.NAME`` for each installed package, and this tool's own version."""
    from importlib.metadata import PackageNotFoundError, version

    found: Fields = {"version.mpq-deploy": __version__}
    for package in packages:
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            found[f"version.{package}"] = None
    return found


def settings(section: Any, prefix: str) -> Fields:
    """Return a recipe section as flat fields ``recipe.PREFIX.KEY``."""
    return {f"recipe.{prefix}.{key}": value for key, value in section.model_dump(mode="json").items()}


# --- inputs ---------------------------------------------------------------------------------------------------


def _export_inputs(pipeline: Pipeline) -> Fields:
    from mpq_deploy.denoisers.open import source_files

    recipe = pipeline.recipe
    files = source_files(recipe.model, Path(recipe.description) if recipe.description else None)
    fields: Fields = {
        "recipe.model": recipe.model,
        "recipe.guidance_scale": recipe.guidance_scale,
        "model.files": {name: file_digest(path) for name, path in files},
    }
    for name in ("conditions", "scheduler", "prompts", "description"):
        given = getattr(recipe, name)
        fields[f"recipe.{name}"] = path_digest(Path(given)) if given else None
    return {**fields, **version_of("torch", "diffusers", "onnx", "onnxscript", "onnx-ir")}


def weighs_bits(recipe: Recipe) -> bool:
    """Whether the recipe's method weighs bits by importance: orm, or one of its controls."""
    return recipe.measure.method in ("orm", *ORM_CONTROLS)


def path_digest(path: Path) -> str:
    """Digest of a file, or of a folder's files by name. Raises UsageError when there is none."""
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return canonical_json({p.name: file_digest(p) for p in sorted(path.iterdir()) if p.is_file()})
    raise UsageError(f"There is no file {path}.", "Check the path.")


def _calibrate_inputs(pipeline: Pipeline) -> Fields:
    return {
        "export": pipeline.digest("export"),
        "calibration.format": CALIBRATION_FORMAT,
        **settings(pipeline.recipe.calibrate, "calibrate"),
        "recipe.evaluate.sampler": pipeline.recipe.evaluate.sampler,
        **version_of("onnxruntime", "numpy"),
    }


def _candidates_inputs(pipeline: Pipeline) -> Fields:
    target = load_target(pipeline.recipe.target)
    return {
        "export": pipeline.digest("export"),
        "calibrate": pipeline.digest("calibrate"),
        "recipe.allocate.schemes": list(pipeline.recipe.allocate.schemes),
        "recipe.allocate.branches": list(pipeline.recipe.allocate.branches),
        "recipe.measure.samples": pipeline.recipe.measure.samples,
        "candidates.format": CANDIDATES_FORMAT,
        "target.schemes": target.model_dump(mode="json", include={"schemes", "branches", "rules"}),
        **settings(pipeline.recipe.quantize, "quantize"),
        **version_of("onnxruntime", "numpy", "torch"),
    }


def _measure_inputs(pipeline: Pipeline) -> Fields:
    section = pipeline.recipe.measure
    fields = settings(section, "measure")
    adaptive = section.sampling == "adaptive"
    if not adaptive:
        del fields["recipe.measure.coarse_timesteps"]
    # What orm is told concerns nobody else: other methods stay as they are.
    orm = fields.pop("recipe.measure.orm")
    if adaptive or weighs_bits(pipeline.recipe):
        fields.update({f"recipe.measure.orm.{key}": value for key, value in orm.items()})
    return {
        **{name: pipeline.digest(name) for name in ("export", "calibrate", "candidates")},
        **fields,
        **version_of("torch", "onnxruntime", "numpy", "highspy"),
    }


def _allocate_inputs(pipeline: Pipeline) -> Fields:
    return {
        **{name: pipeline.digest(name) for name in ("export", "candidates", "measure")},
        "recipe.budget": pipeline.recipe.budget,
        "target.protected": list(load_target(pipeline.recipe.target).protected),
        **settings(pipeline.recipe.allocate, "allocate"),
        **version_of("highspy", "numpy"),
    }


def _quantize_inputs(pipeline: Pipeline) -> Fields:
    return {
        **{name: pipeline.digest(name) for name in ("export", "calibrate", "candidates", "allocate")},
        **version_of("onnx", "onnx-ir", "numpy"),
    }


def _controls_inputs(pipeline: Pipeline) -> Fields:
    # Not the plan: another budget keeps the controls. Those of orm are plans of the same budget.
    like_the_plan = _allocate_inputs(pipeline) if pipeline.recipe.measure.method == "orm" else {}
    return {
        **like_the_plan,
        **{name: pipeline.digest(name) for name in ("export", "calibrate", "candidates")},
        "recipe.evaluate.controls": pipeline.recipe.evaluate.controls,
        **version_of("onnx", "onnx-ir", "numpy"),
    }


def _correction_inputs(pipeline: Pipeline) -> Fields:
    return {
        **{name: pipeline.digest(name) for name in ("export", "calibrate", "quantize")},
        "correction.format": CORRECTION_FORMAT,
        "recipe.evaluate.correction_bias": pipeline.recipe.evaluate.correction_bias,
        "recipe.calibrate.batch_size": pipeline.recipe.calibrate.batch_size,
        "recipe.measure.samples": pipeline.recipe.measure.samples,
        **version_of("onnxruntime", "numpy"),
    }


def _engine_inputs(pipeline: Pipeline) -> Fields:
    target = load_target(pipeline.recipe.target)
    return {
        "quantize": pipeline.digest("quantize"),
        "target": target.model_dump(mode="json"),
        **settings(pipeline.recipe.engine, "engine"),
        **version_of("tensorrt-rtx", "tensorrt"),
    }


def _evaluate_inputs(pipeline: Pipeline) -> Fields:
    return {
        "evaluation.format": EVALUATION_FORMAT,
        **{name: pipeline.digest(name) for name in ("export", "quantize", "controls")},
        "correction": None if pipeline.recipe.evaluate.correction == "none" else pipeline.digest("correction"),
        **settings(pipeline.recipe.evaluate, "evaluate"),
        "recipe.calibrate.seed": pipeline.recipe.calibrate.seed,
        **version_of("onnxruntime", "numpy"),
    }


# --- makers ---------------------------------------------------------------------------------------------------


def _make_export(pipeline: Pipeline, folder: Path) -> str:
    from mpq_deploy.denoisers.export import export_denoiser
    from mpq_deploy.denoisers.open import open_denoiser

    recipe = pipeline.recipe
    denoiser = open_denoiser(
        recipe.model,
        conditions=Path(recipe.conditions) if recipe.conditions else None,
        scheduler=Path(recipe.scheduler) if recipe.scheduler else None,
        prompts=Path(recipe.prompts) if recipe.prompts else None,
        description=Path(recipe.description) if recipe.description else None,
        guidance_scale=recipe.guidance_scale,
        talk=pipeline.talk,
    )
    report = export_denoiser(denoiser, folder, pipeline.talk)
    graph = layer_graph(load_model(folder / "model.onnx"))
    if not graph.layers:
        raise UsageError(
            f"{recipe.model} has no layer to quantize: no Conv, Gemm or MatMul with a constant weight.",
            "Is it a denoiser?",
        )
    spec = denoiser.spec
    size = fp16_bytes(load_model(folder / "model.onnx"), spec.timestep.name, spec.sample.name)
    facts = {
        "fp16_size_bytes": size,
        "layers": len(graph.layers),
        "max_relative_error": report.max_relative_error,
        "notes": list(report.notes),
    }
    (folder / "facts.json").write_text(canonical_json(facts))
    return f"{len(graph.layers)} layers, {size / 1e6:.2f} MB in FP16, max error {report.max_relative_error:.1e}"


def _make_calibrate(pipeline: Pipeline, folder: Path) -> str:
    from mpq_deploy.calibrate.calibrate import calibrate
    from mpq_deploy.calibrate.options import CalibrationOptions

    section = pipeline.recipe.calibrate
    options = CalibrationOptions(
        timesteps=section.timesteps,
        samples=section.samples,
        observed=section.observed,
        steps=section.steps,
        batch_size=section.batch_size,
        seed=section.seed,
        scale_method=section.scale,
        percentile=section.percentile,
        reservoir=section.reservoir,
        sampler=pipeline.recipe.evaluate.sampler,
    )
    exported = Exported(pipeline)
    inputs, stats = calibrate(
        exported.path,
        exported.graph,
        exported.spec,
        exported.conditions,
        options,
        pipeline.talk,
        scratch=pipeline.run.scratch(),
    )
    inputs.save(folder / "inputs.npz")
    stats.save(folder / "stats.npz")
    return f"{len(inputs.timesteps)} timesteps x {len(inputs.rows)} calls, {len(stats.activations)} activations"


class Exported:
    """The export stage, opened: graph, specification, conditions."""

    def __init__(self, pipeline: Pipeline) -> None:
        from mpq_deploy.denoisers.export import load_exported

        self.folder = pipeline.folder("export")
        exported = load_exported(self.folder)
        self.path = exported.model
        self.spec = exported.spec
        self.conditions: dict[str, Array] = dict(exported.conditions.arrays)
        self.facts: dict[str, Any] = json.loads((self.folder / "facts.json").read_text())
        self.graph: LayerGraph = layer_graph(load_model(self.path))


def load_calibration(pipeline: Pipeline) -> tuple[CalibrationSet, CalibrationStats]:
    """Read the calibrate stage."""
    folder = pipeline.folder("calibrate")
    return CalibrationSet.load(folder / "inputs.npz"), CalibrationStats.load(folder / "stats.npz")


def _make_candidates(pipeline: Pipeline, folder: Path) -> str:
    exported = Exported(pipeline)
    target = load_target(pipeline.recipe.target)
    wanted = wanted_schemes(pipeline.recipe)
    section = pipeline.recipe.quantize

    def refusal(layer: Layer, scheme: Scheme) -> str:
        reason = target.refusal(layer, scheme)
        return reason or (bias_refusal(exported.graph.model, layer) if scheme.branch else "")

    numbers = {layer.name: number for number, layer in enumerate(exported.graph.layers)}
    _, stats = load_calibration(pipeline)
    for moments in _moments(pipeline, exported):
        layer = moments.layer
        candidates = round_candidates(
            layer,
            choices_for(layer, wanted, refusal),
            weight_matrix(layer, weight_array(exported.graph.model, layer)),
            moments.blocks,
            widths=moments.widths,
            gptq=section.rounding == "gptq",
            damping=section.damping,
            refinements=section.refinements,
            # The controls are what they say whatever the recipe allows the plan.
            outliers=stats.activations[layer.inputs[0]].outliers,
            also=tuple(s for names in CONTROLS.values() if (s := control_scheme(layer, names, target)).weight),
        )
        save_candidates(candidates, folder / f"{numbers[layer.name]:05d}.safetensors")
    orders, how = _salient_first(pipeline, exported, folder)
    np.savez(folder / ROW_ORDERS, **{str(numbers[name]): order for name, order in orders.items()})  # type: ignore[arg-type]
    return f"{len(wanted)} schemes, rounding {section.rounding}{how}"


def _salient_first(pipeline: Pipeline, exported: Exported, folder: Path) -> tuple[dict[str, Array], str]:
    """Order the output channels of layers with a rows branch, most salient first: layer name -> int32 [O]."""
    candidates = _read_candidates(folder, exported.graph)
    chosen = {n: c for n, c in candidates.items() if any(s.branch and s.branch.kind == "rows" for s in c.schemes)}
    if not chosen:
        return {}, ""
    inputs, stats = load_calibration(pipeline)
    method = pipeline.recipe.quantize.salience
    saliences = _probed_salience(pipeline, exported, chosen, inputs) if method == "probe" else None
    if saliences is None:
        saliences = {name: _kurtosis(c, stats) for name, c in chosen.items()}
        why = ", salient rows by kurtosis" + (" (torch cannot evaluate this graph)" if method == "probe" else "")
    else:
        why = ", salient rows by probes"
    # Equal saliences keep the channels' order, so equal inputs give equal plans.
    return {name: np.argsort(-s, kind="stable").astype(np.int32) for name, s in saliences.items()}, why


def _kurtosis(candidates: LayerCandidates, stats: CalibrationStats) -> Array:
    layer = candidates.layer
    amax = np.max([stats.activations[tensor].amax for tensor in layer.inputs], axis=0)
    return row_kurtosis(candidates.weight, np.repeat(amax, layer.reduction // len(amax)))


def _probed_salience(
    pipeline: Pipeline, exported: Exported, candidates: dict[str, LayerCandidates], inputs: CalibrationSet
) -> dict[str, Array] | None:
    """Return the channels' errors by probes on the calls that weights are rounded on; None where torch cannot."""
    if importlib.util.find_spec("torch") is None:
        return None
    from mpq_deploy.calibrate.timesteps import sampled_steps
    from mpq_deploy.sensitivity.feeds import MeasureOptions
    from mpq_deploy.sensitivity.salience import body_weights, channel_errors
    from mpq_deploy.sensitivity.torch_graph import UnsupportedOperator

    rounded_on, _ = inputs.split(pipeline.recipe.measure.samples)
    count = len(inputs.timesteps)
    some = rounded_on.at(sampled_steps(count, min(SALIENCE_TIMESTEPS, count)))
    options = MeasureOptions(probes=1, heldout_probes=0, samples=SALIENCE_SAMPLES)
    bodies = body_weights(candidates)
    try:
        return channel_errors(exported.graph, bodies, some, exported.conditions, exported.spec, options, pipeline.talk)
    except UnsupportedOperator:
        return None


def wanted_schemes(recipe: Recipe) -> tuple[Scheme, ...]:
    """Return the schemes that the solver may choose from by the recipe, branches included."""
    bodies = schemes_named(recipe.allocate.schemes)
    return (*bodies, *branches_of(bodies, recipe.allocate.branches))


def _moments(pipeline: Pipeline, exported: Exported) -> Iterator[Hessian]:
    """Yield the second moments of every layer's input: Hessians for GPTQ, else only their diagonals."""
    from mpq_deploy.calibrate.hessian import Hessian, HessianOptions, iterate_hessians
    from mpq_deploy.calibrate.trajectories import renoised

    section = pipeline.recipe.quantize
    inputs, stats = load_calibration(pipeline)
    rounded_on, _ = inputs.split(pipeline.recipe.measure.samples)
    if section.rounding == "nearest":
        for layer in exported.graph.layers:
            yield Hessian(layer, _diagonal_moments(layer, stats), (1,) * layer.reduction, 0)
        return
    rounded_on = renoised(rounded_on, exported.spec, section.noise_draws)
    options = HessianOptions(
        memory_cap_bytes=section.memory_mb * 2**20,
        min_rows=section.hessian_rows,
        max_width=section.hessian_width,
        max_calls=rounded_on.samples.shape[0] * rounded_on.samples.shape[1],
    )
    yield from iterate_hessians(
        exported.graph,
        rounded_on,
        exported.conditions,
        exported.spec,
        options,
        pipeline.talk,
        scratch=pipeline.run.scratch(),
    )


def _diagonal_moments(layer: Layer, stats: CalibrationStats) -> Array:
    """Second moments of each input channel, as a stack of 1x1 blocks [group * K, 1, 1]."""
    by_channel = sum(stats.activations[tensor].second_moment for tensor in layer.inputs)
    channels = np.asarray(by_channel).reshape(layer.group, -1)
    return np.repeat(channels, layer.reduction // channels.shape[1], axis=1).reshape(-1, 1, 1)


def candidates_of(pipeline: Pipeline, graph: LayerGraph) -> dict[str, LayerCandidates]:
    """Read the candidates of every layer, by layer name, with the rows that branches promote."""
    folder = pipeline.folder("candidates")
    return {candidates.layer.name: candidates for candidates in iterate_candidates(folder, graph)}


def iterate_candidates(folder: Path, graph: LayerGraph) -> Iterator[LayerCandidates]:
    """Read the candidates stage ``folder`` layer by layer, in graph order."""
    with np.load(folder / ROW_ORDERS, allow_pickle=False) as orders:
        for number, layer in enumerate(graph.layers):
            weight = weight_matrix(layer, weight_array(graph.model, layer))
            candidates = load_candidates(layer, weight, folder / f"{number:05d}.safetensors")
            yield with_promoted_rows(candidates, orders[str(number)]) if str(number) in orders else candidates


def _read_candidates(folder: Path, graph: LayerGraph) -> dict[str, LayerCandidates]:
    return {
        layer.name: load_candidates(
            layer, weight_matrix(layer, weight_array(graph.model, layer)), folder / f"{number:05d}.safetensors"
        )
        for number, layer in enumerate(graph.layers)
    }


def choices_of(pipeline: Pipeline, graph: LayerGraph) -> dict[str, Choices]:
    """Read which schemes every layer may take, by layer name, without its weights."""
    folder = pipeline.folder("candidates")
    return {layer.name: load_choices(folder / f"{i:05d}.safetensors") for i, layer in enumerate(graph.layers)}


def _make_measure(pipeline: Pipeline, folder: Path) -> str:
    from mpq_deploy.sensitivity.measure import measure

    exported = Exported(pipeline)
    inputs, stats = load_calibration(pipeline)
    section = pipeline.recipe.measure
    _, held_out = inputs.split(section.samples)
    chosen, options, said = _measured_steps(pipeline, exported, held_out)
    candidates = candidates_of(pipeline, exported.graph)
    arguments = (exported.graph, candidates, stats, held_out.at(chosen), exported.conditions, exported.spec, options)
    table = measure(section.method, *arguments, pipeline.talk)
    if held_out is inputs and section.method not in ORM_CONTROLS:
        note = "losses are measured on the samples that the weights were rounded on, so they are optimistic"
        said = (*said, note)
    replace(table, notes=(*table.notes, *said)).save(folder)
    for control in ORM_CONTROLS if section.method == "orm" else ():
        (folder / control).mkdir()
        measure(control, *arguments, pipeline.talk).save(folder / control)
    return f"{table.metric}, {sum(map(len, table.losses.values()))} layer-scheme pairs"


def _measured_steps(
    pipeline: Pipeline, exported: Exported, calls: CalibrationSet
) -> tuple[Array, MeasureOptions, tuple[str, ...]]:
    """Choose which of the calibrated timesteps are measured; return them, the options, and notes about them."""
    from mpq_deploy.calibrate.timesteps import sampled_steps, stride_shares
    from mpq_deploy.sensitivity.feeds import MeasureOptions
    from mpq_deploy.sensitivity.orthogonality import OrmOptions

    section = pipeline.recipe.measure
    available = len(calls.timesteps)
    count = min(section.timesteps, available)
    options = MeasureOptions(
        probes=section.probes,
        heldout_probes=0,
        samples=min(section.calls, section.samples),
        rotate=True,
        batch_size=section.batch_size,
        seed=section.seed,
        orm=OrmOptions(**section.orm.model_dump()),
    )
    if section.sampling == "uniform" or count == available:
        return sampled_steps(available, count), options, ()
    from mpq_deploy.sensitivity.orm import adapted_steps

    arguments = (exported.graph, calls, exported.conditions, exported.spec, options, pipeline.talk)
    chosen = adapted_steps(*arguments, count, min(section.coarse_timesteps, available))
    shares = stride_shares(chosen, available)
    note = (
        f"{count} of {available} timesteps are measured, more of them where the layers' importance changes fastest "
        "(our choice); each counts for its share of the trajectory"
    )
    return chosen, replace(options, shares=tuple(float(share) for share in shares)), (note,)


class PlanSolver:
    """Bytes and losses of every allowed (layer, scheme), gathered once and solved for any budget.

    ``control``: one of ``ORM_CONTROLS`` in place of the run's own measurements.
    """

    def __init__(self, pipeline: Pipeline, control: str = "") -> None:
        self.section = pipeline.recipe.allocate
        self.orm = pipeline.recipe.measure.orm
        self.exported = Exported(pipeline)
        self.layers = self.exported.graph.layers
        self.table = SensitivityTable.load(pipeline.folder("measure") / control)
        read = choices_of(pipeline, self.exported.graph)
        self.refused = {name: {**c.refused, **self._ruled_out(name, c)} for name, c in read.items()}
        target = load_target(pipeline.recipe.target)
        rules: list[tuple[str, tuple[str, ...]]]
        rules = [(pattern, ("fp16",)) for pattern in target.protected if any_match(pattern, read)]
        rules += [(rule.layers, rule.schemes) for rule in self.section.protect]
        measured = self.table.losses
        names = [
            (layer.name, tuple(s.name for s in read[layer.name].schemes if s.name in measured[layer.name]))
            for layer in self.layers
        ]
        allowed = protected_schemes(names, rules)
        self.choices = [
            LayerChoice(
                layer.name,
                layer.inputs,
                {name: weight_bytes(layer, SCHEMES[name]) for name in allowed[layer.name]},
                {name: self.table.losses[layer.name][name] for name in allowed[layer.name]},
            )
            for layer in self.layers
        ]
        self.fp16_size = int(self.exported.facts["fp16_size_bytes"])
        self.weights = sum(layer.weights for layer in self.layers)

    def solve(self, budget: str) -> PrecisionPlan:
        """Solve the allocation for ``budget`` (as the user writes it) and describe the plan."""
        fixed = self.fp16_size - FP16_BYTES * self.weights
        problem = Problem(self.choices, fixed, budget_in_bytes(budget, self.fp16_size, self.weights))
        try:
            solved, cross_terms = self._solved(problem)
        except InfeasibleBudgetError as error:
            ratio = math.ceil(error.smallest / self.fp16_size * 1e4) / 1e4
            raise InfeasibleBudgetError(
                f"No plan fits the budget {budget} ({problem.budget_bytes:,} bytes).",
                f"The smallest feasible budget is {ratio:.4f} ({error.smallest:,} bytes); or allow smaller schemes."
                + self._activations_hint(),
                error.smallest,
            ) from error
        schemes = solved.schemes
        programme, weighed = self._weighed(schemes, problem.budget_bytes - fixed)
        return PrecisionPlan(
            budget_bytes=problem.budget_bytes,
            size_bytes=plan_bytes(problem, schemes),
            fp16_size_bytes=self.fp16_size,
            fixed_bytes=problem.fixed_bytes,
            predicted_loss=self._predicted(schemes, cross_terms),
            schemes=schemes,
            layers=[{**self._row(i, schemes[n.name]), **weighed[i]} for i, n in enumerate(self.layers)],
            others=[vars(other) for other in self.exported.graph.others],
            solver=solved.report,
            notes=list(self.table.notes),
            bit_programme=programme,
            cross_terms=None if cross_terms is None else asdict(cross_terms),
        )

    def _solved(self, problem: Problem) -> tuple[Solved, CrossTerms | None]:
        """Solve without cross terms, then with them where the metric knows them and the recipe wants them."""
        section = self.section

        def solve(part: Problem) -> Solved:
            fee = kernel_charge(part, section.branch_charge, section.gap, section.time_limit)
            return Solved(*allocate_with_fee(part, fee, section.gap, section.time_limit), fee)

        if self.table.projections is None:
            return solve(problem), None
        return allocate_with_cross_terms(problem, self.table, solve, section.cross_terms)

    def _predicted(self, schemes: dict[str, str], cross_terms: CrossTerms | None) -> float | None:
        if cross_terms is not None:
            return cross_terms.predicted_loss
        return self.table.plan_loss(schemes) if self.table.predicts_nmse else None

    def _activations_hint(self) -> str:
        importance = self.table.importance
        if importance is None or not importance.activation_bits.any():
            return ""
        return f" Mind that measure.orm.activation_bits is {self.orm.activation_bits}: it rules out schemes."

    def _ruled_out(self, layer: str, choices: Choices) -> dict[str, str]:
        """Say why the table has no loss for schemes that the layer could take: orm fixes its activations' bits."""
        importance = self.table.importance
        bits = 0 if importance is None else int(importance.activation_bits[importance.layers.index(layer)])
        reason = f"the metric {self.table.metric} fixes the activations of this layer at {bits} bits"
        return {s.name: reason for s in choices.schemes if s.name not in self.table.losses[layer]}

    def _weighed(
        self, schemes: dict[str, str], weight_bytes: int
    ) -> tuple[dict[str, float] | None, list[dict[str, float]]]:
        """Return the plan's weighted bits beside the linear programme's bound, and per layer importance and its bits.

        None and empty entries for a metric without importances. ``weight_bytes``: the budget less all other constants.
        """
        if self.table.importance is None:
            return None, [{} for _ in self.layers]
        from mpq_deploy.sensitivity.bit_programme import linear_bits
        from mpq_deploy.sensitivity.orm import scheme_bits

        bits = [
            {name: scheme_bits(layer, SCHEMES[name], self.orm.bits) for name in choice.bytes}
            for layer, choice in zip(self.layers, self.choices)
        ]
        importance = self.table.importance.total
        sizes = np.array([layer.weights for layer in self.layers], np.float64)
        low, high = (np.array([f(row.values()) for row in bits], np.float64) for f in (min, max))
        bound = linear_bits(importance, sizes, low, high, 8.0 * weight_bytes)
        taken = np.array([row[schemes[layer.name]] for row, layer in zip(bits, self.layers)])
        rows = [{"importance": float(c), "linear_bits": float(b)} for c, b in zip(importance, bound.bits)]
        return {"weighted_bits": float(importance @ taken), "linear_bound": bound.objective}, rows

    def _row(self, number: int, scheme: str) -> dict[str, Any]:
        layer, choice = self.layers[number], self.choices[number]
        return {
            "name": layer.name,
            "op": layer.op,
            "scheme": scheme,
            "bytes": choice.bytes[scheme],
            "fp16_bytes": FP16_BYTES * layer.weights,
            "weights": layer.weights,
            "weight_shape": list(layer.weight_shape),
            "predicted_loss": choice.loss[scheme] if self.table.predicts_nmse else None,
            "refused": self.refused[layer.name],
        }


def any_match(pattern: str, names: Mapping[str, Any]) -> bool:
    """Whether a target's pattern concerns this model: targets protect by name, models name as they like."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _make_allocate(pipeline: Pipeline, folder: Path) -> str:
    plan = PlanSolver(pipeline).solve(pipeline.recipe.budget)
    plan.save(folder / "plan.json")
    ratio = plan.size_bytes / plan.fp16_size_bytes
    predicted = "not predicted" if plan.predicted_loss is None else f"predicted NMSE {plan.predicted_loss:.2e}"
    return f"{plan.size_bytes:,} bytes ({ratio:.4f} of FP16), {predicted}"


def write_plan(pipeline: Pipeline, schemes: dict[str, str], folder: Path) -> int:
    """Write the graphs of a plan (layer -> scheme) into ``folder``; return the bytes counted from the file."""
    exported = Exported(pipeline)
    _, stats = load_calibration(pipeline)
    rewrites = []
    for candidates in iterate_candidates(pipeline.folder("candidates"), exported.graph):
        scheme = SCHEMES[schemes[candidates.layer.name]]
        rewrites.append(LayerRewrite(candidates.layer, scheme, candidates.forms.get(scheme.weight_form)))
    forms = {SCHEMES[scheme].activation_form for scheme in schemes.values()} | {""}
    scales = {name + form: a.scale_for(form) for name, a in stats.activations.items() for form in forms}
    spec = exported.spec
    return write_quantized(exported.path, spec.timestep.name, spec.sample.name, rewrites, scales, folder)


def _make_quantize(pipeline: Pipeline, folder: Path) -> str:
    plan = PrecisionPlan.load(pipeline.folder("allocate") / "plan.json")
    written = write_plan(pipeline, plan.schemes, folder)
    if written != plan.size_bytes:
        raise MpqError(
            f"The quantized file holds {written:,} bytes of constants, the plan says {plan.size_bytes:,}.",
            "This is a defect: please report it with the model's structure.",
        )
    (folder / "size.json").write_text(canonical_json({"size_bytes": written}))
    return f"{written:,} bytes of constants, as planned"


def control_scheme(layer: Layer, preferred: tuple[str, ...], target: Target) -> Scheme:
    """Return the first of the ``preferred`` schemes that ``layer`` may take on ``target``; FP16 when none."""
    allowed = {s.name: s for s in choices_for(layer, schemes_named(preferred), target.refusal).schemes}
    return next((allowed[name] for name in preferred if name in allowed), FP16)


def _make_controls(pipeline: Pipeline, folder: Path) -> str:
    sizes = {}
    if pipeline.recipe.evaluate.controls:
        layers = Exported(pipeline).graph.layers
        target = load_target(pipeline.recipe.target)
        for name, preferred in CONTROLS.items():
            schemes = {layer.name: control_scheme(layer, preferred, target).name for layer in layers}
            (folder / name).mkdir()
            sizes[name] = write_plan(pipeline, schemes, folder / name)
        for name in ORM_CONTROLS if pipeline.recipe.measure.method == "orm" else ():
            (folder / name).mkdir()
            plan = PlanSolver(pipeline, name).solve(pipeline.recipe.budget)
            sizes[name] = write_plan(pipeline, plan.schemes, folder / name)
    (folder / "sizes.json").write_text(canonical_json(sizes))
    return ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()) or "none wanted"


def correction_for(pipeline: Pipeline, quantized: Path) -> Correction:
    """Fit the correction of the graphs in the folder ``quantized``, on calls that their weights were not rounded on."""
    from mpq_deploy.calibrate.correction import call_moments, fit_correction
    from mpq_deploy.evaluate.cache import model_digest

    exported = Exported(pipeline)
    inputs, _ = load_calibration(pipeline)
    _, held_out = inputs.split(pipeline.recipe.measure.samples)
    moments = call_moments(
        exported.path,
        quantized / SIMULATED,
        held_out.take(dealt(held_out.rows, np.arange(len(held_out.rows)))[:CORRECTION_CALLS]),
        exported.conditions,
        exported.spec,
        pipeline.recipe.calibrate.batch_size,
        pipeline.talk,
    )
    return fit_correction(
        moments,
        {name: model_digest(quantized / name) for name in (DEPLOYED, SIMULATED)},
        exported.spec.prediction_type,
        pipeline.recipe.evaluate.correction_bias,
        unseen_by_rounding=held_out is not inputs,
    )


def _make_correction(pipeline: Pipeline, folder: Path) -> str:
    correction = correction_for(pipeline, pipeline.folder("quantize"))
    correction.save(folder / CORRECTION)
    return correction.summary()


INPUTS: dict[str, Callable[[Pipeline], Fields]] = {
    "export": _export_inputs,
    "calibrate": _calibrate_inputs,
    "candidates": _candidates_inputs,
    "measure": _measure_inputs,
    "allocate": _allocate_inputs,
    "quantize": _quantize_inputs,
    "controls": _controls_inputs,
    "correction": _correction_inputs,
    "engine": _engine_inputs,
    "evaluate": _evaluate_inputs,
}


def _make_engine(pipeline: Pipeline, folder: Path) -> str:
    target = load_target(pipeline.recipe.target)
    reason = _no_engine_reason(pipeline, target)
    if reason:
        (folder / "none.json").write_text(canonical_json({"reason": reason}))
        return f"none: {reason}"
    from mpq_deploy.engine.builder import BatchProfile, build_engine

    exported = Exported(pipeline)
    plan = PrecisionPlan.load(pipeline.folder("allocate") / "plan.json")
    schemes = {name: SCHEMES[scheme] for name, scheme in plan.schemes.items()}
    section, spec = pipeline.recipe.engine, exported.spec
    inputs = (spec.sample, spec.timestep, *spec.conditions)
    record = build_engine(
        pipeline.folder("quantize") / DEPLOYED,
        folder,
        target,
        BatchProfile(section.batch_min, section.batch_opt, section.batch_max, {i.name: i.shape for i in inputs}),
        ExpectedLayers.of(exported.graph.layers, schemes, plan.size_bytes),
        pipeline.talk,
        log=pipeline.run.path / "engine.log",
    )
    record.require_verified()
    return f"{record.backend} {record.version}, {record.weights_bytes or 0:,} bytes of weights, verified"


def builder_present(target: Target) -> bool:
    """Whether this machine has what builds engines for ``target``."""
    if target.builder == "trtexec":
        return find_trtexec() is not None
    return importlib.util.find_spec(target.builder) is not None


def _no_engine_reason(pipeline: Pipeline, target: Target) -> str:
    if not pipeline.recipe.engine.build:
        return "the recipe says engine.build: false"
    if target.builder == "none":
        return f"the target {target.name} has no engine: ONNX Runtime runs the graph"
    if target.builder != RTX and not builder_present(target):
        return f"an engine for {target.name} is built on the device: TensorRT is not on this machine"
    return ""


def evaluate_variants(
    pipeline: Pipeline, ours: Path, size_bytes: int, latency: bool, correction: Correction | None = None
) -> Evaluation:
    """Compare the graph ``ours`` (without and with ``correction``) and the controls with the float model.

    Samples are cached by content.
    """
    from mpq_deploy.evaluate.evaluate import evaluate
    from mpq_deploy.evaluate.result import EvaluationOptions

    exported = Exported(pipeline)
    section = pipeline.recipe.evaluate
    options = EvaluationOptions(
        samples=section.samples,
        steps=section.steps,
        timesteps=min(section.timesteps, section.steps),
        batch_size=section.batch_size,
        seed=section.seed,
        sampler=section.sampler,
        **({} if latency else {"latency_calls": 0}),
    )
    controls = pipeline.folder("controls")
    sizes: dict[str, int] = json.loads((controls / "sizes.json").read_text())
    corrected = {} if correction is None else {CORRECTED: correction}
    return evaluate(
        {"ours": ours, **dict.fromkeys(corrected, ours), **{name: controls / name / SIMULATED for name in sizes}},
        exported.path,
        exported.spec,
        exported.conditions,
        options,
        pipeline.talk,
        sizes={**sizes, "ours": size_bytes, **dict.fromkeys(corrected, size_bytes)},
        cache=pipeline.run.path / ".samples",
        corrections=corrected,
    )


def _make_evaluate(pipeline: Pipeline, folder: Path) -> str:
    size = json.loads((pipeline.folder("quantize") / "size.json").read_text())["size_bytes"]
    graph, correction = pipeline.folder("quantize") / SIMULATED, None
    if pipeline.recipe.evaluate.correction != "none":
        correction = load_correction(pipeline.folder("correction") / CORRECTION, graph)
    result = evaluate_variants(pipeline, graph, size, latency=True, correction=correction)
    result.save(folder)
    # What a clock said is no part of what must repeat byte for byte.
    if (folder / LATENCY).exists():
        (folder / LATENCY).replace(pipeline.run.path / LATENCY)
    measured = [(name, result.variants[name]) for name in ("ours", CORRECTED) if name in result.variants]
    said = [f"{name}: NMSE {found.measured_nmse:.2e}, PSNR {found.psnr_db:.1f} dB" for name, found in measured]
    return "; ".join(said).removeprefix("ours: ")


MAKERS: dict[str, Callable[[Pipeline, Path], str]] = {
    "export": _make_export,
    "calibrate": _make_calibrate,
    "candidates": _make_candidates,
    "measure": _make_measure,
    "allocate": _make_allocate,
    "quantize": _make_quantize,
    "controls": _make_controls,
    "correction": _make_correction,
    "engine": _make_engine,
    "evaluate": _make_evaluate,
}


def check_recipe(recipe: Recipe) -> None:
    """Find mistakes that need neither the model nor a run folder: an unknown target, a budget that is no size."""
    target = load_target(recipe.target)
    if recipe.engine.build and target.builder == RTX and not builder_present(target):
        raise MissingDependencyError("tensorrt-rtx", "rtx", f"Building an engine for '{target.name}'")
    budget_in_bytes(recipe.budget, 1 << 30, 1 << 30)
    if recipe.measure.method == "orm" or recipe.measure.sampling == "adaptive":
        _check_timesteps(recipe)
    if recipe.evaluate.seed == recipe.calibrate.seed:
        raise UsageError(
            f"evaluate.seed and calibrate.seed are both {recipe.evaluate.seed}.",
            "Evaluate on noise that was not calibrated on.",
        )


def _check_timesteps(recipe: Recipe) -> None:
    """Refuse more timesteps than there are: the K of orm and of adaptive sampling is not quietly made smaller."""
    steps, calibrated = recipe.calibrate.steps, recipe.calibrate.timesteps
    wanted = {"measure.timesteps": recipe.measure.timesteps}
    if recipe.measure.sampling == "adaptive":
        wanted["measure.coarse_timesteps"] = recipe.measure.coarse_timesteps
    for key, count in wanted.items():
        if count > steps:
            raise UsageError(
                f"{key} is {count}, but the sampler takes only {steps} steps (calibrate.steps).",
                f"Choose at most {steps} timesteps, or more steps.",
            )
        if count > calibrated:
            raise UsageError(
                f"{key} is {count}, but only {calibrated} timesteps are calibrated (calibrate.timesteps).",
                f"Choose at most {calibrated}, or calibrate at more.",
            )
