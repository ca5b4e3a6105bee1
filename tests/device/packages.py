"""Finished runs for two targets, and their packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpq_deploy.delivery.package import REFERENCE, make_package
from mpq_deploy.device.archive import extract, read_archive
from mpq_deploy.device.manifest import Manifest
from mpq_deploy.engine.target import load_target
from mpq_deploy.recipe import Recipe
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import Talk
from tests.pipeline.runs import EVERY_SCHEME, build, recipe_for, save_denoiser


def packed(recipe: Recipe, run: Path, out: Path) -> Path:
    with open_pipeline(recipe, run, Talk()) as pipeline:
        make_package(pipeline.deployed(corrected=True), load_target(recipe.target), out)
    return out


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_denoiser(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rtx_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe = recipe_for(model, evaluate__correction="ptqd")
    return recipe, build(recipe, tmp_path_factory.mktemp("rtx") / "run", "correction").run


@pytest.fixture(scope="session")
def rtx(rtx_run: tuple[Recipe, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(*rtx_run, tmp_path_factory.mktemp("packages") / "rtx.mpq.tar")


@pytest.fixture(scope="session")
def orin(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orin")
    # Of fewer schemes the plan takes none that computes in INT8, which the mock's faults are about.
    recipe = recipe_for(model, target="jetson-agx-orin", budget=0.6, **EVERY_SCHEME)
    build(recipe, folder / "run", "quantize")
    return packed(recipe, folder / "run", folder / "orin.mpq.tar")


@pytest.fixture
def mock_device(orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a MOCK trtexec first on the path, that knows the package ``orin``."""
    tools, parts = tmp_path / "tools", tmp_path / "mock-parts"
    tools.mkdir()
    extract(orin, read_archive(orin), parts)
    mock = Path(__file__).with_name("mock_trtexec.py")
    (tools / "trtexec").write_text(
        f'#!/bin/sh\nexec {sys.executable} {mock} "$@"\n', encoding="utf-8"
    )
    (tools / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("MOCK_MANIFEST", str(parts / "manifest.json"))
    monkeypatch.setenv("MOCK_REFERENCE", str(parts / REFERENCE))
    monkeypatch.setenv(
        "MOCK_OUTPUT", f'"{Manifest.load(parts / "manifest.json").reference.output}"'
    )
    yield tools
