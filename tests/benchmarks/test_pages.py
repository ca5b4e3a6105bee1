"""Every page of docs/results says by what code it was made; what makes code another code, and what does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import pages

PAGES = sorted((pages.ROOT / "docs" / "results").glob("*.md"))
COMMAND = "python benchmarks/bench.py digits --recipe quick"
PAGE = f"# A page\n\n```sh\n{COMMAND} --page docs/results/a.md\n```\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n"
FILES = {
    "benchmarks/bench.py": """
from table import Page, bench_recipe
from mpq_deploy.run.pipeline import go
COUNT = 3
""",
    "benchmarks/table.py": """
def bench_recipe():
    return {"objective": "quality"}
class Page:
    width = 1
""",
    "mpq_deploy/run/pipeline.py": """
from mpq_deploy.stages.measure import make
def go():
    from mpq_deploy.rounding.grids import rounded
    return rounded(make())
""",
    "mpq_deploy/stages/measure.py": "MEASURE_FORMAT = 2\ndef make(): return 1\n",
    "mpq_deploy/rounding/grids.py": """
LEVELS = 16
def rounded(x):
    if x is None:
        raise ValueError("There is nothing to round.")
    return round(x * LEVELS) / LEVELS
def other(x): return x
""",
    "mpq_deploy/rounding/unused.py": "A = 1\n",
    "mpq_deploy/latency/table.py": "B = 1\n",
    "recipes/quick.yaml": "budget: 0.35\n",
    "recipes/other.yaml": "budget: 0.5\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def changed(root: Path, file: str, old: str, new: str) -> str:
    """The digest behind a change of one file; what was read of it is forgotten."""
    path = root / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    for known in (pages.tree_of, pages.imports_of, pages.definitions, pages.constants):
        known.cache_clear()
    return pages.digest([COMMAND], root)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_that_is_older_than_the_code_says_so(page: Path) -> None:
    state = pages.state_of(page)
    assert state.commands and all(pages.scripts_of(one, pages.ROOT) for one in state.commands)
    assert not state.complaint, state.complaint


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("benchmarks/bench.py", "COUNT = 3", "COUNT = 4"),
        ("benchmarks/table.py", "quality", "balanced"),
        ("mpq_deploy/stages/measure.py", "FORMAT = 2", "FORMAT = 3"),
        ("mpq_deploy/rounding/grids.py", "LEVELS = 16", "LEVELS = 15"),
        ("mpq_deploy/rounding/grids.py", "x * LEVELS", "x / LEVELS"),
        ("recipes/quick.yaml", "0.35", "0.36"),
    ],
)
def test_what_changes_figures_makes_another_code(root: Path, file: str, old: str, new: str) -> None:
    before = pages.digest([COMMAND], root)
    assert changed(root, file, old, new) != before
    assert changed(root, file, new, old) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("benchmarks/table.py", "width = 1", "width = 2"),
        ("mpq_deploy/run/pipeline.py", "make())", "make() + 1)"),
        ("mpq_deploy/stages/measure.py", "return 1", "return 2"),
        ("mpq_deploy/rounding/grids.py", "nothing to round", "no number"),
        (
            "mpq_deploy/rounding/grids.py",
            "def rounded(x):",
            'def rounded(x: int) -> int:\n    """Round."""  # So.',
        ),
        ("mpq_deploy/rounding/grids.py", "LEVELS = 16", "import math\n\nLEVELS = 16"),
        ("mpq_deploy/rounding/unused.py", "1", "2"),
        ("mpq_deploy/latency/table.py", "1", "2"),
        ("recipes/other.yaml", "0.5", "0.6"),
        ("recipes/quick.yaml", "budget", "# Ours.\nbudget"),
    ],
)
def test_words_order_and_what_is_not_reached_make_none(
    root: Path, file: str, old: str, new: str
) -> None:
    before = pages.digest([COMMAND], root)
    assert changed(root, file, old, new) == before


def test_a_definition_may_move_between_files(root: Path) -> None:
    before = pages.digest([COMMAND], root)
    other = "def other(x): return x\n"
    moved = "mpq_deploy/rounding/moved.py"
    (root / moved).write_text(other, encoding="utf-8")
    after = changed(
        root, "mpq_deploy/rounding/grids.py", other, "from mpq_deploy.rounding.moved import other\n"
    )
    assert after == before


def test_a_page_tells_its_day_and_code_and_when_that_is_no_longer_the_code(root: Path) -> None:
    page = root / "a.md"
    page.write_text(pages.made(PAGE, root), encoding="utf-8")
    assert page.read_text(encoding="utf-8").startswith(PAGE)
    assert pages.state_of(page, root).fresh
    assert not pages.state_of(page, root).complaint
    assert pages.made(page.read_text(encoding="utf-8"), root) == page.read_text(encoding="utf-8")
    day = pages.state_of(page, root).line["day"]

    changed(root, "mpq_deploy/rounding/grids.py", "LEVELS = 16", "LEVELS = 15")
    message = f"a.md is older than the code: '{COMMAND} --page docs/results/a.md' makes it anew"
    assert message in pages.state_of(page, root).complaint
    marked = pages.marked(page.read_text(encoding="utf-8"), root)
    assert re.search(rf"\n\nMade on {day} by code \w+, older than the present code\.\n$", marked)
    page.write_text(marked, encoding="utf-8")
    assert not pages.state_of(page, root).complaint and not pages.state_of(page, root).fresh
    assert pages.marked(marked, root) == marked

    changed(root, "mpq_deploy/rounding/grids.py", "LEVELS = 15", "LEVELS = 16")
    assert "and is not" in pages.state_of(page, root).complaint
    assert pages.marked(marked, root) == pages.made(PAGE, root)


def test_a_page_without_the_line_is_named_with_its_command(root: Path) -> None:
    page = root / "a.md"
    page.write_text(PAGE, encoding="utf-8")
    assert (
        f"'{COMMAND} --page docs/results/a.md' makes it anew"
        in pages.state_of(page, root).complaint
    )
    assert pages.marked(PAGE, root) == PAGE
