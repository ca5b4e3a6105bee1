"""The command line: parse, call, print. stdout carries data, stderr carries talk."""

from __future__ import annotations

import shlex
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mpq_deploy import __version__
from mpq_deploy.errors import MpqError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpq_deploy.doctor import Finding
    from mpq_deploy.pipeline import Summary
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.talk import Talk

STAGES = "Stages (over one run folder)"
LOOK = "Look at results"
DEVICE = "To a device"
MACHINE = "This machine"
OF_MODEL = "What the model does not bring"

app = typer.Typer(
    name="mpq-deploy",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Put a diffusion model on an edge GPU: a TensorRT engine of the size you ask for, with the least damage "
    "to its images, and a report that proves it.\n\n"
    "Start with: [bold]mpq-deploy build --budget 0.35[/bold] (the bundled demo model).",
)


class Sensitivity(str, Enum):
    """Values of --sensitivity."""

    probe = "probe"
    gain = "gain"
    local_error = "local_error"
    exhaustive = "exhaustive"
    kurtosis = "kurtosis"
    orm = "orm"
    size_only = "size-only"
    random = "random"


class CorrectionKind(str, Enum):
    """Values of --correction."""

    none = "none"
    ptqd = "ptqd"


class State:
    """Options that stand before the command."""

    quiet = False
    json = False
    debug = False


ModelArgument = Annotated[
    Optional[str],  # noqa: UP045  (typer reads annotations at run time on Python 3.10)
    typer.Argument(
        metavar="MODEL",
        help="A diffusers folder, an ONNX file with its YAML, a hub id, or a bundled demo (emoji, digits). "
        "Default: emoji.",
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)]
ReportArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or a report.json.", show_default=False)
]
BudgetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--budget",
        "-b",
        metavar="SIZE",
        help="Size of all constants: a fraction of the FP16 size (0.35), a size (600MB), or bits per weight (4.5bits).",
        show_default="0.35",
    ),
]
RecipeOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--recipe", "-r", metavar="FILE", help="A recipe (YAML). Options win over it.", show_default=False),
]
TargetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--target", "-t", metavar="NAME", help="What the engine runs on: see 'mpq-deploy targets'.", show_default="rtx"
    ),
]
OutOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", "-o", metavar="RUN", help="The run folder.", show_default="runs/<model>"),
]
ConditionsOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--conditions",
        metavar="FILE.npz",
        help="Arrays by input name, one row per condition.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
SchedulerOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--scheduler",
        metavar="PATH",
        help="A scheduler_config.json, or the folder that holds it.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
PromptsOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts for calibration and images, one per line.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
ComponentOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--component",
        metavar="PART",
        help="A part of a pipeline: vae, text_encoder ...",
        show_default="the one that denoises",
    ),
]
SensitivityOption = Annotated[
    Optional[Sensitivity],  # noqa: UP045
    typer.Option("--sensitivity", help="How losses are predicted.", show_default="probe"),
]


class Objective(str, Enum):
    """Values of --objective."""

    loss = "loss"
    latency = "latency"


MaxLatencyOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-latency", metavar="TIME", help="Limit on one call, such as 120ms.", show_default=False),
]
ObjectiveOption = Annotated[
    Optional[Objective],  # noqa: UP045
    typer.Option("--objective", help="What is least within the budget.", show_default="loss"),
]
LatencyTableOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--latency-table", metavar="FILE", help="From 'mpq-deploy profile'.", show_default="estimates"),
]


