"""Commands that look at results, compare them and judge them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mpq_deploy.cli.app import LOOK, State, app, make_talk, print_json, recipe_of
from mpq_deploy.cli.options import (
    WORKERS,
    ModelArgument,
    RayOption,
    RecipeOption,
    ReportArgument,
    RunArgument,
    TargetOption,
    ThreadsOption,
    WorkersOption,
    crew_for,
)


@app.command(rich_help_panel=LOOK, epilog="Example: mpq-deploy sweep runs/emoji --budgets 0.26:0.5 --evaluate")
def sweep(
    run: RunArgument,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="LIST", help="FROM:TO, FROM:TO:STEP, or a comma-separated list.")
    ] = "0.26:0.5",
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Also quantize and measure at each budget.")] = False,
    points: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--points",
            min=2,
            max=100,
            metavar="N",
            help="In place of --budgets: measure N budgets spread over the predicted curve.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Draw the curve of size against quality: measured once, each budget solved in seconds."""
    from mpq_deploy.run.pipeline import open_pipeline
    from mpq_deploy.studies.sweep import parse_budgets, run_sweep, sweep_table

    chosen = parse_budgets(budgets)
    crew = crew_for(workers, ray, threads)
    with open_pipeline(recipe_of(run, recipe), run, make_talk(), crew) as pipeline:
        current = pipeline.current("measure", *(["controls"] if evaluate or points is not None else []))
        result = run_sweep(current, chosen, evaluate, points, shlex.join(["mpq-deploy", *sys.argv[1:]]))
    if State.json:
        print_json(result)
    else:
        print(sweep_table(result))
        print(f"\ncurve: {run / 'sweep.svg'}\npage:  {run / 'sweep.html'}")


