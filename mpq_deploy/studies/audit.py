"""The audit: measure the truth and every metric, and compare both and the plans that they choose."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.formats.scheme import FP16
from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.run.pipeline import default_run
from mpq_deploy.run.stage import version_of
from mpq_deploy.sensitivity.methods import METHODS
from mpq_deploy.sensitivity.orthogonality import ENOUGH_CALLS
from mpq_deploy.sensitivity.steadied import steadied
from mpq_deploy.studies.agreement import Compared, correlations, scheme_classes
from mpq_deploy.studies.audit_result import AuditResult, MetricResult, TruthInfo
from mpq_deploy.studies.compared_losses import TRUTH, Losses, Pair, Truth
from mpq_deploy.studies.compared_plans import PlanQuality, Solved, plan_points, solved_plans
from mpq_deploy.system.yaml_file import parse_yaml

if TYPE_CHECKING:
    from mpq_deploy.models.spec import DenoiserSpec
    from mpq_deploy.run.view import Run
    from mpq_deploy.sensitivity.table import SensitivityTable

BUDGETS = "0.27,0.3,0.35,0.42"
AUDITED = tuple(method for method in METHODS if method != TRUTH)
# Of the small bundled model all pairs are measured; larger models are sampled.
PAIRS = 600
CROSS = "probe+cross"
PACKAGES = ("onnx", "onnxruntime", "highspy", "numpy", "torch")


@dataclass(frozen=True)
class AuditOptions:
    """``methods`` at ``budgets`` are compared with the truth of ``pairs``, on ``samples`` calls
    each. ``images``: with the error of final images, too.
    """

    budgets: tuple[float, ...]
    methods: tuple[str, ...] = AUDITED
    pairs: int = PAIRS
    samples: int | None = None
    images: bool = False


def parse_methods(text: str) -> tuple[str, ...]:
    """Parse ``probe,orm`` into methods, in the order of ``AUDITED``. Raises UsageError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = f"Known: {', '.join(AUDITED)}."
    for name in names:
        if name == TRUTH:
            raise UsageError(
                f"'{TRUTH}' is what the methods are compared with.", f"Leave it out. {known}"
            )
        if name not in AUDITED:
            raise UsageError(f"Unknown method '{name}'.", f"{nearest(name, AUDITED)}{known}")
    if not names:
        raise UsageError("No methods given.", known)
    return tuple(name for name in AUDITED if name in names)


def audit_recipe(source: str | None, options: Mapping[str, Any], changes: Sequence[str]) -> Recipe:
    """Return an audit's recipe: ``source``, without branches and engine; then options and KEY=VALUE.

    Branches would multiply the single layers to quantize. Raises UsageError for an invalid change.
    """
    given: dict[str, Any] = {**options, "engine.build": False, "allocate.branches": []}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise UsageError(
                f"Invalid --set {change}.", "Write KEY=VALUE, such as measure.timesteps=10."
            )
        given[key] = parse_yaml(value, f"--set {key}", error=UsageError, hint="Write KEY=VALUE.")
    return load_recipe(source, given)


def audit_run(recipe: Recipe, out: Path | None) -> Path:
    """Return the run folder: ``out``, or runs/audit-NAME. Raises UsageError where it holds a build.

    An audit has a recipe of its own, which would take the place of the build's.
    """
    default = default_run(recipe)
    run = out or default.with_name(f"audit-{default.name}")
    if (run / "allocate").exists():
        raise UsageError(f"{run} holds a build.", "Give the audit its own run folder.")
    return run


def check_audit(recipe: Recipe) -> None:
    """Raise UsageError for timesteps that do not exist and settings that an audit does not know."""
    from mpq_deploy.run.recipe_check import check_timesteps

    if recipe.measure.sampling != "uniform":
        raise UsageError(
            f"measure.sampling is {recipe.measure.sampling}, but an audit measures evenly spaced timesteps.",
            "Leave measure.sampling at uniform.",
        )
    check_timesteps(recipe)


def check_images(spec: DenoiserSpec) -> None:
    """Raise UsageError for a model whose final images nobody can make: only calls of it are known."""
    if spec.recorded:
        raise UsageError(
            f"--images compares final images, but of {spec.name} only recorded calls are known.",
            "Leave --images out.",
        )