def _latency_settings(max_latency: str | None, objective: Objective | None, table: Path | None) -> dict[str, Any]:
    return {
        "allocate.max_latency": max_latency,
        "allocate.objective": objective.value if objective else None,
        "allocate.latency_table": str(table) if table else None,
    }


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _main(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Results on stdout as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    State.quiet, State.json, State.debug = quiet, json, debug


@app.command(epilog="Example: mpq-deploy build ./my-pipeline --budget 0.35 --target rtx -o runs/mine")
def build(
    model: ModelArgument = None,
    budget: BudgetOption = None,
    recipe: RecipeOption = None,
    target: TargetOption = None,
    out: OutOption = None,
    sensitivity: SensitivityOption = None,
    conditions: ConditionsOption = None,
    scheduler: SchedulerOption = None,
    prompts: PromptsOption = None,
    component: ComponentOption = None,
    recover: Annotated[
        bool,
        typer.Option("--recover", help="Also train the plan's model back towards the float one.", show_default=False),
    ] = False,
    max_latency: MaxLatencyOption = None,
    objective: ObjectiveOption = None,
    latency_table: LatencyTableOption = None,
) -> None:
    """Do everything: export, measure, fit the budget, quantize, build the engine, compare, report.

    A second call on the same run folder repeats only what changed: another budget takes seconds.
    """
    additions = {"conditions": conditions, "scheduler": scheduler, "prompts": prompts, "component": component}
    latency = _latency_settings(max_latency, objective, latency_table)
    settings = _recipe(recipe, model, budget, target, sensitivity, additions, latency)
    _run_until("report", _recovering(settings) if recover else settings, out)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy export ./my-pipeline -o runs/mine")
def export(
    model: ModelArgument = None,
    recipe: RecipeOption = None,
    out: OutOption = None,
    conditions: ConditionsOption = None,
    scheduler: SchedulerOption = None,
    prompts: PromptsOption = None,
    component: ComponentOption = None,
) -> None:
    """Export the denoiser to ONNX and check it against the original."""
    additions = {"conditions": conditions, "scheduler": scheduler, "prompts": prompts, "component": component}
    _run_until("export", _recipe(recipe, model, None, None, None, additions), out)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy calibrate runs/mine")
def calibrate(run: RunArgument, recipe: RecipeOption = None) -> None:
    """Record float trajectories and the statistics of every activation."""
    _run_until("calibrate", _recipe_of(run, recipe), run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy measure runs/mine --sensitivity probe")
def measure(run: RunArgument, recipe: RecipeOption = None, sensitivity: SensitivityOption = None) -> None:
    """Round every candidate weight and predict what each scheme of each layer costs."""
    method = sensitivity.value if sensitivity else None
    _run_until("measure", _recipe_of(run, recipe, {"measure.method": method}), run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy allocate runs/mine --budget 0.3")
def allocate(
    run: RunArgument,
    budget: BudgetOption = None,
    recipe: RecipeOption = None,
    max_latency: MaxLatencyOption = None,
    objective: ObjectiveOption = None,
    latency_table: LatencyTableOption = None,
) -> None:
    """Choose a scheme for every layer within the budget, and within a latency where one is given."""
    latency = _latency_settings(max_latency, objective, latency_table)
    _run_until("allocate", _recipe_of(run, recipe, {"budget": budget, **latency}), run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy quantize runs/mine")
def quantize(run: RunArgument, recipe: RecipeOption = None) -> None:
    """Write the quantized ONNX graphs of the plan."""
    _run_until("quantize", _recipe_of(run, recipe), run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy recover runs/mine --steps 300")
def recover(
    run: RunArgument,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--steps", min=0, help="Updates; 0 goes back to the plan's weights.", show_default="the recipe's"),
    ] = None,
    loss: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--loss",
            metavar="NAME[=WEIGHT]",
            help="What is matched: output, eps, v, sample, relation, memory. May be given several times.",
            show_default="output",
        ),
    ] = None,
    recipe: RecipeOption = None,
) -> None:
    """Train the plan's model back towards the float one: same plan, same bytes, less error."""
    settings = _recipe_of(run, recipe, {"recover.steps": steps, "recover.losses": _losses(loss)})
    if steps == 0:
        _run_until("quantize", settings, run)
    else:
        _run_until("recover", _recovering(settings), run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy engine runs/mine --target rtx")
def engine(run: RunArgument, target: TargetOption = None, recipe: RecipeOption = None) -> None:
    """Build the TensorRT engine and verify it from its build log."""
    _run_until("engine", _recipe_of(run, recipe, {"target": target}), run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy evaluate runs/mine")
def evaluate(
    run: RunArgument,
    recipe: RecipeOption = None,
    correction: Annotated[
        Optional[CorrectionKind],  # noqa: UP045
        typer.Option("--correction", help="Also with the sampler corrected (ptqd), or no more.", show_default=False),
    ] = None,
) -> None:
    """Compare the quantized model with the float one, beside everything-INT8 and everything-INT4."""
    kind = correction.value if correction else None
    _run_until("evaluate", _recipe_of(run, recipe, {"evaluate.correction": kind}), run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy report runs/mine")
def report(
    run: RunArgument,
    recipe: RecipeOption = None,
    device: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--device", metavar="FILE", help="A results.json from a device, to take in.", show_default=False),
    ] = None,
    as_is: Annotated[bool, typer.Option("--as-is", help="Of what is there; make no stage.")] = False,
) -> None:
    """Write report.html, report.md and report.json."""
    from mpq_deploy.pipeline import open_pipeline

    settings = _recipe_of(run, recipe)
    if device:
        from mpq_deploy.home_results import take_in
        from mpq_deploy.stages.common import deployed_stage

        with open_pipeline(settings, run, _talk()) as pipeline:
            pipeline.run_until(deployed_stage(pipeline))
            for path in device:
                take_in(pipeline, path)
    if as_is:
        with open_pipeline(settings, run, _talk()) as pipeline:
            _print_summary(pipeline.report_as_is())
    else:
        _run_until("report", settings, run)


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
) -> None:
    """Draw the curve of size against quality: measured once, each budget solved in seconds."""
    from mpq_deploy.pipeline import open_pipeline
    from mpq_deploy.sweep import parse_budgets, run_sweep, sweep_table

    chosen = parse_budgets(budgets)
    with open_pipeline(_recipe_of(run, recipe), run, _talk()) as pipeline:
        result = run_sweep(pipeline, chosen, evaluate, points, shlex.join(["mpq-deploy", *sys.argv[1:]]))
    if State.json:
        _print_json(result)
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
) -> None:
    """Compare every sensitivity with exhaustive measurement, and by the quality of the plans it leads to.

    Takes minutes for the bundled models, hours for large ones; stopped, it goes on where it was.
    """
    from mpq_deploy.audit.audit import AUDITED, AuditOptions, audit_recipe, audit_run, parse_methods, run_audit
    from mpq_deploy.pipeline import open_pipeline
    from mpq_deploy.report.audit import audit_table, write_audit
    from mpq_deploy.sweep import parse_budgets

    chosen = parse_methods(methods) if methods is not None else AUDITED
    options = AuditOptions(tuple(parse_budgets(budgets)), chosen, pairs, samples)
    settings = audit_recipe(recipe, model, changes or [])
    run = audit_run(settings, out)
    with open_pipeline(settings, run, _talk()) as pipeline:
        result = run_audit(pipeline, options, shlex.join(["mpq-deploy", *sys.argv[1:]]))
        write_audit(result, run)
    if State.json or json:
        _print_json(result.as_json())
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
    from mpq_deploy.pipeline import open_pipeline

    with open_pipeline(_recipe_of(run, None), run, _talk()) as pipeline:
        pipeline.sample(out, count, seed, steps, controls)
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
    from mpq_deploy.compare import compare_reports
    from mpq_deploy.report.comparison import comparison_markdown, comparison_page, comparison_text
    from mpq_deploy.report.read import read_report

    comparison = compare_reports([read_report(path) for path in runs])
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(comparison_page(comparison), encoding="utf-8")
    if State.json or json:
        _print_json(comparison.as_json())
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
            help="demo, efficientnet-lite0, inception, clip or dinov2; repeatable.",
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
        typer.Option("--workers", min=1, help="Processes that sample.", show_default="one per core"),
    ] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Also the run's controls (INT8, INT4).")] = False,
) -> None:
    """Measure how the images are distributed: FID or another Frechet distance, KID, precision, recall.

    To the float model's images from the same noise, and to real ones. Stopped, it goes on with the images that are
    finished. The result goes into the run's reports, and so before 'mpq-deploy gate'.
    """
    from mpq_deploy.metrics.measure import MetricsOptions, measure_metrics
    from mpq_deploy.metrics.networks import parse_weights
    from mpq_deploy.metrics.text import metrics_text
    from mpq_deploy.pipeline import open_pipeline

    options = MetricsOptions(tuple(network or ()), images, real, parse_weights(weights or []), seed, workers, controls)
    with open_pipeline(_recipe_of(run, None), run, _talk()) as pipeline:
        pipeline.run_until("evaluate")
        found = measure_metrics(pipeline, options)
        pipeline.run_until("report")
    if State.json:
        _print_json(found.as_json())
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
    from mpq_deploy.gate import Limits, check_gate, gate_junit, gate_markdown, gate_text, parse_latency
    from mpq_deploy.report.read import read_report

    latency = None if max_latency is None else parse_latency(max_latency)
    limits = Limits(max_size, min_psnr, min_ssim, max_nmse, max_frechet_increase, latency, max_psnr_drop)
    former = None if baseline is None else read_report(baseline)
    result = check_gate(read_report(run), limits, former, allow_estimate)
    for path, text in ((junit, gate_junit(result)), (markdown, gate_markdown(result))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if State.json or json:
        _print_json(result.as_json())
    else:
        print(gate_text(result))
    if not result.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=DEVICE, epilog="Example: mpq-deploy package runs/mine --target jetson-agx-orin")
