"""The run folder: atomic stages, staleness, locking, formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpq_deploy.errors import RunFolderError
from mpq_deploy.run.folder import RECORD, RunFolder, open_run


def make(run: RunFolder, value: int, text: str = "x") -> None:
    with run.writing("stage", {"value": value}) as folder:
        (folder / "a.txt").write_text(text, encoding="utf-8")


def test_a_stage_is_current_until_an_input_or_a_file_changes(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert run.changed_fields("stage", {"value": 1}) is None
        make(run, 1)
        assert run.changed_fields("stage", {"value": 1}) == []
        assert run.changed_fields("stage", {"value": 2}) == ["value"]
        assert run.changed_fields("stage", {"value": 1, "more": 0}) == ["more"]
        (run.stage("stage") / "a.txt").write_text("y", encoding="utf-8")
        assert run.changed_fields("stage", {"value": 1}) == ["stage/a.txt (missing or altered)"]
        (run.stage("stage") / RECORD).write_text("{", encoding="utf-8")
        assert run.changed_fields("stage", {"value": 1}) is None


def test_a_failure_leaves_the_finished_stage_and_nothing_else(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        make(run, 1, "first")
        with pytest.raises(ZeroDivisionError), run.writing("stage", {"value": 2}) as folder:
            (folder / "a.txt").write_text("half", encoding="utf-8")
            raise ZeroDivisionError
        assert (run.stage("stage") / "a.txt").read_text(encoding="utf-8") == "first"
        assert run.changed_fields("stage", {"value": 1}) == []
        assert not list(run.path.glob(".stage*"))


def test_what_a_kill_left_behind_is_overwritten(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        for leftover in (".stage.partial", ".stage.old"):
            (run.path / leftover).mkdir()
            (run.path / leftover / "junk").write_text("junk", encoding="utf-8")
        make(run, 1)
        make(run, 2)
        assert sorted(p.name for p in run.stage("stage").iterdir()) == ["a.txt", RECORD]


def test_equal_outputs_have_equal_digests(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        with open_run(tmp_path / name) as run:
            make(run, 1)
            record = run.record("stage")
            assert record is not None
            digests.append(record.digest)
    assert digests[0] == digests[1]


def test_a_run_folder_is_locked_while_open(tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "run"),
        pytest.raises(RunFolderError, match="in use"),
        open_run(tmp_path / "run"),
    ):
        pass
    with open_run(tmp_path / "run"):
        pass


def test_folders_of_another_format_or_kind_are_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        pass
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({"format": 99, "made_by": "7.0"}), encoding="utf-8"
    )
    with pytest.raises(RunFolderError, match=r"7\.0"), open_run(tmp_path / "run"):
        pass
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not a run folder"), open_run(tmp_path / "photos"):
        pass
    assert (tmp_path / "photos" / "cat.png").exists()
