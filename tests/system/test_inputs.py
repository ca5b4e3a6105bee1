"""Files from others are read within limits, or refused with one line that names file and key."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.errors import InputError, UsageError
from mpq_deploy.system import inputs
from mpq_deploy.system.inputs import parse_json, read_bytes, read_json, read_json_object
from mpq_deploy.system.yaml_file import parse_yaml, read_yaml

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_json_is_read_as_the_standard_library_reads_it(values: Any) -> None:
    text = json.dumps(values)
    assert parse_json(text, "x") == json.loads(text)


BAD_JSON = {
    "": "is not JSON",
    "{": "is not JSON",
    '{"a": 1, "a": 2}': "'a' occurs twice",
    '{"a": {"b": [1, NaN]}}': "'a.b.1' is nan",
    '{"a": 1e999}': "'a' is inf",
    '{"a": -Infinity}': "'a' is -inf",
    "[" * 66 + "]" * 66: "nested more than 64",
    "[" * 100_000: "nested more than 64",
    '{"n": ' + "9" * 50 + "}": "50 digits",
    '{"n": ' + "9" * 100_000 + "}": "100,000 digits",
    '{"a": "\\ud800"}': "half a character",
    '{"\\ud800": 1}': "half a character",
}


@pytest.mark.parametrize(("text", "message"), BAD_JSON.items(), ids=range(len(BAD_JSON)))
def test_json_beyond_the_limits_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "values.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_json(path, error=UsageError, hint="Create it again.")
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in str(caught.value)


def test_infinities_are_read_where_the_caller_takes_them() -> None:
    assert parse_json('{"a": -Infinity}', "x", infinite=True) == {"a": float("-inf")}
    with pytest.raises(InputError, match="nan"):
        parse_json('{"a": NaN}', "x", infinite=True)


def test_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "VALUES", 100)
    assert parse_json(json.dumps([0] * 99), "x") == [0] * 99
    with pytest.raises(InputError, match="'99' comes after 100 values"):
        parse_json(json.dumps([0] * 200), "x")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("12345", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    for name, message in {
        "folder": "a folder",
        "pipe": "a named pipe",
        "none": "no file",
        "x" * 300: "cannot be read",
        "a\0b": "cannot be read",
    }.items():
        with pytest.raises(InputError, match=message):
            read_bytes(tmp_path / name)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "pointer").write_text(pointer, encoding="utf-8")
    with pytest.raises(InputError, match="Git LFS pointer") as caught:
        read_bytes(tmp_path / "pointer")
    assert "git lfs pull" in caught.value.hint
    with pytest.raises(InputError, match="a device"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(InputError, match="more than 4 bytes"):
        read_bytes(tmp_path / "file", limit=4)
    assert read_bytes(tmp_path / "link", limit=5) == b"12345"
    with pytest.raises(InputError, match="symbolic link"):
        read_bytes(tmp_path / "link", follow=False)


def test_text_of_another_encoding_and_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(InputError, match="not UTF-8 text: byte 7"):
        read_json(tmp_path / "latin")
    (tmp_path / "list").write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError, match="holds a list, not an object"):
        read_json_object(tmp_path / "list")


BAD_YAML = {
    "a: [": "line 1",
    "a: 1\na: 2": "'a' occurs twice",
    "a: .nan": "'a' is nan",
    "a: !!python/object:os.system x": "could not determine a constructor",
    "a: 2024-13-01": "not usable YAML",
    "a: &x [*x]": "nested more than 64",
    "[" * 5000: "nested too deeply",
    "a: " + "9" * 5000: "not usable YAML",
    "? [a]\n: 1": "unhashable",
    "a: 1\n---\nb: 2": "another document",
    "\x1b": "is not usable YAML",
}


@pytest.mark.parametrize(("text", "message"), BAD_YAML.items(), ids=range(len(BAD_YAML)))
def test_yaml_beyond_the_limits_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_yaml(path, error=UsageError)
    assert message in caught.value.message
    assert "\n" not in str(caught.value)


def test_aliases_that_expand_are_counted_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "VALUES", 10_000)
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 9)]
    with pytest.raises(InputError, match="10,000 values"):
        parse_yaml("\n".join(lines), "bomb")
    for text in ("a: 010", "a: 1:30"):
        with pytest.raises(InputError, match="quote it"):
            parse_yaml(text, "x")
    assert parse_yaml("[0, -12, 0x1f, 1_000, '010']", "x") == [0, -12, 31, 1000, "010"]
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}", "x")["c"] == {"b": 1, "d": 2}
