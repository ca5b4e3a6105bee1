"""Commands that bring a run to a device."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mpq_deploy.cli.app import (
    DEVICE,
    app,
    check_one_file,
    make_talk,
    print_each,
    print_result,
)
from mpq_deploy.cli.options import (
    RunArgument,
    SignOption,
    TargetOption,
    expanded,
    output_file,
    signing_key,
)
from mpq_deploy.errors import UsageError
from mpq_deploy.run.chosen_recipe import recipe_of

if TYPE_CHECKING:
    from mpq_deploy.device.signature import SecretKey


class Form(str, Enum):
    """Values of --format."""

    archive = "archive"
    triton = "triton"
    hub = "hub"


@app.command(
    rich_help_panel=DEVICE, epilog="Example: mpq-deploy package runs/mine --target jetson-agx-orin"
)
def package(
    run: RunArgument,
    target: TargetOption = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="What to write.",
            show_default="<run>.mpq.tar, <run>.triton or <run>.hub",
            callback=expanded,
        ),
    ] = None,
    sign: SignOption = None,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="archive: for a device. triton: a model repository for its server. hub: a folder to upload.",
        ),
    ] = Form.archive,
) -> None:
    """Pack a run: into one archive with its checks and an installer, or as a folder.

    Of a whole pipeline all components are packed, with reference images.
    """
    from mpq_deploy.run.folder import runs_at, several_in

    if form is not Form.archive:
        print_result(*_package_folder(form, run, target, out, sign))
        return
    out = output_file(out)
    key = signing_key(sign)
    if not several_in(run):
        print_result(*_package(run, target, out or Path(f"{run.name}.mpq.tar"), key))
        return
    chosen = runs_at(run, target)
    check_one_file(out, chosen)
    print_each(
        {
            name: _package(one, None, out or Path(f"{run.name}-{name}.mpq.tar"), key)
            for name, one in chosen.items()
        }
    )


def _package_folder(
    form: Form, run: Path, target: str | None, out: Path | None, sign: Path | None
) -> tuple[dict[str, Any], str]:
    """Write a run as a folder of ``form``; return what was written as values and as text."""
    from mpq_deploy.delivery.hub_folder import write_hub_folder
    from mpq_deploy.delivery.triton_repository import write_repository
    from mpq_deploy.run.folder import check_one_run, runs_at

    if sign is not None:
        raise UsageError(
            "--sign signs archives alone.", f"Leave it out with --format {form.value}."
        )
    chosen = runs_at(run, target)
    if len(chosen) > 1:
        check_one_run(run)
    [run] = chosen.values()
    recipe_of(run, None)
    write = write_repository if form is Form.triton else write_hub_folder
    written = write(run, out or Path(f"{run.absolute().name}.{form.value}"), make_talk())
    notes = "".join(f"\n{note}" for note in written["notes"])
    return written, f"{written['folder']}  {written['bytes']:,} bytes{notes}"


def _package(
    run: Path, target: str | None, out: Path, key: SecretKey | None
) -> tuple[dict[str, Any], str]:
    """Pack one run; return what was written as values and as text."""
    from mpq_deploy.delivery.package import check_builder, make_package
    from mpq_deploy.engine.target import load_target
    from mpq_deploy.run.pipeline import open_pipeline

    recipe = recipe_of(run, None)
    device = load_target(target or recipe.target)
    if (run / "pipeline.json").is_file():
        from mpq_deploy.delivery.whole_package import make_whole_package

        written = make_whole_package(run, device, out, make_talk())
    else:
        check_builder(device)
        with open_pipeline(recipe, run, make_talk(), computes=False) as pipeline:
            written = make_package(pipeline.deployed(corrected=True), device, out)
    text = f"{written['file']}  {written['bytes']:,} bytes\nsha256 {written['sha256']}"
    if key is not None:
        from mpq_deploy.device.signature import sign as sign_file

        written["signature"] = str(sign_file(Path(written["file"]), key))
        text += f"\nsignature {written['signature']}"
    return written, text


@app.command(
    rich_help_panel=DEVICE,
    epilog="Example: mpq-deploy probe --target jetson-orin-nano -o probe.tar",
)
def probe(
    target: Annotated[str, typer.Option("--target", metavar="NAME", help="Target to probe.")],
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Archive to write.",
            show_default="<target>-probe.tar",
            callback=output_file,
        ),
    ] = None,
) -> None:
    """Pack small graphs that show on a device which unproven forms its TensorRT takes.

    On the device: tar xf probe.tar, then probe/run.sh.

    Back on this machine: mpq-deploy targets --take probe-results.json.
    """
    from mpq_deploy.delivery.probe_package import make_probe
    from mpq_deploy.engine.target import load_target

    device = load_target(target)
    written = make_probe(device, out or Path(f"{device.name}-probe.tar"))
    text = f"{written['file']}  {written['bytes']:,} bytes, {len(written['forms'])} forms"
    print_result(written, text)


@app.command(rich_help_panel=DEVICE, epilog="Example: mpq-deploy install model.mpq.tar")
def install(
    archive: Annotated[
        Path, typer.Argument(metavar="MODEL.mpq.tar", help="The package.", show_default=False)
    ],
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Folder to install into.",
            show_default="beside the archive",
        ),
    ] = None,
    sha256: Annotated[
        Optional[str],
        typer.Option(
            "--sha256",
            metavar="DIGEST",
            help="Refuse an archive whose SHA-256 differs.",
            show_default=False,
        ),
    ] = None,
    trust: Annotated[
        Optional[str],
        typer.Option(
            "--trust",
            metavar="PUBKEY",
            help="Refuse an archive not signed with this minisign key (a file, or its text).",
            show_default=False,
        ),
    ] = None,
    force_memory: Annotated[
        bool,
        typer.Option("--force-memory", help="Build even if memory is estimated to be too small."),
    ] = False,
) -> None:
    """On the device: verify, build, check layers and reference outputs, measure latency.

    Without mpq-deploy on the device: tar xf MODEL.mpq.tar, then ./build.sh. Exit
    code 1 when something differs.
    """
    from mpq_deploy.device.installer import Trust, default_out, summary
    from mpq_deploy.device.installer import install as install_package

    folder = out or default_out(archive)
    results = install_package(archive, folder, make_talk(), force_memory, Trust(sha256, trust))
    print_result(results, summary(results, folder))
    if not results["passed"]:
        raise typer.Exit(1)


@app.command(
    rich_help_panel=DEVICE, epilog="Example: mpq-deploy deploy runs/mine --ssh nvidia@orin.local"
)
def deploy(
    run: RunArgument,
    ssh: Annotated[
        str, typer.Option("--ssh", metavar="USER@HOST", help="The device, as you give it to ssh.")
    ],
    target: TargetOption = None,
    ssh_command: Annotated[
        str, typer.Option("--ssh-command", help="ssh command, with its options.")
    ] = "ssh",
    folder: Annotated[
        str, typer.Option("--folder", help="The folder on the device.")
    ] = "mpq-deploy",
    python: Annotated[
        str, typer.Option("--python", help="Python that runs the installer.")
    ] = "python3",
) -> None:
    """Package, copy, install on the device and fetch the results, over your own ssh.

    Host keys are checked as your ssh configuration says. To resume an interrupted
    deployment, run the same command again.
    """
    import shlex

    from mpq_deploy.delivery.deploy import Remote, deploy_whole
    from mpq_deploy.delivery.deploy import deploy as deploy_run
    from mpq_deploy.delivery.package import check_builder
    from mpq_deploy.device.installer import summary
    from mpq_deploy.engine.target import load_target
    from mpq_deploy.run.pipeline import open_pipeline

    recipe = recipe_of(run, None)
    device = load_target(target or recipe.target)
    remote = Remote(ssh, tuple(shlex.split(ssh_command)), folder, python)
    if (run / "pipeline.json").is_file():
        results = deploy_whole(run, device, remote, make_talk())
    else:
        check_builder(device)
        with open_pipeline(recipe, run, make_talk(), computes=False) as pipeline:
            results = deploy_run(pipeline.deployed(corrected=True), device, remote)
    print_result(results, summary(results, Path(folder)))
    if not results["passed"]:
        raise typer.Exit(1)
