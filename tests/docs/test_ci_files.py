"""The workflow, the container file and the documents say what the command line really takes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from mpq_deploy.cli import app

ROOT = Path(__file__).parents[2]
WORKFLOW, CONTAINER = ROOT / "docs" / "workflows" / "model.yml", ROOT / "docker" / "Dockerfile"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app)


def parse(line: str) -> None:
    """Parse a command as the command line does, without running it. Raises for an option or value it lacks."""
    words = shlex.split(line, comments=True)
    assert words[0] == "mpq-deploy", line
    with COMMANDS.make_context("mpq-deploy", words[1:]) as context:
        name, command, rest = COMMANDS.resolve_command(
            context, [*context._protected_args, *context.args]
        )  # type: ignore[attr-defined]
        with command.make_context(name, rest, parent=context):
            pass


def steps() -> list[dict[str, object]]:
    found = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["model"]["steps"]
    assert isinstance(found, list)
    return found


def lines(text: str) -> Iterator[str]:
    yield from (
        line.strip() for line in text.splitlines() if line.strip().startswith("mpq-deploy ")
    )


def test_every_command_of_the_workflow_is_one() -> None:
    commands = [line for step in steps() for line in lines(str(step.get("run", "")))]
    for command in commands:
        parse(command)
    assert [shlex.split(command)[1] for command in commands] == [
        "build",
        "check",
        "gate",
        "gate",
        "package",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        "mpq-deploy gate runs/m --min-psn 40",
        "mpq-deploy packag runs/m",
        "mpq-deploy gate runs/m --min-psnr x",
    ],
)
def test_a_wrong_command_would_be_noticed(wrong: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|not a valid|should be a valid"):
        parse(wrong)


def test_the_workflow_gates_before_it_packages_and_keeps_its_evidence() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    names = [str(step.get("name", step.get("uses"))) for step in steps()]
    assert (
        names.index("Build") < names.index("Gate") < names.index("Package") < names.index("Digests")
    )
    by_name = dict(zip(names, steps()))
    assert "report.md" in str(by_name["Summary"]["run"]) and "GITHUB_STEP_SUMMARY" in str(
        by_name["Summary"]["run"]
    )
    upload = by_name["actions/upload-artifact@v4"]
    for name in ("Summary", "actions/upload-artifact@v4"):
        assert "!cancelled()" in str(by_name[name]["if"])
    kept = str(upload["with"]["path"]).split()  # type: ignore[index]
    assert {"SHA256SUMS", "model.mpq.tar", "gate.xml", "runs/model/report.json"} <= set(kept)
    digested = re.findall(r"\S+\.(?:tar|json|html)", str(by_name["Digests"]["run"]).splitlines()[0])
    assert set(digested) <= set(kept)
    # An action has a version, a step either runs or uses.
    for step in steps():
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", str(step.get("uses", "a/b@v1")))


def test_the_workflow_installs_what_the_project_declares() -> None:
    installed = " ".join(str(step.get("run", "")) for step in steps())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    torch = re.search(r"torch==[\d.]+", project)
    assert torch is not None
    for text in (installed, CONTAINER.read_text(encoding="utf-8")):
        assert torch.group() in text
        for extras in re.findall(r"\[([a-z,]+)\]\"", text):
            assert all(f"\n{extra} = [" in project for extra in extras.split(","))


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(
        r"\\\n",
        " ",
        "\n".join(
            x for x in CONTAINER.read_text(encoding="utf-8").splitlines() if not x.startswith("#")
        ),
    )
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def test_the_container_file_copies_what_is_there_and_runs_as_nobody_special() -> None:
    known = ("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "SHELL", "USER", "WORKDIR")
    found = instructions()
    assert {name for name, _ in found} <= set(known)
    assert found[0][0] == "FROM"
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name, rest in found:
        if name == "FROM":
            assert re.search(r":\d+\.\d+\.\d+-", rest), "an image with a whole version"
        if name == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            assert target.startswith("/src")
            for source in sources:
                assert (ROOT / source).exists() and source not in ignored
        if name in ("ENTRYPOINT", "CMD", "SHELL"):
            assert isinstance(json.loads(rest), list)
    last = dict(found[[i for i, (name, _) in enumerate(found) if name == "FROM"][-1] :])
    assert last["USER"] == "10001" and "--uid 10001 " in last["RUN"]
    parse(shlex.join([*json.loads(last["ENTRYPOINT"]), *json.loads(last["CMD"])]))
    example = re.search(r"mpq-deploy (build .*)", CONTAINER.read_text(encoding="utf-8"))
    assert example is not None
    parse(f"mpq-deploy {example.group(1)}")


def test_the_container_copies_all_that_the_wheel_is_made_of() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, wheel = settings["project"], settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["readme"], *wheel["packages"], *wheel["force-include"]}
    needed |= {name for name in project["license-files"] if (ROOT / name).is_file()}
    copied = {
        source
        for line in CONTAINER.read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert needed <= copied


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_the_documents_is_one(document: Path) -> None:
    """Lines of code blocks (indented by four) that begin with the command."""
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.startswith("    mpq-deploy "):
            parse(line.strip())
