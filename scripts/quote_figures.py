"""Quote figures of docs/results in README.md and docs/*.md, so that a page and its quotations cannot differ.

    python scripts/quote_figures.py [--check]

A quotation stands between two comments, and names the page, row and column of a table. Two rows joined by " / "
quote their ratio, in the format that follows. A line must not begin with such a comment: it would end the paragraph.

    <!-- quote results/budgets-emoji.md | 0.35 | PSNR dB -->51.1<!-- end -->
    <!-- quote results/budgets-emoji.md | 0.265 / everything INT8 | bytes | .0% -->53%<!-- end -->

A whole table has one comment in front of it, which names the rows and columns; the first column is the author's:

    <!-- quote results/budgets-emoji.md | 0.5; 0.35 | of FP16; PSNR dB -->

Where a page has several tables, `page.md#heading` names the one below that heading. Rewrites the documents, or with
--check says which are out of date and returns 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INLINE = re.compile(r"(<!-- quote ([^>]+?) -->)([^<]*)(<!-- end -->)")
TABLE = re.compile(r"(<!-- quote ([^>]+?) -->\n\n?)((?:\|.*\n)+)")

Table = Mapping[str, Mapping[str, str]]


class QuoteError(ValueError):
    """A quotation that names no page, row or column."""


def documents(root: Path = ROOT) -> list[Path]:
    """The documents that may quote."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def quoted(text: str, folder: Path) -> str:
    """Return ``text`` with its quotations as the pages have them now; pages are named relative to ``folder``."""

    def inline(match: re.Match[str]) -> str:
        return f"{match[1]}{_figure(match[2], folder)}{match[4]}"

    def table(match: re.Match[str]) -> str:
        return match[1] + _table(match[2], match[3], folder)

    return TABLE.sub(table, INLINE.sub(inline, text))


def _figure(marker: str, folder: Path) -> str:
    """The value of one inline quotation."""
    page, row, column, *spec = (part.strip() for part in marker.split("|"))
    table = read_table(folder, page, column)
    if " / " in row and row not in table:
        first, second = (_number(_cell(table, r, column, page)) for r in row.split(" / "))
        return format(first / second, spec[0] if spec else "g")
    return _cell(table, row, column, page)


def _table(marker: str, text: str, folder: Path) -> str:
    """The table of a quotation: as many rows and columns as named, behind the author's first column."""
    page, rows, columns = (part.strip() for part in marker.split("|"))
    names = [name.strip() for name in columns.split(";")]
    table = read_table(folder, page, names[0])
    header, rule, *body = text.splitlines()
    wanted = [row.strip() for row in rows.split(";")]
    if len(body) != len(wanted):
        raise QuoteError(f"{page}: {len(wanted)} rows are quoted in a table of {len(body)}")
    lines = [header, rule]
    for line, row in zip(body, wanted):
        label = line.split("|")[1].strip()
        lines.append(
            "| " + " | ".join([label, *(_cell(table, row, c, page) for c in names)]) + " |"
        )
    return "\n".join(lines) + "\n"


def read_table(folder: Path, page: str, column: str) -> Table:
    """The first table of ``page`` (below its ``#heading``) that has ``column``: its cells by row and column."""
    name, _, heading = page.partition("#")
    file = folder / name
    if not file.is_file():
        raise QuoteError(f"There is no page {name}")
    lines = file.read_text(encoding="utf-8").splitlines()
    start = 0
    if heading:
        starts = [
            n for n, line in enumerate(lines) if line.startswith("#") and slug(line) == heading
        ]
        if not starts:
            raise QuoteError(f"{name} has no heading #{heading}")
        start = starts[0] + 1
    for number in range(start, len(lines) - 1):
        if lines[number].startswith("|") and re.match(r"\|[-:| ]+\|$", lines[number + 1]):
            header = _cells(lines[number])
            if column in header:
                return dict(_rows(lines[number + 2 :], header))
    raise QuoteError(f"{page} has no table with a column {column!r}")


def _rows(lines: Sequence[str], header: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = _cells(line)
        rows.append((cells[0], dict(zip(header, cells))))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _cell(table: Table, row: str, column: str, page: str) -> str:
    if row not in table:
        raise QuoteError(f"{page} has no row {row!r}; it has {', '.join(map(repr, table))}")
    return table[row][column]


def _number(text: str) -> float:
    return float(text.replace(",", "").rstrip(" %"))


def slug(heading: str) -> str:
    """A heading's anchor, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).strip().replace(" ", "-")


def main(arguments: Sequence[str]) -> int:
    """Rewrite the documents, or check them."""
    stale = []
    for document in documents():
        text = document.read_text(encoding="utf-8")
        new = quoted(text, document.parent)
        if new != text:
            stale.append(document.relative_to(ROOT).as_posix())
            if "--check" not in arguments:
                document.write_text(new, encoding="utf-8")
    print("\n".join(stale) if stale else "every figure is as its page has it")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