def package(
    run: RunArgument,
    target: TargetOption = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="FILE", help="The archive.", show_default="<run>.mpq.tar"),
    ] = None,
) -> None:
    """Pack what a device needs into one archive: the graph, its checks, an installer."""
    from mpq_deploy.engine.target import load_target
    from mpq_deploy.package import make_package
    from mpq_deploy.pipeline import open_pipeline

    recipe = _recipe_of(run, None)
    with open_pipeline(recipe, run, _talk()) as pipeline:
        written = make_package(pipeline, load_target(target or recipe.target), out or Path(f"{run.name}.mpq.tar"))
    if State.json:
        _print_json(written)
    else:
        print(f"{written['file']}  {written['bytes']:,} bytes\nsha256 {written['sha256']}")


@app.command(rich_help_panel=DEVICE, epilog="Example: mpq-deploy install model.mpq.tar")
def install(
    archive: Annotated[Path, typer.Argument(metavar="MODEL.mpq.tar", help="The package.", show_default=False)],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="FOLDER", help="Where to.", show_default="beside the archive"),
    ] = None,
    force_memory: Annotated[
        bool, typer.Option("--force-memory", help="Build even if memory is estimated to be too small.")
    ] = False,
) -> None:
    """On the device: verify, build, check the layers, run the references, measure.

    Without mpq-deploy on the device: tar xf MODEL.mpq.tar, then ./build.sh. Exit code 1 when something differs.
    """
    from mpq_deploy.device.install import default_out, summary
    from mpq_deploy.device.install import install as install_package

    folder = out or default_out(archive)
    results = install_package(archive, folder, _talk(), force_memory)
    if State.json:
        _print_json(results)
    else:
        print(summary(results, folder))
    if not results["passed"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=DEVICE, epilog="Example: mpq-deploy deploy runs/mine --ssh nvidia@orin.local")
