"""Sealed files and the disk's errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mpq_deploy.system.files import disk_error, sealed_json, unsealed, write_text


def test_the_full_disk_is_the_one_that_was_written_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "new" / "file"
    error = disk_error(OSError(errno.ENOSPC, "full", str(elsewhere)), Path("/"))
    assert f"left under {tmp_path}." in error.message
    assert disk_error(OSError(errno.ENOSPC, "full"), None).message == "A disk is full."
    assert "a file cannot be written" in disk_error(OSError(errno.EROFS, "no"), None).message


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written")]
)
def test_the_disk_s_errors_say_what_to_do(tmp_path: Path, code: int, words: str) -> None:
    error = disk_error(OSError(code, "strerror"), tmp_path)
    assert words in error.message and "-o" in error.hint


def test_a_run_folder_that_is_read_only_is_to_be_copied(tmp_path: Path) -> None:
    error = disk_error(OSError(errno.EROFS, "Read-only", str(tmp_path / ".lock")), None)
    assert error.message == f"The run folder {tmp_path} cannot be written: Read-only."
    assert "copy it (cp -r)" in error.hint


def test_every_altered_digit_of_a_sealed_file_is_noticed() -> None:
    values = {"seconds": 12.5, "rows": (1, 2), "inner": {"b": None, "a": "x"}}
    text = sealed_json(values)
    assert unsealed(text) == {"seconds": 12.5, "rows": [1, 2], "inner": {"b": None, "a": "x"}}
    for place, letter in enumerate(text):
        if letter.isspace():
            continue
        altered = text[:place] + chr(ord(letter) ^ 1) + text[place + 1 :]
        with pytest.raises(ValueError):
            unsealed(altered)
    for other in ("", "[]", "{}", '{"seconds": 12.5}', text[:-3]):
        with pytest.raises(ValueError):
            unsealed(other)


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    path = tmp_path / "results.json"
    for link in (path, path.with_name(f".{path.name}.{os.getpid()}")):
        link.symlink_to(precious)
    write_text(path, "new")
    assert precious.read_text(encoding="utf-8") == "mine"
    assert path.read_text(encoding="utf-8") == "new" and not path.is_symlink()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "x")
