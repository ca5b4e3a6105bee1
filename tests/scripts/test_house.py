"""The measures of the house on small made-up packages, and those limits that the package keeps already."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import house


def package(folder: Path, files: dict[str, str]) -> list[house.Module]:
    """A package ``house`` with these files by their place: ``allocate/milp`` is allocate/milp.py."""
    for place, text in files.items():
        file = folder / "house" / f"{place}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return house.read_package(folder / "house")


def test_loose_files_and_folders(tmp_path: Path) -> None:
    modules = package(
        tmp_path, dict.fromkeys(["__init__", "api", "docs", "graph/save", "graph/passes/fold"], "")
    )
    (tmp_path / "house" / "images").mkdir()
    assert house.loose_files(modules) == ["api.py", "docs.py"]
    assert house.top_folders(modules) == ["graph"]


def test_names_that_occur_twice_leave_stages_and_package_files_aside(tmp_path: Path) -> None:
    for room in ("graph", "check", "stages"):
        package(
            tmp_path, dict.fromkeys([f"{room}/__init__", f"{room}/memory", f"{room}/{room}s"], "")
        )
    modules = house.read_package(tmp_path / "house")
    assert house.repeated_names(modules) == ["memory"]
    (tmp_path / "house" / "check" / "memory.py").unlink()
    assert house.repeated_names(house.read_package(tmp_path / "house")) == []


@pytest.mark.parametrize(("statements", "is_long"), [(49, False), (50, True)])
def test_long_functions_count_their_signature(
    tmp_path: Path, statements: int, is_long: bool
) -> None:
    body = "\n".join(["    x = 1"] * statements)
    modules = package(tmp_path, {"api": f"class A:\n  @staticmethod\n  def run():\n{body}\n"})
    assert house.long_functions(modules) == (
        [f"api.py:3 run ({statements + 1})"] if is_long else []
    )


@pytest.mark.parametrize(
    ("signature", "count"),
    [
        ("a, b, c, d, e, f", 0),
        ("a, b, c, d, e, f, g", 7),
        ("self, a, b, c, d, e, f", 0),
        ("cls, a, b, c, d, e, f, g", 7),
        ("a, /, b, *c, d=1, e=2, f=3, **g", 7),
    ],
)
def test_parameters(tmp_path: Path, signature: str, count: int) -> None:
    modules = package(tmp_path, {"api": f"def run({signature}): ...\n"})
    expected = [f"api.py:1 run ({count})"] if count else []
    assert house.functions_of_many_parameters(modules) == expected


def test_lines(tmp_path: Path) -> None:
    modules = package(tmp_path, {"api": f"# {'x' * 99}\n# {'x' * 98}\n", "errors": "\n\n"})
    assert house.count_lines(modules) == 4
    assert house.long_lines_percent(modules) == 25


@pytest.mark.parametrize(
    "text",
    [
        'scheme.branch.kind == "rows"',
        '"rows" != kind',
        'branch.kind in ("mine", "yours")',
        'layer.form.family == "w4a16"',
        'form.startswith("+cols")',
        'int(form.removeprefix("+a"))',
        'name.endswith("-sim")',
        'layer.scheme == "fp16"',
        'weight_form not in {"int8"}',
        'kind\nmatch scheme.branch.kind:\n    case "rows" | "cols":\n        pass',
    ],
)
def test_comparisons_of_kinds_are_found(tmp_path: Path, text: str) -> None:
    modules = package(tmp_path, {"formats/rows": text, "graph/write": text})
    assert [place.split(":")[0] for place in house.kind_comparisons(modules)] == ["graph/write.py"]


@pytest.mark.parametrize(
    "text",
    [
        'kind == "text_time"',
        'value.dtype.kind not in "fiu"',
        'name.startswith("text_encoder")',
        "scheme.branch.kind == other.kind",
        'options["rows"]',
        'dialect.name == "trt-rtx"',
        'name.rsplit("+")',
        'match node.op_type:\n    case "rows":\n        pass',
    ],
)
def test_other_comparisons_are_not(tmp_path: Path, text: str) -> None:
    assert house.kind_comparisons(package(tmp_path, {"graph/write": text})) == []


def test_import_circles_count_lazy_imports_and_no_types(tmp_path: Path) -> None:
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.errors import E\n"
    files = {
        "allocate/milp": "from house.allocate import plan\nimport numpy",
        "allocate/plan": "def f():\n    from .terms import g",
        "allocate/terms": "from house.allocate.milp import solve",
        "allocate/__init__": "from house.allocate.milp import solve",
        "api": f"{types}import house.allocate",
        "errors": "import house.api",
    }
    modules = package(tmp_path, files)
    milp, plan, terms = (f"house.allocate.{name}" for name in ("milp", "plan", "terms"))
    assert house.largest_import_circle(modules) == [milp, plan, terms]
    assert house.imported_modules(modules[-1], {m.name for m in modules}) == {"house.api"}


def test_no_circle(tmp_path: Path) -> None:
    modules = package(tmp_path, {"api": "from house import errors", "errors": "import os"})
    assert house.largest_import_circle(modules) == []


def test_table_and_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package(tmp_path, {"api": "", "graph/save": ""})
    assert house.main([str(tmp_path / "house")]) == 0
    package(tmp_path, {"check/save": ""})
    assert house.main([str(tmp_path / "house")]) == 1
    out = capsys.readouterr().out
    assert "| module names that occur twice | 1 | 0 | NO |" in out
    assert out.endswith("module names that occur twice:\n  save\n")


@pytest.fixture(scope="module")
def measured() -> dict[str, house.Measure]:
    """The package's own measures, which take seconds."""
    return {one.name: one for one in house.measure(house.read_package(house.PACKAGE))}


def test_contributing_names_every_measure_and_its_limit(
    measured: dict[str, house.Measure],
) -> None:
    text = (house.PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for measure in measured.values():
        assert f"| {measure.name} | {measure.limit:,} |" in text


@pytest.mark.parametrize("name", ["loose files at the top", "folders at the top"])
def test_limits_that_hold(name: str, measured: dict[str, house.Measure]) -> None:
    assert measured[name].kept, house.table([measured[name]])