def deploy(
    run: RunArgument,
    ssh: Annotated[str, typer.Option("--ssh", metavar="USER@HOST", help="The device, as for ssh.")],
    target: TargetOption = None,
    ssh_command: Annotated[str, typer.Option("--ssh-command", help="The client, with options.")] = "ssh",
    folder: Annotated[str, typer.Option("--folder", help="The folder on the device.")] = "mpq-deploy",
    python: Annotated[str, typer.Option("--python", help="What runs the installer there.")] = "python3",
) -> None:
    """Package, copy, install on the device and fetch the results, over your own ssh.

    Host keys are checked as your ssh configuration says. A broken call goes on when repeated.
    """
    import shlex

    from mpq_deploy.deploy import Remote
    from mpq_deploy.deploy import deploy as deploy_run
    from mpq_deploy.device.install import summary
    from mpq_deploy.engine.target import load_target
    from mpq_deploy.pipeline import open_pipeline

    recipe = _recipe_of(run, None)
    remote = Remote(ssh, tuple(shlex.split(ssh_command)), folder, python)
    with open_pipeline(recipe, run, _talk()) as pipeline:
        results = deploy_run(pipeline, load_target(target or recipe.target), remote)
    if State.json:
        _print_json(results)
    else:
        print(summary(results, Path(folder)))
    if not results["passed"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy profile runs/mine --target rtx-ada")
def profile(
    run: Annotated[
        Path, typer.Argument(metavar="[RUN]", help="The run folder whose layers are timed.", show_default=True)
    ] = Path("runs/emoji"),
    target: TargetOption = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="FILE", help="The table.", show_default="<target>.latency.json"),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Write the estimates instead: needs no hardware, measures nothing.")
    ] = False,
) -> None:
    """Time every distinct layer under every scheme on this GPU, for --latency-table.

    Stopped, it goes on with the same file. Without the hardware it says what would be measured.
    """
    from mpq_deploy.engine.target import load_target
    from mpq_deploy.latency.profile import Profile
    from mpq_deploy.pipeline import open_pipeline

    recipe = _recipe_of(run, None)
    chosen = load_target(target or recipe.target)
    path = out or Path(f"{chosen.name}.latency.json")
    with open_pipeline(recipe, run, _talk()) as pipeline:
        pipeline.run_until("calibrate")
        wanted = Profile(pipeline, chosen)
        if estimate:
            table = wanted.estimate()
            table.save(path)
        else:
            wanted.refuse_without_hardware()
            table = wanted.measure(path)
    if State.json:
        _print_json({"file": str(path), "entries": len(table.entries), "source": table.source, "device": table.device})
    else:
        left = len(wanted.jobs) - len(table.entries)
        missing = f", {left} left out" if left > 0 else ""
        print(f"{path}  {len(table.entries)} rows {table.source}, of {table.device or 'no device'}{missing}")


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy bench runs/mine --calls 200")
def bench(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, an engine, or an ONNX file.", show_default=False)
    ],
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--against", metavar="FILE", help="What to alternate with.", show_default="the float model"),
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="onnxruntime, tensorrt_rtx, tensorrt, or auto.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, or auto.")] = "auto",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples per call.")] = 1,
    calls: Annotated[int, typer.Option("--calls", min=1, help="Timed calls of each.")] = 100,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns into which they are split.")] = 20,
    warm_up: Annotated[int, typer.Option("--warm-up", min=1, help="Calls before, told apart.")] = 10,
    threads: Annotated[int, typer.Option("--threads", min=0, help="On a CPU; 0: one per core.")] = 0,
    shape: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--shape", metavar="NAME:1x4x8x8", help="Where a file leaves it open.", show_default=False),
    ] = None,
    cuda_graphs: Annotated[bool, typer.Option(help="Launch engines by CUDA graphs.")] = True,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="FILE", help="Results, for 'report --device'.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Results on stdout as JSON.")] = False,
) -> None:
    """Time what this machine can run, in turns with the float model: latency, throughput, memory.

    Without a GPU that is ONNX Runtime on the CPU, which says nothing about an engine.
    """
    from mpq_deploy.artefacts import canonical_json, write_text
    from mpq_deploy.bench.bench import Schedule, bench_text, measure, origin_of, results
    from mpq_deploy.bench.sources import Wish, parse_shapes, subject_of

    schedule = Schedule(calls, rounds, warm_up)
    wish = Wish(backend, device, batch, threads, cuda_graphs, parse_shapes(shape or []))
    if source.is_dir():
        from mpq_deploy.bench.from_run import subjects_of
        from mpq_deploy.pipeline import open_pipeline

        with open_pipeline(_recipe_of(source, None), source, _talk()) as pipeline:
            subjects, origin = subjects_of(pipeline, wish)
    else:
        subjects = [subject_of(source, "ours", wish)]
        origin = origin_of(source, subjects[0].backend, subjects[0].device)
    if against is not None:
        subjects = [subjects[0], subject_of(against, "other", wish)]
    found = results(measure(subjects, schedule, _talk()), origin)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, canonical_json(found))
    if State.json or json:
        _print_json(found)
    else:
        print(bench_text(found))


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy targets rtx")
def targets(name: Annotated[Optional[str], typer.Argument(help="Show one target in full.")] = None) -> None:  # noqa: UP045
    """List the targets, or show what one target may take and what is proven of it."""
    from mpq_deploy.engine.target import known_targets, load_target

    if name is not None:
        target = load_target(name)
        if State.json:
            _print_json(target.model_dump(mode="json"))
        else:
            from mpq_deploy.engine.target_text import describe_target

            print(describe_target(target))
        return
    rows = [load_target(known) for known in known_targets()]
    if State.json:
        _print_json([row.model_dump(mode="json") for row in rows])
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{width}}  {row.dialect:<12}  {row.title}")


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
        _print_json(result.as_json(strict))
    else:
        print(result.text())
    if not result.passes(strict):
        raise typer.Exit(1)


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy doctor")
def doctor() -> None:
    """Say what this machine has, what it can build and what it can run."""
    from dataclasses import asdict

    from mpq_deploy.doctor import inspect_machine

    findings = inspect_machine()
    if State.json:
        _print_json([asdict(finding) for finding in findings])
        return
    _print_findings(findings)


