"""The report of a run's finished stages, the summary on the screen, and the sample picture."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.allocate.plan import PlannedLayer, PrecisionPlan
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.delivery.device_results import device_infos
from mpq_deploy.errors import InputError
from mpq_deploy.evaluate.evaluation_result import Evaluation, VariantResult
from mpq_deploy.evaluate.interval import mean_interval
from mpq_deploy.evaluate.variants import BEFORE, CORRECTED, LATENCY, read_controls
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.latency.plan_latency import SHOWN, shown_products
from mpq_deploy.report.budget_plans import budget_plans, layer_kurtoses
from mpq_deploy.report.data import (
    Check,
    Control,
    CpuLatencyInfo,
    CurvePoint,
    EngineInfo,
    EvaluationInfo,
    ExpectedLatency,
    ImageSet,
    ImportanceInfo,
    Interval,
    LayerRow,
    LoraInfo,
    LoraSlotsInfo,
    ModelInfo,
    OrmPictures,
    OtherRow,
    Quality,
    RecoveryInfo,
    ReportData,
    SizeRow,
    SolverInfo,
    StageRow,
    TargetInfo,
)
from mpq_deploy.report.words import counted
from mpq_deploy.rounding.control_schemes import CONTROLS, SIMULATED_TWIN
from mpq_deploy.run.stage import version_of
from mpq_deploy.run.view import Exported
from mpq_deploy.runtime.correction import FILE as CORRECTION
from mpq_deploy.sensitivity.steadied import steadied
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.files import read_sealed
from mpq_deploy.system.inputs import read_json_object, whole

if TYPE_CHECKING:
    from mpq_deploy.evaluate.metrics.kept import ImageMetrics
    from mpq_deploy.run.view import Run

TITLES = {
    "float": "Float",
    "ours": "Ours",
    CORRECTED: "Ours, corrected (PTQD)",
    BEFORE: "Ours, before recovery",
    **{name: control.title for name, control in CONTROLS.items()},
    "size-only": "Size only, no ORM",
    "random": "Random theta",
}
# The controls of the target simulate are simulated too.
SIMULATED_TITLES = {
    "ours": "Ours, simulated",
    CORRECTED: "Ours, simulated, corrected (PTQD)",
    "int8": "Everything 8-bit, simulated",
    "int4": "Everything 4-bit, simulated",
    "size-only": "Size only, no ORM, simulated",
    "random": "Random theta, simulated",
}
PACKAGES = (
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "highspy",
    "numpy",
    "torch",
    "diffusers",
    "tensorrt-rtx",
    "tensorrt",
)


def report_data(run: Run) -> ReportData:
    """Fill the report from the finished stages."""
    exported, solver = run.exported, PlanSolver(run)
    plan = _timed_by_engine(run, solver)
    table = steadied(SensitivityTable.load(run.stage("measure")))
    target = run.target
    engine, engine_note = _engine(run)
    evaluated = _Evaluated.of(run, plan)
    kurtoses = layer_kurtoses(run, exported)
    metrics = _metrics(run, exported, evaluated) if evaluated.graph else None
    return ReportData(
        model=_model(exported, evaluated.digest),
        target=TargetInfo(name=target.name, title=target.title, dialect=target.dialect),
        budget=plan.budget_bytes / plan.fp16_size_bytes,
        budget_bytes=plan.budget_bytes,
        size_bytes=plan.size_bytes,
        fp16_size_bytes=plan.fp16_size_bytes,
        fixed_bytes=plan.fixed_bytes,
        **_prediction(plan),
        **evaluated.fields,
        curve=_curve(run),
        engine=engine,
        engine_note=engine_note,
        cpu_latency=_cpu_latency(run),
        expected_latency=ExpectedLatency(**asdict(plan.latency)) if plan.latency else None,
        lora_slots=LoraSlotsInfo(**asdict(plan.lora_slots)) if plan.lora_slots else None,
        devices=device_infos(run),
        layers=tuple(_layer_row(layer, table, kurtoses) for layer in plan.layers),
        loss_timesteps=tuple(float(t) for t in table.timesteps) if table.predicts_nmse else (),
        others=tuple(OtherRow(**asdict(other)) for other in plan.others),
        stages=_stage_rows(run),
        solver=SolverInfo(status=plan.solver.status, gap=max(plan.solver.gap, 0.0)),
        sensitivity=table.metric,
        versions=_versions(),
        reproduce=_command(run),
        notes=(
            *_plan_notes(run, table, plan),
            *evaluated.notes,
            *exported.facts["notes"],
            *(metrics.notes if metrics else ()),
        ),
        budgets=budget_plans(run, plan, solver),
        importance=_importance(run, plan, table),
        orm=_orm_pictures(table),
        simulated=plan.simulated,
        recovery=_recovery(run),
        frechet=metrics.frechet if metrics else (),
        frechet_controls=metrics.controls if metrics else {},
        scores=metrics.scores if metrics else (),
    )


def _plan_notes(run: Run, table: SensitivityTable, plan: PrecisionPlan) -> list[str]:
    """Return why the metric was chosen, then the plan's notes, among them what could not be measured so."""
    chosen = run.method
    why = [chosen.text] if chosen.text and table.metric == chosen.name else []
    return [*why, *plan.notes]