@app.command(rich_help_panel=LOOK, epilog="Example: mpq-deploy audit ./my-pipeline --budgets 0.28,0.35 --pairs 200")
def audit(
    model: ModelArgument = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="RUN", help="A run folder of its own.", show_default="runs/audit-<model>"),
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="LIST", help="FROM:TO:STEP, or a comma-separated list.")
    ] = "0.27,0.3,0.35,0.42",
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--methods", metavar="LIST", help="Metrics, comma-separated.", show_default="all"),
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Layer-scheme pairs of the truth, at most.")] = 600,
    samples: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--samples", min=1, help="Calls measured at each timestep.", show_default="measure.calls: 24"),
    ] = None,
    changes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="An entry of the recipe; repeatable.", show_default=False),
    ] = None,
    recipe: RecipeOption = None,
    json: Annotated[bool, typer.Option("--json", help="The result on stdout as JSON.")] = False,
    workers: WorkersOption = None,
    ray: RayOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare every sensitivity with exhaustive measurement, and by the quality of the plans it leads to.

    Takes minutes for the bundled models, hours for large ones; stopped, it goes on where it was.
    """
    from mpq_deploy.report.audit_page import audit_table, write_audit
    from mpq_deploy.run.pipeline import open_pipeline
    from mpq_deploy.studies.audit import (
        AUDITED,
        AuditOptions,
        audit_recipe,
        audit_run,
        check_audit,
        parse_methods,
        run_audit,
    )
    from mpq_deploy.studies.sweep import parse_budgets

    chosen = parse_methods(methods) if methods is not None else AUDITED
    options = AuditOptions(tuple(parse_budgets(budgets)), chosen, pairs, samples)
    settings = audit_recipe(recipe, model, changes or [])
    run = audit_run(settings, out)
    check_audit(settings)
    with open_pipeline(settings, run, make_talk(), crew_for(workers, ray, threads)) as pipeline:
        result = run_audit(pipeline.current("candidates"), options, shlex.join(["mpq-deploy", *sys.argv[1:]]))
        write_audit(result, run)
    if State.json or json:
        print_json(result.as_json())
    else:
        print(audit_table(result))
        print(f"\nreport: {run / 'audit.html'}")


@app.command(rich_help_panel=LOOK, epilog="Example: mpq-deploy sample runs/emoji -o grid.png --count 8")
def sample(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PNG", help="The picture to write.")] = Path("grid.png"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=256, help="Images.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the sampler.")] = 20,
    controls: Annotated[bool, typer.Option("--controls", help="Also everything INT8 and everything INT4.")] = False,
) -> None:
    """Sample the float and the quantized model from the same noise, side by side."""
    from mpq_deploy.report.collect import sample_grid
    from mpq_deploy.run.pipeline import open_pipeline

    with open_pipeline(recipe_of(run, None), run, make_talk()) as pipeline:
        pipeline.current(*(["controls"] if controls else []))
        sample_grid(pipeline.deployed(), out, count, seed, steps, controls)
    print(out)


@app.command(rich_help_panel=LOOK, epilog="Example: mpq-deploy compare runs/old runs/new --html compare.html")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or report.json files.", show_default=False)
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown on stdout.")] = False,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", metavar="FILE", help="A page to write.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Results on stdout as JSON.")] = False,
) -> None:
    """Compare the first run with the others: size, quality, latency, and what changed in the plan."""
    from mpq_deploy.report.compare import compare_reports
    from mpq_deploy.report.comparison import comparison_markdown, comparison_page, comparison_text
    from mpq_deploy.report.read import read_report

    comparison = compare_reports([read_report(path) for path in runs])
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(comparison_page(comparison), encoding="utf-8")
    if State.json or json:
        print_json(comparison.as_json())
    else:
        print(comparison_markdown(comparison) if markdown else comparison_text(comparison))


@app.command(rich_help_panel=LOOK, epilog="Example: mpq-deploy metrics runs/mine --images 2048 --real photos/")
def metrics(
    run: RunArgument,
    network: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--network",
            metavar="NAME",
            help="demo, efficientnet-lite0, inception, clip or dinov2; repeatable. none: scores alone.",
            show_default="demo for the bundled models, else efficientnet-lite0",
        ),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=2, help="Images of each model.")] = 512,
    real: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--real", metavar="PATH", help="Real images: a folder or .npz.", show_default=False),
    ] = None,
    weights: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--weights", metavar="NAME=PATH", help="A network's weights; repeatable.", show_default=False),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seed", min=0, help="Of the noise.", show_default="evaluate.seed"),
    ] = None,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="Processes that sample.",
            rich_help_panel=WORKERS,
            show_default="one per core",
        ),
    ] = None,
    ray: RayOption = None,
    threads: ThreadsOption = None,
    controls: Annotated[bool, typer.Option("--controls", help="Also the run's controls (INT8, INT4).")] = False,
    lpips: Annotated[bool, typer.Option("--lpips", help="Also LPIPS, image by image.")] = False,
    clip_score: Annotated[bool, typer.Option("--clip-score", help="Also how well images fit their prompts.")] = False,
) -> None:
    """Measure how the images are distributed: FID or another Frechet distance, KID, precision, recall.

    To the float model's images from the same noise, and to real ones; image by image with --lpips and --clip-score.
    Stopped, it goes on with the images that are finished. The result goes into the run's reports, beside what earlier
    calls measured otherwise: run it before 'mpq-deploy gate'.
    """
    from mpq_deploy.evaluate.metrics.measure_images import MetricsOptions, check_metrics, measure_metrics
    from mpq_deploy.evaluate.metrics.metric_text import metrics_text
    from mpq_deploy.evaluate.metrics.networks import LPIPS, parse_weights
    from mpq_deploy.evaluate.metrics.scores import CLIP_SCORE
    from mpq_deploy.run.pipeline import open_pipeline

    scores = tuple(name for name, asked in ((LPIPS, lpips), (CLIP_SCORE, clip_score)) if asked)
    given = parse_weights(weights or [])
    options = MetricsOptions(tuple(network or ()), images, real, given, seed, workers, controls, scores)
    settings = recipe_of(run, None)
    # A stage may take minutes: what is missing is said before.
    check_metrics(settings.model, options)
    crew = crew_for(workers, ray, threads)
    with open_pipeline(settings, run, make_talk(), crew) as pipeline:
        found = measure_metrics(pipeline.current("evaluate"), options)
        pipeline.run_until("report")
    if State.json:
        print_json(found.as_json())
    else:
        print(metrics_text(found))


@app.command(rich_help_panel=LOOK, epilog="Example: mpq-deploy gate runs/mine --max-size 0.36 --min-psnr 40")
def gate(
    run: ReportArgument,
    max_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--max-size", metavar="SIZE", help="As a budget: 0.36, 36%, 600MB.", show_default=False),
    ] = None,
    min_psnr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--min-psnr", metavar="DB", help="Mean over images.", show_default=False),
    ] = None,
    min_ssim: Annotated[Optional[float], typer.Option("--min-ssim", show_default=False)] = None,  # noqa: UP045
    max_nmse: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--max-nmse", help="Error of the output.", show_default=False),
    ] = None,
    max_frechet_increase: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--max-frechet-increase", help="Over the float model's, or the baseline's.", show_default=False),
    ] = None,
    max_latency: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--max-latency", metavar="TIME", help="Of one call: 120ms, 0.12s.", show_default=False),
    ] = None,
    allow_estimate: Annotated[
        bool, typer.Option("--allow-estimate", help="Take an estimated latency where none was measured.")
    ] = False,
    max_psnr_drop: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--max-psnr-drop", metavar="DB", help="Below the baseline.", show_default=False),
    ] = None,
    max_lpips: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--max-lpips", help="To the float model's images.", show_default=False),
    ] = None,
    max_clip_drop: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--max-clip-drop", help="CLIP score below the float model's.", show_default=False),
    ] = None,
    baseline: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--baseline", metavar="RUN", help="A run folder or report.json.", show_default=False),
    ] = None,
    junit: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--junit", metavar="FILE", help="JUnit XML to write.", show_default=False),
    ] = None,
    markdown: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--markdown", metavar="FILE", help="A summary to write.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Results on stdout as JSON.")] = False,
) -> None:
    """Hold a run against limits, for CI. What was not measured fails its limit.

    Exit code 0: every limit is kept; 1: one is not; 2: bad input.
    """
    from mpq_deploy.report.gate import Limits, check_gate, gate_junit, gate_markdown, gate_text
    from mpq_deploy.report.read import read_report
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
    former = None if baseline is None else read_report(baseline)
    result = check_gate(read_report(run), limits, former, allow_estimate)
    for path, text in ((junit, gate_junit(result)), (markdown, gate_markdown(result))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if State.json or json:
        print_json(result.as_json())
    else:
        print(gate_text(result))
    if not result.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK, epilog="Example: mpq-deploy check model.onnx --target jetson-agx-orin")
def check(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="Any ONNX file.", show_default=False)],
    target: TargetOption = "rtx",
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail, too (exit code 1).")] = False,
    json: Annotated[bool, typer.Option("--json", help="Results on stdout as JSON.")] = False,
) -> None:
    """Say per node what a target's TensorRT refuses, gets wrong, runs in FP16 or slowly.

    Exit code 1 when something is refused or wrong; with --strict also for warnings.
    """
    from mpq_deploy.check.check import check_model
    from mpq_deploy.engine.target import load_target

    result = check_model(model, load_target(target or "rtx"))
    if State.json or json:
        print_json(result.as_json(strict))
    else:
        print(result.text())
    if not result.passes(strict):
        raise typer.Exit(1)