def _print_findings(findings: list[Finding]) -> None:
    """One group after the other; targets as a table of what can be built and run here."""
    plain = [finding for finding in findings if finding.group != "targets"]
    width = max(len(finding.name) for finding in plain)
    group = ""
    for finding in plain:
        if finding.group != group:
            group = finding.group
            print(f"{group}:")
        print(f"  {finding.name:<{width}}  {finding.value}")
        if finding.hint and finding.status != "ok":
            print(f"  {'':<{width}}  {finding.hint}")
    print("targets:")
    for finding in findings:
        if finding.group == "targets":
            name, what = finding.name.split(": ")
            print(f"  {name:<17} {what:<10}  {finding.value}")


def _recipe(
    recipe: Path | None,
    model: str | None,
    budget: str | None,
    target: str | None,
    sensitivity: Sensitivity | None,
    additions: Mapping[str, Path | str | None],
    settings: dict[str, Any] | None = None,
) -> Recipe:
    from mpq_deploy.recipe import load_recipe

    return load_recipe(
        recipe,
        {
            "model": model,
            "budget": budget,
            "target": target,
            "measure.method": sensitivity.value if sensitivity else None,
            **{name: str(path) for name, path in additions.items() if path},
            **(settings or {}),
        },
    )


def _recipe_of(run: Path, recipe: Path | None, overrides: dict[str, Any] | None = None) -> Recipe:
    from mpq_deploy.recipe import load_recipe

    stored = run / "recipe.yaml"
    if recipe is None and not stored.is_file():
        raise UsageError(f"{run} is no run folder: it has no recipe.yaml.", "Make one with 'mpq-deploy build -o RUN'.")
    return load_recipe(recipe or stored, overrides)


