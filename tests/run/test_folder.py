"""The run folder: atomic stages, staleness, locking, formats."""

from __future__ import annotations

import json
import os
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
    with open_run(tmp_path / "run") as run:
        make(run, 1)
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


@pytest.mark.parametrize("name", [".lock", ".owner", "engine.log", ".scratch", "devices", "a/b"])
def test_a_run_with_links_is_not_written_into(name: str, tmp_path: Path) -> None:
    """A stranger's run could have files outside of it overwritten."""
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    with open_run(tmp_path / "run") as run:
        make(run, 1)
    link = run.path / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(precious)
    with pytest.raises(RunFolderError, match="symbolic link"), open_run(run.path):
        pass
    assert precious.read_text(encoding="utf-8") == "mine"
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(RunFolderError, match="neither a file nor a folder"), open_run(run.path):
        pass


def test_a_folder_in_which_nothing_was_finished_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "a" / "b" / "run"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run"):
        raise ZeroDivisionError
    assert (tmp_path / "run").is_dir()
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "c" / "run") as run:
        make(run, 1)
        raise ZeroDivisionError
    assert (tmp_path / "c" / "run" / "stage").is_dir()


@pytest.mark.parametrize("file", ["/etc/passwd", "../../other", "a\0b"])
def test_a_record_names_files_of_its_stage_alone(file: str, tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        make(run, 1)
        record = json.loads((run.stage("stage") / RECORD).read_text(encoding="utf-8"))
        record["outputs"][file] = "0" * 64
        (run.stage("stage") / RECORD).write_text(json.dumps(record), encoding="utf-8")
        assert run.record("stage") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x"}', '{"format": NaN}', "{" * 500])
def test_a_marker_that_says_nothing_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError) as caught, open_run(tmp_path):
        pass
    assert "\n" not in str(caught.value)
