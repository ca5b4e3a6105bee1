"""Names from others become paths in one way, and are shown without control characters."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.errors import InputError, UsageError
from mpq_deploy.system.names import checked_name, path_inside, plain_name, printable

NO_PLAIN_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "-rf",
    "a b",
    "a\nb",
    "a\0",
    "name\n",
    "C:x",
    "NUL",
    "con.json",
    "x" * 100,
    "ü",
    None,
    5,
    ["a"],
)


@pytest.mark.parametrize("name", NO_PLAIN_NAMES)
def test_what_is_no_plain_name_is_refused_in_one_line(name: object) -> None:
    with pytest.raises(UsageError) as caught:
        path_inside(Path("folder"), name, "The target's name", UsageError)
    assert "The target's name" in caught.value.message
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text())
def test_a_path_made_from_a_name_lies_directly_inside_its_folder(name: str) -> None:
    try:
        path = path_inside(Path("/folder"), name, "The name", suffix=".json")
    except InputError:
        return
    assert path.parent == Path("/folder")
    assert path.resolve().name == f"{name}.json"


def test_usual_names_are_plain() -> None:
    for name in ("jetson-orin-nano", "rtx", "model.onnx", "TensorRT_10.3"):
        assert plain_name(name, "The name") == name


@given(st.text())
def test_printable_text_is_one_line_and_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert printable(shown) == shown


@pytest.mark.parametrize("mark", ["\x1b[2J", "\u202e", "\u2066", "\x9b", "\r", "\u2028", "\ud800"])
def test_marks_that_change_a_terminal_are_shown_and_no_name(mark: str) -> None:
    assert mark[0] not in printable(f"a{mark}b")
    with pytest.raises(InputError):
        checked_name(f"a{mark}b", "The layer's name")


def test_names_of_layers_may_have_what_exporters_write() -> None:
    for name in ("/down/conv.0/Conv", "unet::block[3].weight", "слой 1", "层"):
        assert checked_name(name, "The layer's name") == name
