"""Dataclasses made from JSON, with every field checked."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from mpq_deploy.system.typed import typed


@dataclass(frozen=True)
class Part:
    name: str
    size: float
    flags: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    shape: tuple[int, int]
    sizes: dict[str, tuple[int, ...]]
    note: str | None = None
    count: int = 0


GOOD = Whole((Part("a", 1.5, (True,)), Part("b", 2.0)), (1, 2), {"x": (1, 2, 3)}, None, 5)


def test_what_json_makes_of_a_dataclass_is_read_back() -> None:
    assert typed(Whole, json.loads(json.dumps(asdict(GOOD)))) == GOOD
    assert typed(Part, {"name": "a", "size": 3}) == Part("a", 3.0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"shape": None}, "'shape' must be a list of 2"),
    "text": ({"count": "5"}, "'count' must be a whole number, and is '5'"),
    "truth": ({"count": True}, "'count' must be a whole number"),
    "inner": ({"parts": [{"name": 1, "size": 2}]}, "'parts.0.name' must be text"),
    "absent": ({"parts": [{"name": "a"}]}, "'parts.0.size' is missing"),
    "unknown": ({"more": 1}, "'more' is not a field"),
    "list": ({"parts": "abc"}, "'parts' must be a list"),
    "object": ({"sizes": []}, "'sizes' must be an object"),
    "length": ({"shape": [1, 2, 3]}, "'shape' must be a list of 2"),
    "none": ({"note": 5}, "'note' must be text"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_another_kind_of_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        typed(Whole, {**json.loads(json.dumps(asdict(GOOD))), **change})


def test_what_is_no_object_is_named() -> None:
    with pytest.raises(ValueError, match="must be an object, and is \\[\\]"):
        typed(Whole, [])