def run_audit(run: Run, options: AuditOptions, command: str = "") -> AuditResult:
    """Measure everything that is not yet current in the run folder, and return what came out.

    ``command``: the command line, for the report. A metric that refuses its settings (orm with too
    few calls) and a budget that no plan of a metric fits are part of the result, not errors.
    """
    if options.images:
        check_images(run.exported.spec)
    losses = Losses(
        run, options.samples or min(run.recipe.measure.calls, run.recipe.measure.samples)
    )
    tables: dict[str, SensitivityTable] = {}
    refused: dict[str, str] = {}
    for method in options.methods:
        try:
            tables[method] = steadied(losses.metric(method))
        except UsageError as error:
            refused[method] = str(error)
            run.talk.warn(f"{method} is not measured: {error}")
    truth = losses.truth(options.pairs)
    quality = PlanQuality(run)
    images = _image_errors(run, quality, truth.pairs) if options.images else None
    rows: list[tuple[MetricResult, tuple[Solved, ...]]] = []
    for method in options.methods:
        if method in refused:
            rows.append((MetricResult(method, method, None, refused=refused[method]), ()))
            continue
        row = _agreement(method, tables[method], truth, losses, run.recipe.measure.seed)
        if images is not None:
            row = _agreement_of_images(row, tables[method], truth.pairs, images, run)
        rows.append((row, solved_plans(run, tables[method], options.budgets, cross_terms=False)))
        if (
            method == "probe"
            and tables[method].projections is not None
            and run.recipe.allocate.cross_terms
        ):
            again = solved_plans(run, tables[method], options.budgets, cross_terms=True)
            rows.append((MetricResult(CROSS, row.metric, None), again))
    own = (
        solved_plans(run, truth.table, options.budgets, cross_terms=False) if truth.complete else ()
    )
    rows.append((MetricResult(TRUTH, TRUTH, truth.seconds, notes=truth.table.notes), own))
    quality.prepare(
        [one.plan.schemes for _, solved in rows for one in solved if one.plan is not None]
    )
    measured = [_with_plans(run, row, solved, quality) for row, solved in rows]
    command = command or shlex.join(["mpq-deploy", "audit", run.recipe.model or "emoji"])
    result = replace(_result(run, options, losses, truth, measured, tables), command=command)
    return result if images is None else _with_images(run, result, images)


@dataclass(frozen=True)
class _ImageErrors:
    """What one layer alone does to final images: layer -> scheme -> mean squared error, peak 1."""

    errors: dict[str, dict[str, float]]
    seconds: float


def _image_errors(run: Run, quality: PlanQuality, pairs: Sequence[Pair]) -> _ImageErrors:
    """Sample images with one layer of each of ``pairs`` in its scheme, all others in FP16."""
    plain = {layer.name: FP16.name for layer in run.exported.graph.layers}
    errors: dict[str, dict[str, float]] = {}
    started = time.process_time()
    with run.talk.bar("images of single layers", len(pairs)) as advance:
        for layer, scheme in pairs:
            errors.setdefault(layer, {})[scheme] = quality.image_error({**plain, layer: scheme})
            advance(1)
    return _ImageErrors(errors, time.process_time() - started)


def _agreement_of_images(
    row: MetricResult,
    table: SensitivityTable,
    pairs: Sequence[Pair],
    truth: _ImageErrors,
    run: Run,
) -> MetricResult:
    """Compare a metric with the errors of final images; in their unit where it predicts these."""
    unit = table.mean_square
    found = {
        layer: {scheme: loss * (unit or 1.0) for scheme, loss in losses.items()}
        for layer, losses in table.image_losses().items()
    }
    compared = Compared.of(pairs, truth.errors, found)
    found_by = correlations(compared, {"": list(compared.schemes)}, run.recipe.measure.seed)
    return replace(
        row,
        images=found_by[""],
        images_calibration=None if unit is None else compared.calibration(),
    )


def _with_images(run: Run, result: AuditResult, images: _ImageErrors) -> AuditResult:
    rows = [{**row, "images": images.errors[row["layer"]][row["scheme"]]} for row in result.losses]
    own, steps = run.recipe.calibrate.steps, run.recipe.evaluate.steps
    note = (
        f"Trajectory probes follow {own} steps, the images that they are compared with {steps}: "
        "errors of other numbers of steps differ."
    )
    notes = (*result.notes, note) if own != steps else result.notes
    return replace(result, losses=tuple(rows), image_seconds=images.seconds, notes=notes)


