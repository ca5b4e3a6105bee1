"""The command line application: its global options, and what every command uses."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpq_deploy.errors import UsageError
from mpq_deploy.run.chosen_recipe import going_on, parts_to_build, recipe_of, runs_to_build
from mpq_deploy.system.libraries import quiet_libraries, show_libraries
from mpq_deploy.system.names import printable
from mpq_deploy.system.progress import LINE_ENDS
from mpq_deploy.system.release import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpq_deploy.models.pipeline_parts import Parts
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.report.collect import Summary
    from mpq_deploy.run.forecast import Ahead
    from mpq_deploy.system.parallel.work import Crew
    from mpq_deploy.system.progress import Talk

STAGES = "Stages (on one run folder)"
LOOK = "Look at results"
DEVICE = "Deploy to a device"
MACHINE = "This machine"

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


class State:
    """The global options, given before the command."""

    quiet = False
    json = False
    debug = False


def _version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _main(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show warnings alone on stderr, no progress.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print results on stdout as JSON.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the logs of libraries.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    State.quiet, State.json, State.debug = quiet, json, debug
    if debug:
        show_libraries()
    else:
        quiet_libraries()


def recovering(settings: Recipe) -> Recipe:
    """Return the recipe with recovery on: its own number of steps, or the default."""
    from mpq_deploy.recipe import RECOVER_STEPS

    steps = settings.recover.steps or RECOVER_STEPS
    return settings.model_copy(
        update={"recover": settings.recover.model_copy(update={"steps": steps})}
    )


def run_build(
    out: Path | None,
    recipe: str | None,
    options: Mapping[str, Any],
    crew: Crew | None,
    recover: bool,
    dry_run: bool,
) -> None:
    """Run all stages, or forecast them; with no target named, for all targets of an existing run."""
    run, runs = runs_to_build(out, recipe, options)
    if recover:
        runs = [(recovering(settings), folder) for settings, folder in runs]
    if dry_run:
        print_forecast(runs, run, crew)
    else:
        run_targets("report", runs, run, crew)


def run_until(stage: str, settings: Recipe, out: Path | None, crew: Crew | None = None) -> None:
    """Run all stages up to ``stage`` and print the result."""
    from mpq_deploy.run.pipeline import default_run
    from mpq_deploy.run.several_targets import runs_of

    run = out or default_run(settings)
    run_targets(stage, runs_of(settings, run), run, crew)


def run_targets(
    stage: str, runs: list[tuple[Recipe, Path]], run: Path, crew: Crew | None = None
) -> None:
    """Run all stages up to ``stage`` for each of ``runs``: ``run`` itself, or its targets."""
    from mpq_deploy.run.folder import open_targets
    from mpq_deploy.run.recipe_check import check_recipe

    if runs[0][1] == run:
        print_summary(_run_one(stage, *runs[0], crew))
        return
    for own, _ in runs:
        check_recipe(own)
    with open_targets(run):
        _run_all(stage, runs, crew)


def run_on(
    stage: str, run: Path, recipe: str | None, options: Mapping[str, Any], crew: Crew | None = None
) -> None:
    """Run all stages up to ``stage`` on a run folder, or for each of its targets."""
    from mpq_deploy.run.folder import several_in

    several = several_in(run)
    if several:
        runs = [(going_on(recipe_of(one, recipe, options), options), one) for one in several]
        _run_all(stage, runs, crew)
    else:
        print_summary(_run_one(stage, recipe_of(run, recipe, options), run, crew))


def _run_whole(
    stage: str,
    settings: Recipe,
    run: Path,
    crew: Crew | None,
    parts: Parts,
    coming: Sequence[tuple[Recipe, Path]],
) -> Summary:
    """Run the stages of all parts of a whole pipeline."""
    from mpq_deploy.report.collect import Summary
    from mpq_deploy.report.parts_page import pipeline_text, write_pipeline
    from mpq_deploy.run.several_parts import build_first

    view = build_first([(settings, run), *coming], parts, stage, make_talk(), crew)
    if stage == "report":
        write_pipeline(run, view)
    values = view.model_dump(mode="json", exclude={"recipe"})
    return Summary(pipeline_text(view, run), values)


def _run_one(
    stage: str,
    settings: Recipe,
    run: Path,
    crew: Crew | None,
    coming: Sequence[tuple[Recipe, Path]] = (),
) -> Summary:
    from mpq_deploy.run.pipeline import open_pipeline

    if parts := parts_to_build(settings, run):
        return _run_whole(stage, settings, run, crew, parts, coming)
    opened = open_pipeline(settings, run, make_talk(), crew, computes=False, coming=coming)
    with opened as pipeline:
        return pipeline.run_until(stage)


def _run_all(stage: str, runs: list[tuple[Recipe, Path]], crew: Crew | None) -> None:
    """Run the stages for one target after the other, and print all results."""
    from mpq_deploy.recipe import load_recipe
    from mpq_deploy.run.effort import with_counts_of

    made: dict[str, Summary] = {}
    first = runs[0][1] / "recipe.yaml"
    for number, (settings, run) in enumerate(runs, 1):
        make_talk().line(f"target {run.name}")
        # Counts are fitted once, for the first target: what targets share needs the same counts.
        # Parts of a whole pipeline see to that themselves.
        if made and first.is_file():
            settings = with_counts_of(settings, load_recipe(first))
        made[run.name] = _run_one(stage, settings, run, crew, runs[number:])
    if stage == "report":
        from mpq_deploy.report.targets_page import write_targets

        write_targets(runs[0][1].parent.parent)
    print_each({name: (summary.values, summary.text) for name, summary in made.items()})


def print_forecast(runs: list[tuple[Recipe, Path]], run: Path, crew: Crew | None) -> None:
    """Export the model, and print the forecast of a whole build, of several targets for the first."""
    from mpq_deploy.run.folder import open_targets
    from mpq_deploy.run.pipeline import open_pipeline
    from mpq_deploy.run.several_parts import forecast_whole

    own, folder = runs[0]
    with open_targets(run) if folder != run else nullcontext():
        if parts := parts_to_build(own, folder):
            _print_forecasts(forecast_whole(own, folder, parts, make_talk(), crew))
            return
        with open_pipeline(own, folder, make_talk(), crew) as pipeline:
            ahead = pipeline.dry_run()
    print_result(ahead.values(), "\n".join(ahead.lines))


def _print_forecasts(ahead: Mapping[str, Ahead]) -> None:
    """Print what the run of each part of a whole pipeline would take."""
    text = "\n\n".join("\n".join([f"part {name}", *one.lines]) for name, one in ahead.items())
    print_result({"parts": {name: one.values() for name, one in ahead.items()}}, text)


def print_summary(summary: Summary) -> None:
    """Print the result of stages."""
    print_result(summary.values, summary.text)


def make_talk() -> Talk:
    """Return where progress goes: nowhere (warnings alone), to a terminal, or into plain lines."""
    from mpq_deploy.system.progress import PlainTalk, RichTalk, WarningTalk

    if State.quiet:
        return WarningTalk()
    return RichTalk() if sys.stderr.isatty() else PlainTalk()


def print_result(values: Any, text: str, json: bool = False) -> None:
    """Print a result on stdout: its text, or with either --json its values as JSON."""
    if not (State.json or json):
        print_text(text)
        return
    from json import dumps

    print(dumps(values, indent=1, sort_keys=True))


def print_each(made: Mapping[str, tuple[Any, str]], json: bool = False) -> None:
    """Print the values and text of one run (under the name ""), or of several targets by name."""
    if "" in made:
        print_result(*made[""], json)
        return
    values = {name: values for name, (values, _) in made.items()}
    text = "\n\n".join(f"target {name}\n{text}" for name, (_, text) in made.items())
    print_result({"targets": values}, text, json)


def check_one_file(out: Path | None, runs: Mapping[str, Path]) -> None:
    """Raise UsageError if results of several targets would go into one file."""
    if out is not None and len(runs) > 1:
        raise UsageError(
            f"{out} cannot hold the results of {len(runs)} targets.",
            f"Name one with --target: {', '.join(runs)}.",
        )


def print_text(text: str) -> None:
    """Print text for people on stdout, with control characters in names shown as escapes."""
    print(printable(text, LINE_ENDS))


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print_result(value, "", json=True)
