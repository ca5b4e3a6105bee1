"""The view of a run: frozen, finished stages only, and everything opened once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.recipe import Recipe
from mpq_deploy.run import view
from mpq_deploy.run.folder import RECIPE, RunFolder
from mpq_deploy.run.view import SHARDS, Run
from mpq_deploy.system.progress import Talk


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Recipe(), RunFolder(tmp_path), Talk())


def test_a_view_is_frozen(run: Run) -> None:
    with pytest.raises(FrozenInstanceError):
        run.recipe = Recipe()  # type: ignore[misc]


def test_digests_are_of_finished_stages_only(run: Run) -> None:
    with pytest.raises(UsageError, match="The stage 'export' is missing"):
        run.digest("export")
    with run.folder.writing("export", {}) as folder:
        (folder / "a.txt").write_text("a", encoding="utf-8")
        with pytest.raises(UsageError, match="missing"):
            run.digest("export")
    assert len(run.digest("export")) == 64
    assert (run.stage("export") / "a.txt").read_text(encoding="utf-8") == "a"


def test_what_a_view_opens_is_opened_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    class Exported:
        def __init__(self, folder: Path, *_: object) -> None:
            opened.append(folder)
            self.graph = LayerGraph(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), (), ())

    monkeypatch.setattr(view, "Exported", Exported)
    assert run.exported is run.exported and run.target is run.target
    assert opened == [run.path / "export"]


def test_the_deployed_graphs_are_those_of_recover_where_the_recipe_wants_it(run: Run) -> None:
    assert run.deployed == run.path / "quantize"
    recovering = Run(Recipe.model_validate({"recover": {"steps": 5}}), run.folder, run.talk)
    assert recovering.deployed == run.path / "recover"


def test_a_worker_opens_a_folder_by_its_recipe(tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text(
        Recipe.model_validate({"budget": 0.31}).to_yaml(), encoding="utf-8"
    )
    opened = Run.opened(tmp_path, Talk())
    assert str(opened.recipe.budget) == "0.31" and not opened.results
    assert [file.name for file in tmp_path.iterdir()] == [RECIPE]  # no lock, nothing written


def test_shards_are_kept_until_their_stage_is_finished(run: Run) -> None:
    for stage in ("measure", "sweep"):
        run.shard_cache(stage).keep({"part": 1}, {"values": np.arange(3)})
    kept = run.shard_cache("measure").find({"part": 1})
    assert kept is not None and kept["values"].tolist() == [0, 1, 2]
    run.remove_shards("measure")
    assert run.shard_cache("measure").find({"part": 1}) is None
    assert [folder.name for folder in (run.path / SHARDS).iterdir()] == ["sweep"]
    run.remove_shards("sweep")
    assert not (run.path / SHARDS).exists()