def _agreement(
    method: str, table: SensitivityTable, truth: Truth, losses: Losses, seed: int
) -> MetricResult:
    """Compare a metric with the truth on the pairs of the latter."""
    compared = Compared.of(truth.pairs, truth.table.losses, table.losses)
    classes = scheme_classes(set(compared.schemes))
    everything = [scheme for schemes in classes.values() for scheme in schemes]
    by_class = correlations(compared, {**classes, "": everything}, seed)
    return MetricResult(
        method,
        table.metric,
        losses.seconds(method),
        by_class.pop(""),
        by_class,
        compared.calibration() if table.predicts_nmse else None,
        notes=table.notes,
    )


def _with_plans(
    run: Run, row: MetricResult, solved: Sequence[Solved], quality: PlanQuality
) -> MetricResult:
    points = plan_points(solved, quality)
    for point in points:
        outcome = point.refused or f"NMSE {point.nmse:.2e}"
        run.talk.line(f"  {row.title:<22} {point.budget:g}: {outcome}")
    return replace(row, plans=points)


def _result(
    run: Run,
    options: AuditOptions,
    losses: Losses,
    truth: Truth,
    rows: list[MetricResult],
    tables: dict[str, SensitivityTable],
) -> AuditResult:
    spec, section = losses.exported.spec, run.recipe.evaluate
    return AuditResult(
        model=spec.name,
        weights=sum(layer.weights for layer in losses.graph.layers),
        layers=len(losses.graph.layers),
        calls=losses.samples,
        timesteps=len(losses.calls.timesteps),
        budgets=options.budgets,
        truth=TruthInfo(len(truth.pairs), truth.of, truth.seconds, run.recipe.measure.seed),
        metrics=tuple(rows),
        losses=tuple(_loss_row(pair, truth, tables) for pair in truth.pairs),
        evaluation={"images": section.samples, "steps": section.steps, "seed": section.seed},
        synthetic=spec.synthetic,
        notes=tuple(_notes(run, losses, truth, rows)),
        versions={
            k.removeprefix("version."): str(v) for k, v in version_of(*PACKAGES).items() if v
        },
        command="",
    )


def _loss_row(
    pair: tuple[str, str], truth: Truth, tables: dict[str, SensitivityTable]
) -> dict[str, Any]:
    layer, scheme = pair
    losses = {
        name: table.losses.get(layer, {}).get(scheme)
        for name, table in {TRUTH: truth.table, **tables}.items()
    }
    return {"layer": layer, "scheme": scheme, **losses}


def _notes(run: Run, losses: Losses, truth: Truth, rows: Iterable[MetricResult]) -> list[str]:
    """Say how the comparison was made, and what is doubtful about it."""
    measure = run.recipe.measure
    notes = [
        f"Truth and metrics see the same {losses.samples} calls at each of {len(losses.calls.timesteps)} timesteps, "
        f"none of which weights were rounded on; gain injects its noise into at most 4 of them."
        if losses.unseen
        else "Truth and metrics are measured on the samples that the weights were rounded on, so all are optimistic."
    ]
    if not truth.complete:
        notes.append(
            f"The truth is a sample of {len(truth.pairs)} of {truth.of} pairs (layer, scheme), stratified by scheme "
            "and layer; so it chooses no plans of its own."
        )
    notes.append(
        "Rank correlations are Spearman's, ranked within each scheme and pooled; intervals (95 %) are a bootstrap over "
        "layers. All plans are solved without cross terms between layers, except where the row says so."
    )
    if any(run.recipe.allocate.branches):
        notes.append(
            "Truth and correlations leave residual branches out; the metrics' plans may take them."
        )
    if measure.orm.activation_bits != "program" and any(
        row.key in ("orm", "kurtosis") for row in rows
    ):
        notes.append(
            f"kurtosis, orm and its controls cannot compare activations: measure.orm.activation_bits fixes them at "
            f"{measure.orm.activation_bits}, which rules out schemes that the other metrics may choose."
        )
    if losses.samples < ENOUGH_CALLS and any(row.key == "orm" for row in rows):
        notes.append(
            f"{losses.samples} calls are few for orm: below {ENOUGH_CALLS} it says little."
        )
    return notes