def _timed_by_engine(run: Run, solver: PlanSolver) -> PrecisionPlan:
    """Return the plan, with its time estimated again where the engine shows what it did not know."""
    record = run.folder.record("allocate")
    known = record.inputs.get(SHOWN) if record else None
    return run.plan if shown_products(run) in (None, known) else solver.timed_again(run.plan)


def _stage_rows(run: Run) -> tuple[StageRow, ...]:
    return tuple(
        StageRow(
            name=r.name,
            seconds=r.seconds,
            peak_rss_bytes=r.peak_rss_bytes or None,
            cached=r.cached,
            device=record.device if (record := run.folder.record(r.name)) else "cpu",
        )
        for r in run.results.values()
    )


def _model(exported: Exported, digest: str) -> ModelInfo:
    spec = exported.spec
    return ModelInfo(
        name=spec.name,
        source=spec.source,
        labels=spec.labels,
        synthetic=spec.synthetic,
        weights=sum(layer.weights for layer in exported.graph.layers),
        sample_shape=spec.sample.shape,
        digest=digest,
        loras=tuple(
            LoraInfo(name=use.name, sha256=use.sha256, scale=use.scale, layers=use.layers)
            for use in spec.loras
        ),
    )


@dataclass(frozen=True)
class _Evaluated:
    """Evaluation as fields of the report; empty where the run has none (``report --as-is``).

    ``digest``: of the float graph; ``graph``: of the plan's.
    """

    fields: dict[str, Any]
    digest: str
    graph: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, run: Run, plan: PrecisionPlan) -> _Evaluated:
        if "evaluate" not in run.results:
            return cls(
                {},
                "",
                "",
                ("evaluation is missing: 'mpq-deploy report RUN' without --as-is makes it",),
            )
        result = Evaluation.load(run.stage("evaluate"))
        variants = {name: _control(name, v, plan) for name, v in result.variants.items()}
        ours = variants.pop("ours").model_dump(
            exclude=set(Control.model_fields) - set(Quality.model_fields)
        )
        conditions = result.settings.model_dump(include={"samples", "steps", "seed"})
        fields = {
            **ours,
            "timesteps": result.timesteps,
            "by_size": tuple(
                SizeRow(
                    size=size,
                    title=titles(plan).get(name, name),
                    measured_nmse=_finite(of.measured_nmse),
                    psnr_db=of.psnr_db and _finite(of.psnr_db),
                    ssim=_finite(of.ssim),
                    samples=of.samples,
                )
                for size, found in result.by_size.items()
                for name, of in found.items()
            ),
            "evaluation": EvaluationInfo(
                **conditions, sampler=result.sampler, image_kind=result.image_kind
            ),
            "extras": {name: v for name, v in variants.items() if name in (CORRECTED, BEFORE)},
            "controls": {n: v for n, v in variants.items() if n not in (CORRECTED, BEFORE)},
            "images": ImageSet(result.images, result.labels, titles(plan)),
        }
        notes = (*result.notes, *_not_finite(result))
        return cls(fields, result.float_digest, result.variants["ours"].digest, notes)


def _not_finite(result: Evaluation) -> list[str]:
    """Warn of measured errors that are NaN or infinite: left out silently, they would look unmeasured."""
    return [
        f"the measured error of {name} is not finite and is left out"
        for name, variant in result.variants.items()
        if not math.isfinite(variant.measured_nmse) or math.isnan(variant.psnr_db)
    ]


def titles(plan: PrecisionPlan) -> dict[str, str]:
    """Return what each variant is called; those of a simulated plan say so."""
    return {**TITLES, **SIMULATED_TITLES} if plan.simulated else TITLES


