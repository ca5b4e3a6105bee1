"""Figures that documents quote are those of the pages; every figure in dB of the README is quoted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.quote_figures import INLINE, ROOT, TABLE, QuoteError, documents, quoted

PAGE = """# Page

| budget | bytes | PSNR dB |
|---|---:|---:|
| 0.35 | 2,500 | 51.1 |
| everything INT8 | 5,000 | 41.2 |

## Two, of digits

| budget | PSNR dB | seconds |
|---|---:|---:|
| 0.35 | 55.4 | 3 |
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_documents_quote_the_pages_as_they_are(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    message = f"python scripts/quote_figures.py renews {document.name}"
    assert quoted(text, document.parent) == text, message


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_every_marker_is_one_that_is_read(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text.count("<!-- quote ") == len(INLINE.findall(text)) + len(TABLE.findall(text))
    assert not re.search(r"^<!-- quote .*<!-- end -->", text, re.MULTILINE), (
        "it would end the paragraph"
    )


def test_the_readme_is_short_and_quotes_its_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 110
    assert TABLE.search(text)
    own = TABLE.sub("", INLINE.sub("", text))
    assert not re.search(r"\d+(\.\d+)? dB", own), "a figure that nothing checks"


@pytest.mark.parametrize(
    ("marker", "figure"),
    [
        ("page.md | 0.35 | PSNR dB", "51.1"),
        ("page.md#two-of-digits | 0.35 | PSNR dB", "55.4"),
        ("page.md | 0.35 | seconds", "3"),
        ("page.md | 0.35 / everything INT8 | bytes | .0%", "50%"),
    ],
)
def test_a_figure_is_quoted(folder: Path, marker: str, figure: str) -> None:
    text = f"It has <!-- quote {marker} -->0<!-- end --> there."
    new = quoted(text, folder)
    assert new == f"It has <!-- quote {marker} -->{figure}<!-- end --> there."
    assert quoted(new, folder) == new


def test_a_table_is_quoted_behind_its_own_first_column(folder: Path) -> None:
    head = "<!-- quote page.md | everything INT8; 0.35 | PSNR dB; bytes -->\n\n| | dB | bytes |\n|---|---:|---:|\n"
    new = quoted(f"{head}| INT8 |\n| **ours** | 1 | 2 |\n\nafter\n", folder)
    assert new == f"{head}| INT8 | 41.2 | 5,000 |\n| **ours** | 51.1 | 2,500 |\n\nafter\n"
    assert quoted(new, folder) == new


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("none.md | 0.35 | PSNR dB", "There is no page none.md"),
        ("page.md#three | 0.35 | PSNR dB", "page.md has no heading #three"),
        ("page.md | 0.5 | PSNR dB", "page.md has no row '0.5'"),
        ("page.md | 0.35 | SSIM", "page.md has no table with a column 'SSIM'"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, marker: str, message: str) -> None:
    with pytest.raises(QuoteError, match=re.escape(message)):
        quoted(f"a <!-- quote {marker} --><!-- end -->", folder)


def test_a_table_of_other_length_is_refused(folder: Path) -> None:
    with pytest.raises(QuoteError, match="2 rows are quoted in a table of 1"):
        quoted(
            "<!-- quote page.md | 0.35; 0.5 | PSNR dB -->\n\n| | dB |\n|---|---:|\n| a |\n", folder
        )