def _recovering(settings: Recipe) -> Recipe:
    """Return the recipe with recovery on: its own number of steps, or the default."""
    from mpq_deploy.recipe import RECOVER_STEPS

    steps = settings.recover.steps or RECOVER_STEPS
    return settings.model_copy(update={"recover": settings.recover.model_copy(update={"steps": steps})})


def _losses(given: list[str] | None) -> dict[str, float] | None:
    """Read NAME or NAME=WEIGHT; None where none was given."""
    losses = {}
    for text in given or ():
        name, _, weight = text.partition("=")
        try:
            losses[name] = float(weight or 1.0)
        except ValueError as error:
            raise UsageError(f"The weight in --loss {text} is no number.", "Write for example relation=0.1.") from error
    return losses or None


def _run_until(stage: str, settings: Recipe, out: Path | None) -> None:
    from mpq_deploy.pipeline import default_run, open_pipeline

    run = out or default_run(settings)
    with open_pipeline(settings, run, _talk()) as pipeline:
        summary = pipeline.run_until(stage)
    _print_summary(summary)


def _print_summary(summary: Summary) -> None:
    if State.json:
        _print_json(summary.values)
    else:
        print(summary.text)


def _talk() -> Talk:
    from mpq_deploy.talk import PlainTalk, RichTalk, Talk

    if State.quiet:
        return Talk()
    return RichTalk() if sys.stderr.isatty() else PlainTalk()


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, sort_keys=True))


class _Stopped(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would turn into a silent exit."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def main() -> None:
    """Run the command line; our own errors become one message and an exit code, without a traceback."""
    signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except MpqError as error:
        if State.debug:
            raise
        sys.stderr.write(f"mpq-deploy: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"  {error.hint}\n")
        sys.exit(error.exit_code)
    except _Stopped:
        sys.stderr.write("mpq-deploy: stopped; the next call goes on from the last finished stage\n")
        sys.exit(130)
    except OSError as error:
        if State.debug:
            raise
        from mpq_deploy.artefacts import disk_error

        sys.stderr.write(f"mpq-deploy: {disk_error(error, Path())}\n")
        sys.exit(1)
