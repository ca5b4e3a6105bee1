"""What a format or a branch is decides nothing outside ``formats/``: its class does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from scripts import house

MODULES = [m for m in house.read_package(house.PACKAGE) if m.room != house.FORMATS]
CLASSES = r"(Quantized|Rows|Cols|LowRank|Scaled|Simulated)Matrix|Rows|Cols|LowRank|Prescaled|Omq|ZeroResidual"
VALUES = r"INT4|INT8|INT8_WEIGHT|INT8_INPUT"


def told_apart(tree: ast.AST) -> Iterator[str]:
    """What ``isinstance`` asks for, and what is compared with a name or with one kind among several."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "isinstance"
        ):
            yield from re.findall(rf"\b(?:{CLASSES})\b", ast.unparse(node.args[1]))
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            yield from (side for side in sides if re.fullmatch(VALUES, side))
            if any(side.endswith("branches") for side in sides):
                yield from (side for side in sides if side.strip("'") in house.BRANCHES)


def test_no_kind_is_compared_with_a_string() -> None:
    assert house.kind_comparisons(MODULES) == []


def test_no_class_or_value_of_formats_is_compared() -> None:
    assert [f"{m.path}: {found}" for m in MODULES for found in told_apart(m.tree)] == []


def test_what_would_be_found() -> None:
    text = (
        "isinstance(m, (RowsMatrix, int)) or s.weight is INT8 or 'rows' in recipe.allocate.branches"
    )
    assert len(list(told_apart(ast.parse(text)))) == 3