def _engine(run: Run) -> tuple[EngineInfo | None, str]:
    if "engine" not in run.results:
        return None, "This run has no engine yet."
    folder = run.stage("engine")
    none = folder / "none.json"
    if none.exists():
        return None, str(read_json_object(none).get("reason"))
    from mpq_deploy.engine.record import RECORD, EngineRecord

    record = EngineRecord.load(folder / RECORD)
    seconds = run.folder.timings().get("engine", {}).get("seconds")
    wrong = [str(problem) for problem in record.problems if problem.severity == "wrong"]
    slow = tuple(str(problem) for problem in record.problems if problem.severity == "slow")
    planned = f"{record.weights_bytes or 0:,} bytes of weights in the engine, {record.planned_bytes:,} in the plan"
    info = EngineInfo(
        backend=record.backend,
        version=record.version,
        file=f"engine/{record.file}",
        sha256=record.sha256,
        weights_bytes=record.weights_bytes,
        planned_weights_bytes=record.planned_bytes,
        engine_bytes=record.bytes,
        verified=record.verified,
        checks=(
            Check(
                what="every layer is stored and computed as planned",
                passed=not wrong,
                detail="; ".join(wrong),
            ),
            Check(
                what="the weights' memory agrees with the plan", passed=not wrong, detail=planned
            ),
        ),
        build_seconds=seconds,
        notes=slow,
    )
    return info, ""


def _prediction(plan: PrecisionPlan) -> dict[str, Any]:
    return {
        "predicted_nmse": plan.predicted_loss,
        "predicted_interval": _ends(plan.predicted_interval),
        "prediction_note": plan.prediction_note,
        "predicted_images": plan.predicted_images,
    }


def _control(name: str, variant: VariantResult, plan: PrecisionPlan) -> Control:
    size, behind = variant.size_bytes or 0, variant.behind_db
    return Control(
        title=titles(plan).get(name, name),
        size_bytes=size,
        size_ratio=size / plan.fp16_size_bytes,
        measured_nmse=_finite(variant.measured_nmse),
        psnr_db=_finite(variant.psnr_db),
        pooled_psnr_db=_finite(variant.pooled_psnr_db),
        ssim=_finite(variant.ssim),
        psnr_db_interval=_psnr_interval(variant),
        ssim_interval=_interval(variant.ssim_each),
        nmse_interval=_ends(variant.nmse_interval),
        psnr_db_each=_all_finite(variant.psnr_db_each),
        ssim_each=_all_finite(variant.ssim_each),
        nmse_by_timestep=_all_finite(variant.nmse_by_timestep),
        identical=variant.psnr_db == math.inf,
        layers=variant.layers,
        calls=variant.calls,
        behind_db=behind and behind.mean,
        behind_db_interval=behind and Interval(low=behind.low, high=behind.high),
    )


def _recovery(run: Run) -> RecoveryInfo | None:
    if not run.recipe.recover.steps or "recover" not in run.results:
        return None
    from mpq_deploy.recover.recovery_result import Recovery

    recovery = Recovery.load(run.stage("recover"))
    return RecoveryInfo(
        steps=recovery.steps,
        best_step=recovery.best_step,
        before=recovery.before,
        after=recovery.after,
        curve=tuple((point.step, point.held_out_nmse) for point in recovery.curve),
        summary=recovery.summary(),
    )


def _interval(values: tuple[float, ...]) -> Interval | None:
    return _ends(mean_interval(_all_finite(values)))


def _ends(ends: tuple[float, float] | None) -> Interval | None:
    return None if ends is None else Interval(low=ends[0], high=ends[1])


def _psnr_interval(variant: VariantResult) -> Interval | None:
    # Images that are all identical have no finite mean.
    return _interval(variant.psnr_db_each) if math.isfinite(variant.psnr_db) else None


def _metrics(run: Run, exported: Exported, evaluated: _Evaluated) -> ImageMetrics | None:
    """Return what 'mpq-deploy metrics' measured of the plan's present graph and images."""
    from mpq_deploy.evaluate.metrics.kept import read_kept
    from mpq_deploy.evaluate.metrics.measure_images import made_from

    measured = read_kept(run.path, run.talk, "is left out of the report")
    if measured is None:
        return None
    current, stale = measured.still_true(
        made_from(run, exported, evaluated.graph, evaluated.digest)
    )
    if stale:
        run.talk.warn(f"{stale}: left out; measure again with 'mpq-deploy metrics'")
    return current


