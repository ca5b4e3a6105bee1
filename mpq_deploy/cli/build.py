"""Commands that run stages over a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mpq_deploy.cli.app import (
    STAGES,
    app,
    check_one_file,
    make_talk,
    print_each,
    print_result,
    recovering,
    run_build,
    run_on,
    run_targets,
    run_until,
)
from mpq_deploy.cli.options import (
    HERE,
    BudgetOption,
    CallOption,
    Compute,
    ComputeOption,
    ConditionsOption,
    ConfigOption,
    CorrectionKind,
    DryRunOption,
    EffortOption,
    LatencyTableOption,
    LoraOption,
    LoraSlotsOption,
    MaxLatencyOption,
    ModelArgument,
    ObjectiveOption,
    OneTargetOption,
    OnlyOption,
    OutOption,
    PinnedOption,
    PromptsOption,
    RecipeOption,
    RecordedOption,
    RunArgument,
    SchedulerOption,
    SensitivityOption,
    SignOption,
    SizesOption,
    TargetOption,
    TargetsOption,
    TimeOption,
    latency_settings,
    pinned_parts,
    signing_key,
    with_compute,
)
from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.run.chosen_recipe import recipe_of, runs_to_build

if TYPE_CHECKING:
    pass


@app.command(
    epilog="Example: mpq-deploy build ./my-pipeline --budget 0.35 --target rtx -o runs/mine"
)
@with_compute
def build(
    model: ModelArgument = None,
    budget: BudgetOption = None,
    recipe: RecipeOption = None,
    target: TargetsOption = None,
    out: OutOption = None,
    sensitivity: SensitivityOption = None,
    conditions: ConditionsOption = None,
    scheduler: SchedulerOption = None,
    prompts: PromptsOption = None,
    call: CallOption = None,
    calls: RecordedOption = None,
    config: ConfigOption = None,
    lora: LoraOption = None,
    sizes: SizesOption = None,
    lora_slots: LoraSlotsOption = None,
    only: OnlyOption = None,
    component: PinnedOption = None,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Also train the quantized model towards the float one.",
            show_default=False,
        ),
    ] = False,
    max_latency: MaxLatencyOption = None,
    objective: ObjectiveOption = None,
    latency_table: LatencyTableOption = None,
    compute: Compute = HERE,
    effort: EffortOption = None,
    time: TimeOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Run all stages: export, measure, fit the budget, quantize, build the engine, compare, report.

    A second call on the same run folder repeats only what changed: another budget takes seconds.
    Without a model or a recipe it uses those of the run.
    """
    given: dict[str, Any] = {"model": model, "budget": budget, "target": target}
    given |= {"measure.method": sensitivity, "conditions": conditions, "scheduler": scheduler}
    given |= {"prompts": prompts, "call": call, "calls": calls, "component": only}
    given |= {"pinned": pinned_parts(component), "sizes": sizes}
    given |= {"lora": lora or None, "config": config, "compute.device": compute.device}
    given |= latency_settings(max_latency, objective, latency_table)
    given |= {"effort": effort, "time": time, "lora_slots": lora_slots}
    run_build(out, recipe, given, compute.crew(), recover, dry_run)


