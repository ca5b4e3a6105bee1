"""Where a stage fails on a GPU that nobody asked for by name, the CPU makes it, and that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.run import pipeline
from mpq_deploy.run.stage import Stage
from mpq_deploy.system.compute import Compute, computing_on
from mpq_deploy.system.progress import Talk

FAKE_GPU = Compute(runtime=0)


class Heard(Talk):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def made(
    monkeypatch: pytest.MonkeyPatch, folder: Path, device: str, error: Exception
) -> tuple[Any, list[str]]:
    """Make one stage that fails on a GPU (a FAKE: its name alone); return its record and warnings."""

    def make(run: Any, aside: Path) -> str:
        (aside / "left").write_text(str(computing_on()), encoding="utf-8")
        if computing_on() != Compute():
            raise error
        return ""

    stage = Stage("export", make, lambda run: {"a": 1})
    monkeypatch.setitem(pipeline.STAGES, "export", stage)
    monkeypatch.setattr(pipeline, "find_compute", lambda wish: FAKE_GPU)
    recipe: Recipe = load_recipe(None, {"compute.device": device})
    heard = Heard()
    with pipeline.open_pipeline(recipe, folder, heard) as opened:
        opened.ensure("export")
        return opened.run.folder.record("export"), heard.warnings


def test_auto_goes_on_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record, warnings = made(monkeypatch, tmp_path / "run", "auto", RuntimeError("no\nkernel"))
    assert record.device == "cpu"
    assert (tmp_path / "run" / "export" / "left").read_text(encoding="utf-8") == "cpu"
    (said,) = warnings
    assert "export failed on cuda:0" in said and said.endswith("no kernel")


@pytest.mark.parametrize(
    ("device", "error"), [("cuda", RuntimeError("no kernel")), ("auto", UsageError("bad recipe"))]
)
def test_a_device_by_name_and_bad_input_are_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, error: Exception
) -> None:
    with pytest.raises(type(error)):
        made(monkeypatch, tmp_path / "run", device, error)