def _curve(run: Run) -> tuple[CurvePoint, ...]:
    sweep = _read_figures(run, run.path / "sweep.json", {"measure", "points"})
    # A sweep of other measurements says nothing about this plan.
    if sweep is None or sweep["measure"] != run.digest("measure"):
        return ()
    points = [point for point in sweep["points"] if "size_ratio" in point]
    names = CurvePoint.model_fields
    return tuple(CurvePoint(**{k: _finite(v) for k, v in p.items() if k in names}) for p in points)


def _cpu_latency(run: Run) -> CpuLatencyInfo | None:
    figures = _read_figures(run, run.path / LATENCY, {"float_ms", "variant_ms", "source"})
    if figures is None:
        return None
    with whole(run.path / LATENCY):
        ours_ms = figures["variant_ms"]["ours"]
        return CpuLatencyInfo(
            float_ms=figures["float_ms"], ours_ms=ours_ms, source=figures["source"]
        )


def _read_figures(run: Run, path: Path, keys: set[str]) -> dict[str, Any] | None:
    """Read figures outside the stages' digests; None, with a warning, for a damaged file."""
    if not path.exists():
        return None
    try:
        figures = read_sealed(path)
    except InputError as error:
        run.talk.warn(f"{path} cannot be read and is left out of the report: {error.message}")
        return None
    if not keys <= set(figures):
        run.talk.warn(f"{path} lacks {', '.join(sorted(keys))} and is left out of the report")
        return None
    return figures


def _importance(run: Run, plan: PrecisionPlan, table: SensitivityTable) -> ImportanceInfo | None:
    importance, program = table.importance, plan.bit_program
    if importance is None or program is None:
        return None
    return ImportanceInfo(
        settings=_orm_settings(run, table.metric),
        timesteps=tuple(float(t) for t in importance.timesteps),
        weights=tuple(float(w) for w in importance.weights),
        calls=importance.calls,
        constant=int(importance.constant.all(axis=0).sum()),
        **asdict(program),
    )


def _orm_settings(run: Run, metric: str) -> str:
    """Say which options the importances were computed with."""
    options = run.recipe.measure.orm
    activations = {
        "int8": "INT8 activations wherever the target allows",
        "fp16": "FP16 activations wherever a layer has the choice",
        "program": f"activations by a second program at {options.activation_budget:g} bits per element",
    }[options.activation_bits]
    bits = f"{options.bits} bits, {activations}"
    if metric != "orm":
        how = {
            "kurtosis": "mean kurtosis of the weight's rows times the number of weights",
            "size-only": "1 for every layer",
            "random": f"drawn with seed {run.recipe.measure.seed}",
        }[metric]
        return f"Importance: {how}; {bits}"
    reach = "" if options.importance == "layer" else ", mean over a layer and all later ones"
    grown = f" with eta {options.eta:g}" if options.aggregation == "exponential" else ""
    return (
        f"Importance: exp(-{options.beta:g} gamma), {options.estimator} ORM, {options.aggregation} over "
        f"timesteps{grown}{reach}; {bits}"
    )


def _orm_pictures(table: SensitivityTable) -> OrmPictures | None:
    of = table.importance
    if of is None or of.orm is None:
        return None
    constant = np.asarray(of.constant.all(axis=0))
    return OrmPictures(of.layers, of.timesteps, of.weights, of.theta, of.orm, constant)


def _layer_row(
    layer: PlannedLayer, table: SensitivityTable, kurtoses: dict[str, float]
) -> LayerRow:
    losses: tuple[float, ...] = ()
    if table.predicts_nmse:
        losses = _all_finite(
            tuple(float(loss) for loss in table.losses_by_timestep[layer.name][layer.scheme])
        )
    return LayerRow(**asdict(layer), kurtosis=kurtoses.get(layer.name), loss_by_timestep=losses)


def _versions() -> dict[str, str]:
    import platform

    versions = {k.removeprefix("version."): v for k, v in version_of(*PACKAGES).items() if v}
    return {**versions, "python": platform.python_version()}


