"""Commands about this machine: what it has, and how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mpq_deploy.cli.app import (
    MACHINE,
    State,
    app,
    check_one_file,
    make_talk,
    print_each,
    print_json,
    print_result,
    print_text,
)
from mpq_deploy.cli.options import (
    AgainstOption,
    BackendOption,
    BatchOption,
    BenchOutOption,
    CallsOption,
    CpuThreadsOption,
    DeviceOption,
    JsonOption,
    OneTargetOption,
    RoundsOption,
    ShapeOption,
    TargetOption,
    WarmUpOption,
    output_file,
)
from mpq_deploy.errors import UsageError
from mpq_deploy.run.chosen_recipe import recipe_of

if TYPE_CHECKING:
    from mpq_deploy.bench.bench import Origin
    from mpq_deploy.bench.sources import Wish
    from mpq_deploy.bench.timed_subject import Subject
    from mpq_deploy.system.doctor import Finding


@app.command(
    rich_help_panel=MACHINE, epilog="Example: mpq-deploy profile runs/mine --target rtx-ada"
)
def profile(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="[RUN]", help="The run folder whose layers are timed.", show_default=True
        ),
    ] = Path("runs/emoji"),
    target: TargetOption = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Table to write.",
            callback=output_file,
            show_default="<target>.latency.json",
        ),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Write estimates instead; needs no GPU.")
    ] = False,
) -> None:
    """Time every distinct layer under every scheme on this GPU, for --latency-table.

    If interrupted, run it again to continue in the same file. Without the
    hardware it lists what would be measured.
    """
    from mpq_deploy.engine.target import load_target
    from mpq_deploy.latency.profile import Profile
    from mpq_deploy.run.pipeline import open_pipeline

    recipe = recipe_of(run, None)
    chosen = load_target(target or recipe.target)
    path = out or Path(f"{chosen.name}.latency.json")
    with open_pipeline(recipe, run, make_talk(), computes=False) as pipeline:
        profiling = Profile(pipeline.current("calibrate"), chosen)
        if estimate:
            table = profiling.estimate()
            table.save(path)
        else:
            profiling.refuse_without_hardware()
            table = profiling.measure(path)
    values = {"file": str(path), "entries": len(table.entries)}
    values |= {"source": table.source, "device": table.device}
    left = len(profiling.jobs) - len(table.entries)
    missing = f", {left} left out" if left > 0 else ""
    text = f"{path}  {len(table.entries)} rows {table.source}, of {table.device or 'no device'}{missing}"
    print_result(values, text)


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy bench runs/mine --calls 200")
def bench(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run folder, an engine, or an ONNX file.", show_default=False
        ),
    ],
    against: AgainstOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    batch: BatchOption = 1,
    calls: CallsOption = 100,
    rounds: RoundsOption = 20,
    warm_up: WarmUpOption = 10,
    threads: CpuThreadsOption = 0,
    shape: ShapeOption = None,
    cuda_graphs: Annotated[bool, typer.Option(help="Launch engines through CUDA graphs.")] = True,
    out: BenchOutOption = None,
    target: OneTargetOption = None,
    json: JsonOption = False,
) -> None:
    """Time a model on this machine, alternating with the float one: latency, throughput, memory.

    Without a GPU it times ONNX Runtime on the CPU, which says nothing about an
    engine.
    """
    from mpq_deploy.bench.bench import Schedule, bench_text, measure, results
    from mpq_deploy.bench.sources import Wish, parse_shapes, subject_of
    from mpq_deploy.run.folder import runs_at
    from mpq_deploy.system.files import canonical_json, write_text

    schedule = Schedule(calls, rounds, warm_up)
    wish = Wish(backend, device, batch, threads, cuda_graphs, parse_shapes(shape or []))
    chosen, made = runs_at(source, target), {}
    check_one_file(out, chosen)
    for name, one in chosen.items():
        subjects, origin = _subjects(one, wish)
        if against is not None:
            subjects = [subjects[0], subject_of(against, "other", wish)]
        result = results(measure(subjects, schedule, make_talk()), origin)
        if out is not None:
            write_text(out, canonical_json(result))
        made[name] = (result, bench_text(result))
    print_each(made, json)


def _subjects(source: Path, wish: Wish) -> tuple[list[Subject], Origin]:
    """Return the model of a run, an engine or an ONNX file that is timed, and its origin."""
    from mpq_deploy.bench.bench import origin_of
    from mpq_deploy.bench.from_run import subjects_of
    from mpq_deploy.bench.sources import subject_of
    from mpq_deploy.run.pipeline import open_pipeline

    if source.is_dir():
        settings = recipe_of(source, None)
        with open_pipeline(settings, source, make_talk(), computes=False) as pipeline:
            return subjects_of(pipeline.deployed(), wish)
    subject = subject_of(source, "ours", wish)
    return [subject], origin_of(source, subject.backend, subject.device)


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy targets rtx")
def targets(
    name: Annotated[Optional[str], typer.Argument(help="Target to show in full.")] = None,
    take: Annotated[
        Optional[Path],
        typer.Option(
            "--take",
            metavar="FILE",
            help="Write a target from a probe's results.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The YAML to write, with --take.",
            show_default="TARGET-proven.yaml",
            callback=output_file,
        ),
    ] = None,
) -> None:
    """List the targets, or show what one target supports and which of it is proven."""
    from mpq_deploy.engine.target import known_targets, load_target

    if (take is None and out is not None) or (take is not None and name is not None):
        raise UsageError(
            "targets takes a name, or --take FILE with --out.", "See mpq-deploy targets --help."
        )
    if take is not None:
        _take(take, out)
        return
    if name is not None:
        target = load_target(name)
        if State.json:
            print_json(target.model_dump(mode="json"))
        else:
            from mpq_deploy.engine.target_text import describe_target

            print_text(describe_target(target))
        return
    rows = [load_target(known) for known in known_targets()]
    if State.json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        print_text(f"{row.name:<{width}}  {row.dialect:<12}  {row.title}")


def _take(results_file: Path, out: Path | None) -> None:
    """Write a target from a probe's results, and print both."""
    from mpq_deploy.delivery.probe_results import take_probe

    written, results = take_probe(results_file, out)
    lines = [f"{form:<18}{found.said}" for form, found in results.forms.items()]
    if not results.finished:
        lines.append("not finished: run run.sh on the device again to try the remaining forms")
    lines.append(f"target  {written}  (use it as --target ./{written.name})")
    print_result({"file": str(written), **results.model_dump(mode="json")}, "\n".join(lines))


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy doctor")
def doctor() -> None:
    """List what this machine has, can build and can run."""
    from dataclasses import asdict

    from mpq_deploy.system.doctor import inspect_machine

    findings = inspect_machine()
    if State.json:
        print_json([asdict(finding) for finding in findings])
        return
    _print_findings(findings)


def _print_findings(findings: list[Finding]) -> None:
    """Return one group after the other as text; targets as a table of what can be built and run here."""
    plain = [finding for finding in findings if finding.group != "targets"]
    width = max(len(finding.name) for finding in plain)
    group = ""
    for finding in plain:
        if finding.group != group:
            group = finding.group
            print_text(f"{group}:")
        print_text(f"  {finding.name:<{width}}  {finding.value}")
        for line in finding.hint.splitlines() if finding.status != "ok" else ():
            print_text(f"  {'':<{width}}  {line}")
    print_text("targets:")
    for finding in findings:
        if finding.group == "targets":
            name, what = finding.name.split(": ")
            print_text(f"  {name:<17} {what:<10}  {finding.value}")
