"""The workflow's steps, run one after the other in bash as GitHub's runner does; what only GitHub has is left out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.pipeline.runs import FEW_SCHEMES, write_recipe
from tests.tiny_models import ONE_LEVEL_CLASSES, tiny_unet_folder

WORKFLOW = Path(__file__).parents[2] / "docs" / "workflows" / "model.yml"
# Their action is not here; Install would install the package that is tested, Baseline asks GitHub.
LEFT_OUT = ("Install", "Baseline")
# The limits on errors are for a trained model; the one here has random weights and takes seconds.
LOOSE = {"--max-nmse 1e-4": "--max-nmse 0.2", "--min-psnr 40": "--min-psnr 10"}
WITH_BASELINE = "${{ vars.MPQ_BASELINE != '' }}"


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """A checkout with a model and a recipe, and ``mpq-deploy`` first on the path."""
    tiny_unet_folder(tmp_path, **ONE_LEVEL_CLASSES).rename(tmp_path / "model")
    write_recipe(
        tmp_path / "recipe.yaml", engine__build=True, evaluate__controls=False, **FEW_SCHEMES
    )
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "mpq-deploy"
    program.write_text(
        f"#!{sys.executable}\nfrom mpq_deploy.cli import main\nmain()\n", encoding="utf-8"
    )
    program.chmod(0o755)
    return tmp_path


def run_step(step: dict[str, Any], folder: Path) -> None:
    """``bash -e`` in the checkout, as the runner calls it."""
    assert "${{" not in str(step["run"]), "an expression inside a script can be injected into"
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "OMP_NUM_THREADS": "1",
        "CI": "true",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", str(step["run"])],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, f"{step['name']}: {done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.rtx
@pytest.mark.torch
def test_the_steps_build_gate_package_and_keep_what_they_promise(runner: Path) -> None:
    for package in ("torch", "diffusers", "tensorrt_rtx"):
        pytest.importorskip(package)
    steps = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["model"]["steps"]
    ran = []
    for step in steps:
        if "run" not in step or step["name"] in LEFT_OUT:
            continue
        if step.get("if") == WITH_BASELINE:
            # The release that a baseline would come from: this one.
            (runner / "baseline").mkdir(exist_ok=True)
            shutil.copy(
                runner / "runs" / "model" / "report.json", runner / "baseline" / "report.json"
            )
        script = step["run"]
        for limit, loose in LOOSE.items():
            script = script.replace(limit, loose)
        run_step({**step, "run": script}, runner)
        ran.append(step["name"])
    assert ran == [
        "Build",
        "Check the graph",
        "Gate",
        "Gate against the baseline",
        "Package",
        "Digests",
        "Summary",
    ]
    upload = next(
        step for step in steps if str(step.get("uses", "")).startswith("actions/upload-artifact")
    )
    kept = [runner / name for name in str(upload["with"]["path"]).split()]
    assert [path for path in kept if not path.is_file()] == []
    for line in (runner / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        assert hashlib.sha256((runner / name).read_bytes()).hexdigest() == digest
    summary = (runner / "summary.md").read_text(encoding="utf-8")
    assert (
        "### Digests" in summary
        and (runner / "runs" / "model" / "report.md").read_text(encoding="utf-8") in summary
    )
    for name in ("gate.xml", "baseline.xml"):
        assert next(ElementTree.parse(runner / name).iter("testsuite")).get("failures") == "0"
    with tarfile.open(runner / "model.mpq.tar") as archive:
        assert "model.onnx" in archive.getnames()
    assert json.loads(
        (runner / "runs" / "model" / "engine" / "build.json").read_text(encoding="utf-8")
    )["verified"]


@pytest.mark.slow
@pytest.mark.rtx
@pytest.mark.torch
def test_a_step_that_fails_fails_the_job(runner: Path) -> None:
    steps = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["model"]["steps"]
    gate = next(step for step in steps if step.get("name") == "Gate")
    with pytest.raises(AssertionError, match="Gate: "):
        run_step(gate, runner)
