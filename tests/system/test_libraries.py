"""What other libraries log and warn stays out of the output, unless it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install mpq-deploy[torch]")

from mpq_deploy.system.libraries import SETTINGS, gist, no_bars
from tests.graphs import denoiser_graph
from tests.tiny_models import tiny_unet_folder

pytestmark = pytest.mark.torch
# ``doctor`` opens a model whose configuration has an entry that its class does not know, after a library's warning.
CODE = """
import sys, warnings
from pathlib import Path

import mpq_deploy.system.doctor as doctor
from mpq_deploy.cli import main
from mpq_deploy.models.open import open_denoiser

find_gpus, folder = doctor.find_gpus, sys.argv.pop()

def opened():
    open_denoiser(Path(folder))
    warnings.warn_explicit("outdated", FutureWarning, "lib.py", 1, "lib")
    warnings.warn_explicit("doubtful", UserWarning, "lib.py", 1, "diffusers.lib")
    warnings.warn_explicit("ours", UserWarning, "ours.py", 1, "mpq_deploy.ours")
    return find_gpus()

doctor.find_gpus = opened
main()
"""


@pytest.mark.parametrize("debug", [False, True], ids=["usual", "debug"])
def test_lines_of_libraries_are_shown_with_debug_alone(debug: bool, tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    config = folder / "unet" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "made_up": 1}),
        encoding="utf-8",
    )
    arguments = ["--debug"] if debug else []
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments, "doctor", str(folder)],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={name: value for name, value in os.environ.items() if name not in SETTINGS},
    )
    assert done.returncode == 0, done.stderr
    assert all((line in done.stderr) == debug for line in ("made_up", "outdated", "doubtful")), (
        done.stderr
    )
    assert "ours" in done.stderr


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_progress_bars_come_back(library: str) -> None:
    logging = pytest.importorskip(f"{library}.utils.logging")
    assert logging.is_progress_bar_enabled()
    with no_bars(library):
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()


NOISY = """
import logging, sys, warnings
from mpq_deploy.system.libraries import silenced, show_libraries, tell_cause

if sys.argv[1] == "debug":
    show_libraries()
logging.basicConfig(level=logging.DEBUG)
with silenced():
    logging.getLogger("torch.onnx").error("logged")
    print("printed")
    print("printed to stderr", file=sys.stderr)
    warnings.warn("warned of")
    try:
        raise ValueError("first line\\nsecond line")
    except ValueError as error:
        caught = error
tell_cause(caught)
logging.getLogger("ours").error("after")
print("done")
"""


@pytest.mark.parametrize("mode", ["usual", "debug"])
def test_what_a_library_says_in_a_block_is_shown_with_debug_alone(mode: str) -> None:
    # Tests before this one may have set them in this process.
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", NOISY, mode],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        env=environment,
    )
    said = done.stdout + done.stderr
    for text in ("logged", "printed", "printed to stderr", "warned of", "second line"):
        assert (text in said) == (mode == "debug"), said
    assert "after" in done.stderr and done.stdout.endswith("done\n")


def chained(*texts: str) -> Exception:
    """Errors, each the cause of the one before."""
    error: Exception | None = None
    for text in reversed(texts):
        outer = RuntimeError(text)
        outer.__cause__ = error
        error = outer
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (chained("Failed to export.\n- Advice", "While translating", "no eig"), "no eig"),
        (chained("", "\nfirst\nsecond"), "first"),
        (
            ValueError("Conflicts:\n- static shape of 2\n- another"),
            "Conflicts: - static shape of 2",
        ),
        (KeyError("encoder"), "KeyError: 'encoder'"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("\x1b[96mcolour"), "\\x1b[96mcolour"),
        (RuntimeError("x" * 999), "x" * 300),
    ],
)
def test_the_gist_of_an_error_is_what_went_wrong_at_first(error: Exception, said: str) -> None:
    assert gist(error) == said


def test_what_a_graph_seldom_needs_is_imported_when_it_is(tmp_path: Path) -> None:
    """A command reads a graph without sympy; arithmetic with its open axes imports it."""
    code = """
import sys
from pathlib import Path
from mpq_deploy.system.libraries import start_lightly
start_lightly()
import onnx_ir as ir
from mpq_deploy.graph.load import load_model
batch = load_model(Path(sys.argv[1])).graph.inputs[0].shape[0]
assert isinstance(batch, ir.SymbolicDim) and "sympy.core" not in sys.modules
assert (batch * 2 + batch).simplify().value == f"3*{batch.value}" and "sympy.core" in sys.modules
"""
    model = denoiser_graph(channels=16, size=8).save(tmp_path / "model.onnx")
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
