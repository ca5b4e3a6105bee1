"""Commands that look at results, compare them and judge them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mpq_deploy.cli.app import (
    LOOK,
    app,
    check_one_file,
    make_talk,
    print_each,
    print_result,
    print_text,
)
from mpq_deploy.cli.options import (
    HERE,
    LARGEST_SEED,
    AllowEstimateOption,
    AuditOutOption,
    BaselineOption,
    BudgetListOption,
    CallsPerTimestepOption,
    ClipScoreOption,
    Compute,
    ComputeOption,
    ConfigOption,
    ControlsOption,
    ImagesOption,
    ImageTruthOption,
    JsonOption,
    JunitOption,
    LatencyLimitOption,
    LoraOption,
    LpipsOption,
    MarkdownFileOption,
    MaxClipDropOption,
    MaxFrechetOption,
    MaxLpipsOption,
    MaxNmseOption,
    MaxPsnrDropOption,
    MaxSizeOption,
    MethodsOption,
    MinPsnrOption,
    MinSsimOption,
    ModelArgument,
    NetworkOption,
    OneTargetOption,
    PairsOption,
    RayOption,
    RealOption,
    RecipeOption,
    ReportArgument,
    RunArgument,
    SamplingWorkersOption,
    SeedOption,
    SetOption,
    TargetOption,
    ThreadsOption,
    TrustOption,
    WeightsOption,
    crew_for,
    output_file,
    with_compute,
)
from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.run.chosen_recipe import recipe_of
from mpq_deploy.system.files import write_text

if TYPE_CHECKING:
    from mpq_deploy.report.gate import GateResult, Limits


@app.command(
    rich_help_panel=LOOK,
    epilog="Example: mpq-deploy sweep runs/emoji --budgets 0.26:0.5 --evaluate",
)
@with_compute
def sweep(
    run: RunArgument,
    budgets: BudgetListOption = "0.26:0.5",
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Also quantize and measure at each budget.")
    ] = False,
    points: Annotated[
        Optional[int],
        typer.Option(
            "--points",
            min=2,
            max=100,
            metavar="N",
            help="Instead of --budgets: measure N budgets spread over the predicted curve.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = None,
    target: OneTargetOption = None,
    compute: Compute = HERE,
) -> None:
    """Plot quality against size. Sensitivity is measured once; each budget then takes seconds.

    Of a whole pipeline: joint size against the predicted error of its final images.
    """
    from mpq_deploy.run.folder import runs_at
    from mpq_deploy.run.pipeline import open_pipeline
    from mpq_deploy.studies.sweep import parse_budgets, run_sweep, sweep_table

    chosen = parse_budgets(budgets)
    crew = compute.crew()
    command = shlex.join(["mpq-deploy", *sys.argv[1:]])
    made = {}
    for name, one in runs_at(run, target).items():
        if (one / "pipeline.json").is_file():
            made[name] = _sweep_whole(one, chosen, evaluate or points is not None)
            continue
        settings = recipe_of(one, recipe, {"compute.device": compute.device})
        with open_pipeline(settings, one, make_talk(), crew) as pipeline:
            current = pipeline.current(
                "measure", *(["controls"] if evaluate or points is not None else [])
            )
            result = run_sweep(current, chosen, evaluate, points, command)
        files = f"curve: {one / 'sweep.svg'}\npage:  {one / 'sweep.html'}"
        made[name] = (result, f"{sweep_table(result)}\n\n{files}")
    print_each(made)


def _sweep_whole(run: Path, budgets: list[float], measured: bool) -> tuple[dict[str, Any], str]:
    """Solve a whole pipeline's run for ``budgets``; return what was found as values and as text.

    Raises UsageError where they are to be measured.
    """
    from mpq_deploy.studies.whole_sweep import sweep_whole, whole_sweep_table

    if measured:
        raise UsageError(
            f"Budgets of {run}, a whole pipeline, are predicted, not measured.",
            f"Leave --evaluate and --points out; or measure one part: {run}/components/NAME.",
        )
    result = sweep_whole(recipe_of(run, None), run, budgets, make_talk())
    return result, f"{whole_sweep_table(result)}\n\ncurve: {run / 'sweep.svg'}"


@app.command(
    rich_help_panel=LOOK,
    epilog="Example: mpq-deploy audit ./my-pipeline --budgets 0.28,0.35 --pairs 200",
)
@with_compute
def audit(
    model: ModelArgument = None,
    out: AuditOutOption = None,
    budgets: BudgetListOption = "0.27,0.3,0.35,0.42",
    methods: MethodsOption = None,
    pairs: PairsOption = 600,
    samples: CallsPerTimestepOption = None,
    images: ImageTruthOption = False,
    changes: SetOption = None,
    config: ConfigOption = None,
    lora: LoraOption = None,
    recipe: RecipeOption = None,
    json: JsonOption = False,
    compute: Compute = HERE,
) -> None:
    """Compare every sensitivity metric with exhaustive measurement, and by the plans it leads to.

    Takes minutes for the bundled models, hours for large ones. If interrupted,
    run it again to continue.
    """
    from mpq_deploy.report.audit_page import audit_table, write_audit
    from mpq_deploy.run.pipeline import open_pipeline
    from mpq_deploy.studies import audit as study
    from mpq_deploy.studies.sweep import parse_budgets

    chosen = study.AUDITED if methods is None else study.parse_methods(methods)
    options = study.AuditOptions(tuple(parse_budgets(budgets)), chosen, pairs, samples, images)
    given = {"model": model, "config": config and str(config), "lora": lora or None}
    given |= {"compute.device": compute.device}
    settings = study.audit_recipe(recipe, given, changes or [])
    run = study.audit_run(settings, out)
    study.check_audit(settings)
    with open_pipeline(settings, run, make_talk(), compute.crew()) as pipeline:
        result = study.run_audit(
            pipeline.current("candidates"), options, shlex.join(["mpq-deploy", *sys.argv[1:]])
        )
        write_audit(result, run)
    print_result(result.as_json(), f"{audit_table(result)}\n\nreport: {run / 'audit.html'}", json)


@app.command(
    rich_help_panel=LOOK, epilog="Example: mpq-deploy sample runs/emoji -o grid.png --count 8"
)
def sample(
    run: RunArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="PNG", help="The image to write.", callback=output_file
        ),
    ] = Path("grid.png"),
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, max=256, help="Number of images.")
    ] = 8,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the noise.")
    ] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampler steps.")] = 20,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also sample everything-INT8 and everything-INT4.")
    ] = False,
    device: ComputeOption = None,
) -> None:
    """Sample the float and the quantized model from the same noise, side by side."""
    from mpq_deploy.report.collect import sample_grid
    from mpq_deploy.run.pipeline import open_pipeline

    settings = recipe_of(run, None, {"compute.device": device})
    with open_pipeline(settings, run, make_talk()) as pipeline:
        pipeline.current(*(["controls"] if controls else []))
        sample_grid(pipeline.deployed(), out, count, seed, steps, controls)
    print_text(str(out))


@app.command(
    rich_help_panel=LOOK, epilog="Example: mpq-deploy compare runs/old runs/new --html compare.html"
)
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run folders, or report.json files.", show_default=False
        ),
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    html: Annotated[
        Optional[Path],
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write an HTML page.",
            show_default=False,
            callback=output_file,
        ),
    ] = None,
    target: OneTargetOption = None,
    json: JsonOption = False,
) -> None:
    """Compare the first run with the others: size, quality, latency, and what changed in the plan.

    Runs of several targets are compared target by target, those of whole pipelines
    part by part.
    """
    from mpq_deploy.report.compare import compare_reports
    from mpq_deploy.report.comparison import comparison_markdown, comparison_page, comparison_text
    from mpq_deploy.report.read import read_report
    from mpq_deploy.run.folder import runs_at

    first, *others = runs
    chosen = runs_at(first, target)
    check_one_file(html, chosen)
    made = {}
    for name, one in chosen.items():
        paths = [one, *(_of_target(other, name) for other in others)]
        if any((path / "pipeline.json").is_file() for path in paths):
            made[name] = _compare_wholes(paths, markdown, html)
            continue
        comparison = compare_reports([read_report(path) for path in paths])
        if html is not None:
            write_text(html, comparison_page(comparison))
        text = comparison_markdown(comparison) if markdown else comparison_text(comparison)
        made[name] = (comparison.as_json(), text)
    print_each(made, json)


def _compare_wholes(
    runs: list[Path], markdown: bool, html: Path | None
) -> tuple[dict[str, Any], str]:
    """Compare runs of whole pipelines; return what was found as values and as text."""
    from mpq_deploy.report.parts_compare import compare_pipelines

    compared = compare_pipelines(runs)
    if html is not None:
        write_text(html, compared.page())
    return compared.as_json(), compared.markdown() if markdown else compared.text()


def _of_target(path: Path, name: str) -> Path:
    """Return the run to compare target ``name`` with:

    its own in a run of several targets, else ``path``.
    """
    from mpq_deploy.run.folder import runs_at, several_in

    return runs_at(path, name)[name] if name and several_in(path) else path


@app.command(
    rich_help_panel=LOOK,
    epilog="Example: mpq-deploy metrics runs/mine --images 2048 --real photos/",
)
def metrics(
    run: RunArgument,
    network: NetworkOption = None,
    images: ImagesOption = 512,
    real: RealOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = None,
    workers: SamplingWorkersOption = None,
    ray: RayOption = None,
    threads: ThreadsOption = None,
    controls: ControlsOption = False,
    lpips: LpipsOption = False,
    clip_score: ClipScoreOption = False,
    device: ComputeOption = None,
) -> None:
    """Compare distributions of images: FID or another Frechet distance, KID, precision, recall.

    Compares with the float model's images from the same noise and with real ones;
    image by image with --lpips and --clip-score. If interrupted, run it again: it
    keeps the images that are finished.

    The result is added to the run's reports: run it before 'mpq-deploy gate'.
    """
    from mpq_deploy.evaluate.metrics.measure_images import (
        MetricsOptions,
        check_metrics,
        measure_metrics,
    )
    from mpq_deploy.evaluate.metrics.metric_text import metrics_text
    from mpq_deploy.evaluate.metrics.networks import LPIPS, parse_weights
    from mpq_deploy.evaluate.metrics.scores import CLIP_SCORE
    from mpq_deploy.run.pipeline import open_pipeline

    scores = tuple(name for name, asked in ((LPIPS, lpips), (CLIP_SCORE, clip_score)) if asked)
    given = parse_weights(weights or [])
    options = MetricsOptions(
        tuple(network or ()), images, real, given, seed, workers, controls, scores
    )
    settings = recipe_of(run, None, {"compute.device": device})
    # A stage may take minutes, so report anything missing first.
    check_metrics(settings.model, options)
    crew = crew_for(workers, ray, threads)
    with open_pipeline(settings, run, make_talk(), crew) as pipeline:
        measured = measure_metrics(pipeline.current("evaluate"), options)
        pipeline.run_until("report")
    print_result(measured.as_json(), metrics_text(measured))


@app.command(
    rich_help_panel=LOOK, epilog="Example: mpq-deploy gate runs/mine --max-size 0.36 --min-psnr 40"
)
def gate(
    run: ReportArgument,
    max_size: MaxSizeOption = None,
    min_psnr: MinPsnrOption = None,
    min_ssim: MinSsimOption = None,
    max_nmse: MaxNmseOption = None,
    max_frechet_increase: MaxFrechetOption = None,
    max_latency: LatencyLimitOption = None,
    allow_estimate: AllowEstimateOption = False,
    max_psnr_drop: MaxPsnrDropOption = None,
    max_lpips: MaxLpipsOption = None,
    max_clip_drop: MaxClipDropOption = None,
    baseline: BaselineOption = None,
    trust: TrustOption = None,
    junit: JunitOption = None,
    markdown: MarkdownFileOption = None,
    target: OneTargetOption = None,
    json: JsonOption = False,
) -> None:
    """Check a run against limits, for CI. A limit on a value that was not measured fails.

    Every target of the run is checked, one line each. Exit code 0: all limits are
    met; 1: one is not; 2: bad input.
    """
    from mpq_deploy.report.gate import Limits, gate_junit, gate_markdown
    from mpq_deploy.run.folder import runs_at
    from mpq_deploy.system.quantities import Budget, Latency

    limits = Limits(
        None if max_size is None else Budget.parse(max_size),
        min_psnr,
        min_ssim,
        max_nmse,
        max_frechet_increase,
        None if max_latency is None else Latency.parse(max_latency),
        max_psnr_drop,
        max_lpips,
        max_clip_drop,
    )
    results = {}
    for name, one in runs_at(run, target).items():
        former = None if baseline is None else _of_target(baseline, name)
        _check_trust(trust, one, former)
        results[name] = _gate_of(one, former, limits, allow_estimate)
    for path, text_of in ((junit, gate_junit), (markdown, gate_markdown)):
        if path is not None:
            write_text(path, text_of(*results.values()))
    _print_gate(results, json)


def _gate_of(run: Path, former: Path | None, limits: Limits, allow_estimate: bool) -> GateResult:
    """Hold a run against limits, and where there is a ``former`` one against that."""
    from mpq_deploy.report.gate import check_gate
    from mpq_deploy.report.parts_gate import check_pipeline
    from mpq_deploy.report.read import read_report

    if (run / "pipeline.json").is_file():
        if former is not None:
            raise UsageError(
                f"--baseline is for one part, and {run} is a whole pipeline's run.",
                f"Check a part: {run}/components/NAME; mpq-deploy compare takes the whole.",
            )
        return check_pipeline(run, limits, allow_estimate)
    held_against = None if former is None else read_report(former)
    return check_gate(read_report(run), limits, held_against, allow_estimate)


def _check_trust(trust: str | None, *reports: Path | None) -> None:
    """Raise SignatureError unless the reports are signed by the key ``trust``, if one is given."""
    if trust is not None:
        from mpq_deploy.device.signature import read_public_key
        from mpq_deploy.report.read import check_signed

        check_signed(reports, read_public_key(trust))


def _print_gate(results: dict[str, GateResult], json: bool) -> None:
    """Print the outcome of one run, or a line for each target; exit with 1 if a limit is not met."""
    from mpq_deploy.report.gate import gate_line, gate_text

    if "" in results:
        print_result(results[""].as_json(), gate_text(results[""]), json)
    else:
        values = {name: result.as_json() for name, result in results.items()}
        lines = [gate_line(name, result) for name, result in results.items()]
        print_result({"targets": values}, "\n".join(lines), json)
    if not all(result.passed for result in results.values()):
        raise typer.Exit(1)


@app.command(
    rich_help_panel=LOOK, epilog="Example: mpq-deploy check model.onnx --target jetson-agx-orin"
)
def check(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="Any ONNX file.", show_default=False)
    ],
    target: TargetOption = "rtx",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 for warnings, too.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List the nodes that a target's TensorRT refuses, gets wrong, runs in FP16 or runs slowly.

    Exit code 1 if a node is refused or wrong, with --strict also for warnings; 2
    if the file cannot be read.
    """
    from mpq_deploy.check.check import check_model
    from mpq_deploy.engine.target import load_target

    try:
        result = check_model(model, load_target(target or "rtx"))
    except MpqError as error:
        # Exit code 1 means findings alone; a file that cannot be read is not one.
        error.exit_code = UsageError.exit_code
        raise
    print_result(result.as_json(strict), result.text(), json)
    if not result.passes(strict):
        raise typer.Exit(1)
