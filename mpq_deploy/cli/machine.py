"""Commands about this machine: what it has, and how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mpq_deploy.cli.app import MACHINE, State, app, make_talk, print_json, recipe_of
from mpq_deploy.cli.options import TargetOption

if TYPE_CHECKING:
    from mpq_deploy.system.doctor import Finding


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
    from mpq_deploy.run.pipeline import open_pipeline

    recipe = recipe_of(run, None)
    chosen = load_target(target or recipe.target)
    path = out or Path(f"{chosen.name}.latency.json")
    with open_pipeline(recipe, run, make_talk()) as pipeline:
        wanted = Profile(pipeline.current("calibrate"), chosen)
        if estimate:
            table = wanted.estimate()
            table.save(path)
        else:
            wanted.refuse_without_hardware()
            table = wanted.measure(path)
    if State.json:
        print_json({"file": str(path), "entries": len(table.entries), "source": table.source, "device": table.device})
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
    from mpq_deploy.bench.bench import Schedule, bench_text, measure, origin_of, results
    from mpq_deploy.bench.sources import Wish, parse_shapes, subject_of
    from mpq_deploy.system.files import canonical_json, write_text

    schedule = Schedule(calls, rounds, warm_up)
    wish = Wish(backend, device, batch, threads, cuda_graphs, parse_shapes(shape or []))
    if source.is_dir():
        from mpq_deploy.bench.from_run import subjects_of
        from mpq_deploy.run.pipeline import open_pipeline

        with open_pipeline(recipe_of(source, None), source, make_talk()) as pipeline:
            subjects, origin = subjects_of(pipeline.deployed(), wish)
    else:
        subjects = [subject_of(source, "ours", wish)]
        origin = origin_of(source, subjects[0].backend, subjects[0].device)
    if against is not None:
        subjects = [subjects[0], subject_of(against, "other", wish)]
    found = results(measure(subjects, schedule, make_talk()), origin)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, canonical_json(found))
    if State.json or json:
        print_json(found)
    else:
        print(bench_text(found))


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy targets rtx")
def targets(name: Annotated[Optional[str], typer.Argument(help="Show one target in full.")] = None) -> None:  # noqa: UP045
    """List the targets, or show what one target may take and what is proven of it."""
    from mpq_deploy.engine.target import known_targets, load_target

    if name is not None:
        target = load_target(name)
        if State.json:
            print_json(target.model_dump(mode="json"))
        else:
            from mpq_deploy.engine.target_text import describe_target

            print(describe_target(target))
        return
    rows = [load_target(known) for known in known_targets()]
    if State.json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{width}}  {row.dialect:<12}  {row.title}")


@app.command(rich_help_panel=MACHINE, epilog="Example: mpq-deploy doctor")
def doctor() -> None:
    """Say what this machine has, what it can build and what it can run."""
    from dataclasses import asdict

    from mpq_deploy.system.doctor import inspect_machine

    findings = inspect_machine()
    if State.json:
        print_json([asdict(finding) for finding in findings])
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
