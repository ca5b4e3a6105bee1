"""Sealed files and the disk's errors."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mpq_deploy.system.files import disk_error, sealed_json, unsealed


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written")]
)
def test_the_disk_s_errors_say_what_to_do(tmp_path: Path, code: int, words: str) -> None:
    error = disk_error(OSError(code, "strerror"), tmp_path)
    assert words in error.message and "-o" in error.hint


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