@app.command(epilog="Example: mpq-deploy recipe sdxl-rtx > mine.yaml")
def recipe(
    name: Annotated[
        Optional[str],
        typer.Argument(metavar="NAME|FILE", help="Print this recipe in full.", show_default=False),
    ] = None,
) -> None:
    """List the bundled recipes, or print one with every default and a comment per setting."""
    from mpq_deploy.recipe import bundled_recipes, load_recipe, recipe_file, recipe_heading

    if name is None:
        rows = {known: recipe_heading(path)[0] for known, path in bundled_recipes().items()}
        width = max(map(len, rows))
        lines = "\n".join(f"{known:<{width}}  {about}" for known, about in rows.items())
        print_result(rows, lines)
        return
    settings = load_recipe(name)
    heading = "\n".join(f"# {line}".rstrip() for line in recipe_heading(recipe_file(name)))
    print_result(settings.model_dump(mode="json"), f"{heading}\n\n{settings.explained()}".strip())


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy export ./my-pipeline -o runs/mine")
def export(
    model: ModelArgument = None,
    recipe: RecipeOption = None,
    out: OutOption = None,
    conditions: ConditionsOption = None,
    scheduler: SchedulerOption = None,
    prompts: PromptsOption = None,
    call: CallOption = None,
    calls: RecordedOption = None,
    config: ConfigOption = None,
    lora: LoraOption = None,
    sizes: SizesOption = None,
    only: OnlyOption = None,
) -> None:
    """Export the denoiser to ONNX and check it against the original.

    Without a model or a recipe it uses those of the run.
    """
    given: dict[str, Any] = {"model": model, "lora": lora or None, "component": only}
    given |= {"sizes": sizes, "conditions": conditions, "scheduler": scheduler}
    given |= {"prompts": prompts}
    given |= {"call": call, "calls": calls, "config": config}
    run, runs = runs_to_build(out, recipe, given)
    run_targets("export", runs, run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy calibrate runs/mine")
@with_compute
def calibrate(
    run: RunArgument,
    recipe: RecipeOption = None,
    compute: Compute = HERE,
) -> None:
    """Record float trajectories and the statistics of every activation."""
    run_on("calibrate", run, recipe, {"compute.device": compute.device}, compute.crew())


@app.command(
    rich_help_panel=STAGES, epilog="Example: mpq-deploy measure runs/mine --sensitivity probe"
)
@with_compute
def measure(
    run: RunArgument,
    recipe: RecipeOption = None,
    sensitivity: SensitivityOption = None,
    compute: Compute = HERE,
) -> None:
    """Round every candidate weight and predict what each scheme of each layer costs."""
    given = {"measure.method": sensitivity, "compute.device": compute.device}
    run_on("measure", run, recipe, given, compute.crew())


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy allocate runs/mine --budget 0.3")
def allocate(
    run: RunArgument,
    budget: BudgetOption = None,
    recipe: RecipeOption = None,
    max_latency: MaxLatencyOption = None,
    objective: ObjectiveOption = None,
    latency_table: LatencyTableOption = None,
) -> None:
    """Choose a scheme for every layer within the budget, and within a latency limit if one is given."""
    latency = latency_settings(max_latency, objective, latency_table)
    run_on("allocate", run, recipe, {"budget": budget, **latency})


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy quantize runs/mine")
def quantize(run: RunArgument, recipe: RecipeOption = None) -> None:
    """Write the quantized ONNX graphs of the plan."""
    run_on("quantize", run, recipe, {})


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy recover runs/mine --steps 300")
def recover(
    run: RunArgument,
    steps: Annotated[
        Optional[int],
        typer.Option(
            "--steps",
            min=0,
            help="Updates; 0 restores the plan's weights.",
            show_default="the recipe's",
        ),
    ] = None,
    loss: Annotated[
        Optional[list[str]],
        typer.Option(
            "--loss",
            metavar="NAME[=WEIGHT]",
            help="Loss: output, eps, v, sample, relation or memory; repeatable.",
            show_default="output",
        ),
    ] = None,
    recipe: RecipeOption = None,
    device: ComputeOption = None,
) -> None:
    """Train the quantized model towards the float one: same plan, same bytes, less error."""
    settings = recipe_of(
        run,
        recipe,
        {"recover.steps": steps, "recover.losses": losses_of(loss), "compute.device": device},
    )
    if steps == 0:
        run_until("quantize", settings, run)
    else:
        run_until("recover", recovering(settings), run)


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy engine runs/mine --target rtx")
def engine(run: RunArgument, target: TargetOption = None, recipe: RecipeOption = None) -> None:
    """Build the TensorRT engine and verify it from its build log."""
    if target is not None:
        recipe_of(run, recipe)
    run_on("engine", run, recipe, {"target": target})


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy evaluate runs/mine")
@with_compute
def evaluate(
    run: RunArgument,
    recipe: RecipeOption = None,
    correction: Annotated[
        Optional[CorrectionKind],
        typer.Option(
            "--correction",
            help="Correction of the sampler to evaluate as well.",
            show_default=False,
        ),
    ] = None,
    compute: Compute = HERE,
) -> None:
    """Compare the quantized model with the float one, and with everything-INT8 and everything-INT4."""
    given = {"evaluate.correction": correction, "compute.device": compute.device}
    run_on("evaluate", run, recipe, given, compute.crew())


@app.command(rich_help_panel=STAGES, epilog="Example: mpq-deploy report runs/mine")
def report(
    run: RunArgument,
    recipe: RecipeOption = None,
    device: Annotated[
        Optional[list[Path]],
        typer.Option(
            "--device", metavar="FILE", help="Include a device's results.json.", show_default=False
        ),
    ] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Report existing stages only; run none.")
    ] = False,
    target: OneTargetOption = None,
    sign: SignOption = None,
) -> None:
    """Write report.html, report.md and report.json; for several targets also an overview page."""
    from mpq_deploy.run.folder import PIPELINE, runs_at
    from mpq_deploy.run.pipeline import open_pipeline

    wholes = [one for one in runs_at(run, target).values() if (one / PIPELINE).is_file()]
    if wholes and not (as_is or sign):
        _report_wholes(run, wholes, device or [], recipe)
        return
    key, chosen, made = signing_key(sign), runs_at(run, target), {}
    if device:
        check_one_file(device[0], chosen)
    for name, one in chosen.items():
        settings = recipe_of(one, recipe)
        with open_pipeline(settings, one, make_talk(), computes=False) as pipeline:
            if device:
                from mpq_deploy.delivery.device_results import take_in

                for path in device:
                    take_in(pipeline.deployed(), path)
            summary = pipeline.report_as_is() if as_is else pipeline.run_until("report")
        made[name] = (summary.values, summary.text)
        if key is not None:
            from mpq_deploy.device.signature import sign as sign_file

            make_talk().line(f"signed: {sign_file(one / 'report.json', key)}")
    if "" not in made:
        from mpq_deploy.report.targets_page import write_targets

        make_talk().line(f"all targets: {write_targets(run)}")
    print_each(made)


def _report_wholes(run: Path, wholes: list[Path], device: list[Path], recipe: str | None) -> None:
    """Take results of devices into whole pipelines' runs, and write their reports."""
    from mpq_deploy.delivery.whole_results import take_in_whole

    if device:
        check_one_file(device[0], {one.name: one for one in wholes})
    for path in device:
        take_in_whole(wholes[0], path, make_talk())
    run_on("report", run if len(wholes) > 1 else wholes[0], recipe, {})


def losses_of(given: list[str] | None) -> dict[str, float] | None:
    """Read NAME or NAME=WEIGHT; None if no loss was given."""
    from mpq_deploy.recipe import LOSSES

    losses: dict[str, float] = {}
    for text in given or ():
        name, _, weight = text.partition("=")
        if name not in LOSSES:
            raise UsageError(
                f"--loss {text} does not name a loss.",
                f"{nearest(name, LOSSES)}Known: {', '.join(LOSSES)}.",
            )
        try:
            losses[name] = float(weight or 1.0)
        except ValueError as error:
            raise UsageError(
                f"The weight in --loss {text} is not a number.",
                "Write NAME=WEIGHT, such as relation=0.1.",
            ) from error
    return losses or None