def _command(run: Run) -> str:
    """The command that repeats this run: the recipe in the run folder holds every setting."""
    return shlex.join(
        ["mpq-deploy", "build", "--recipe", str(run.path / "recipe.yaml"), "-o", "runs/again"]
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _all_finite(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return ``values``, or none of them: they stand for images or timesteps in order."""
    return values if all(map(math.isfinite, values)) else ()


@dataclass(frozen=True)
class Summary:
    """What a command prints: text for people, values for scripts."""

    text: str
    values: dict[str, Any]


def summarise(run: Run, last: str) -> Summary:
    """Summarize a command's result: files and figures."""
    values: dict[str, Any] = {
        "run": str(run.path),
        "stages": {
            r.name: {"cached": r.cached, "seconds": r.seconds} for r in run.results.values()
        },
    }
    if last != "report":
        files = [str(path) for path in sorted(run.stage(last).iterdir()) if path.is_file()][:8]
        return Summary(str(run.stage(last)), {**values, "files": files})
    report = read_json_object(run.path / "report.json")
    return Summary(_headline(run.path, report), {**values, "report": report})


def _headline(run: Path, report: dict[str, Any]) -> str:
    lines = [
        f"{'':<11} {'of FP16':>8} {'bytes':>14} {'PSNR dB':>8} {'SSIM':>6} {'NMSE':>9}",
        _row("ours", report),
    ]
    lines += [_row(name, row) for name, row in {**report["extras"], **report["controls"]}.items()]
    mixed = {n: c["layers"] for n, c in report["controls"].items() if len(c["layers"]) > 1}
    if report["simulated"]:
        lines = [lines[0], *(f"{line}  simulated, nominal bytes" for line in lines[1:])]
    lines += [f"layers of {name}: {counted(layers)}" for name, layers in mixed.items()]
    lines += [
        f"{name} NMSE of ours: {report[f'{name}_nmse']:.2e}{_between(report[interval])}"
        for name, interval in (("measured", "nmse_interval"), ("predicted", "predicted_interval"))
        if report[f"{name}_nmse"]
    ]
    engine = report["engine"]
    built = f"{run / engine['file']}" if engine else f"none ({report['engine_note']})"
    model = run / ("recover" if report["recovery"] else "quantize") / DEPLOYED
    lines += ["", f"engine: {built}", f"model:  {model}", f"report: {run / 'report.html'}"]
    expected = report["expected_latency"]
    if expected:
        lines.append(
            f"latency: {expected['ours_ms']:.3g} ms per call, FP16 {expected['fp16_ms']:.3g} ms, INT8 "
            f"{expected['int8_ms']:.3g} ms ({expected['source']} layer by layer, not measured as a whole)"
        )
    if CORRECTED in report["extras"]:
        lines.append(f"correction of the sampler: {run / 'correction' / CORRECTION}")
    if expected and (slower := ExpectedLatency(**expected).slower):
        lines += ["", slower]
    return "\n".join(lines)


def _between(interval: dict[str, float] | None) -> str:
    if interval is None:
        return " (no interval)"
    return f" (95 % interval {interval['low']:.2e} to {interval['high']:.2e})"


def _row(name: str, row: dict[str, Any]) -> str:
    psnr, ssim, nmse = (row[key] for key in ("psnr_db", "ssim", "measured_nmse"))
    shown = f"{psnr:.1f}" if psnr is not None else "same" if row["identical"] else "-"
    alike = "-" if ssim is None else f"{ssim:.4f}"
    error = "-" if nmse is None else f"{nmse:.2e}"
    sizes = f"{row['size_ratio']:>8.4f} {row['size_bytes']:>14,}"
    simulated = TITLES.get(name, "").endswith(SIMULATED_TWIN)
    row_text = f"{name:<11} {sizes} {shown:>8} {alike:>6} {error:>9}"
    return f"{row_text}  simulated" if simulated else row_text


def sample_grid(run: Run, out: Path, count: int, seed: int, steps: int, controls: bool) -> None:
    """Sample the float and quantized models from the same noise into one labelled picture."""
    from mpq_deploy.evaluate.evaluate import Variant, evaluate
    from mpq_deploy.evaluate.grid import save_grid

    settings = run.recipe.evaluate.replace(
        samples=count, steps=steps, timesteps=1, calls=count, seed=seed, controls_images="all"
    )
    variants = {"ours": Variant(run.deployed / SIMULATED)}
    if controls:
        found = read_controls(run.stage("controls"))
        variants |= {name: found[name] for name in sorted(found, reverse=True)}
    result = evaluate(variants, run.exported.model, settings, run.talk)
    plan = run.plan
    save_grid(
        out, {titles(plan)[name]: images for name, images in result.images.items()}, result.labels
    )
