"""By what code each page of docs/results was made, and whether that is the code as it is.

    python benchmarks/pages.py [--mark] [--made PAGE ...]

A page ends with the day on which its commands ran and a digest of what its figures depend on: the commands; the
definitions of the script and of the package's rooms that compute figures (ROOMS), as far as the script imports them;
the stages' format numbers, which stand for export and evaluation; the recipe and target files. Docstrings, comments,
annotations, messages of errors, imports and the order of definitions do not count, so a change of words makes no page
old. Prints every page with its state and its commands; exit code 1 when a page is older than the code and does not
say so.

--mark writes into the pages that are older that they are, and takes it back where it no longer holds; --made records
that pages were just made by their commands, where several commands or another program write them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mpq_deploy"
# What figures of quality come from. Other rooms count where the script itself imports them ...
ROOMS = {"allocate", "calibrate", "calls", "formats", "graph/writers", "onnx_torch", "recipe"}
ROOMS |= {"rounding", "sensitivity"}
# ... but for those that move files, print and keep order, and those whose stages' format numbers say enough.
MACHINERY = {"api", "cli", "errors", "report", "run", "stages", "system"}
MACHINERY |= {"evaluate", "graph", "graph/passes", "models"}
# What the scripts share: only this of it changes figures.
SHARED = {"benchmarks/table.py": ("bench_recipe",), "benchmarks/pages.py": ()}
WORDS = {"annotation", "returns", "type_params", "kind", "type_comment"}
TEXTS = {"description", "help", "hint"}
OLDER = ", older than the present code"
LINE = re.compile(
    r"^Made on (?P<day>\S+) by (?:code (?P<digest>[0-9a-f]{12})|the code of commit [0-9a-f]+)"
    rf"(?P<older>{OLDER})?\.$"
)
COMMAND = re.compile(r"^ {0,4}((?:\w+=\S+ )*(?:python|mpq-deploy) .+)$", re.MULTILINE)


@dataclass(frozen=True)
class State:
    """A page's commands, and when and by what code it says that it was made."""

    page: Path
    commands: tuple[str, ...]
    line: re.Match[str] | None
    root: Path

    @cached_property
    def fresh(self) -> bool:
        """Whether the present code made the page."""
        told = self.line["digest"] if self.line else None
        return told is not None and told == digest(self.commands, self.root)

    @property
    def complaint(self) -> str:
        """What is wrong with what the page says, and what mends it; "" where it is true."""
        again = " and ".join(f"'{command}'" for command in self.commands)
        if self.line is None:
            return f"{self.page.name} does not say by what code it was made: {again} makes it anew"
        if self.fresh == bool(self.line["older"]):
            what = (
                "says that it is older than the code, and is not"
                if self.fresh
                else "is older than the code"
            )
            return f"{self.page.name} {what}: {again} makes it anew, 'python benchmarks/pages.py --mark' says so in it"
        return ""


def made(text: str, root: Path = ROOT) -> str:
    """Return a page's text with its last line: made today, by the present code."""
    return f"{without_line(text)}\n\nMade on {date.today()} by code {digest(commands_of(text), root)}.\n"


def marked(text: str, root: Path = ROOT) -> str:
    """Return a page's text whose last line says whether it is older than the present code."""
    line = LINE.match(last_line(text))
    if line is None or line["digest"] is None:
        return text
    older = "" if line["digest"] == digest(commands_of(text), root) else OLDER
    return f"{without_line(text)}\n\n{line[0].removesuffix('.').removesuffix(OLDER)}{older}.\n"


def state_of(page: Path, root: Path = ROOT) -> State:
    """Read a page, and compare what it says with the code."""
    text = page.read_text(encoding="utf-8")
    commands = commands_of(text)
    return State(page, commands, LINE.match(last_line(text)), root)


def last_line(text: str) -> str:
    """Return the page's last line."""
    return text.rstrip().rpartition("\n")[2]


def without_line(text: str) -> str:
    """Return the page's text without what is said of its code."""
    text = text.rstrip()
    return text[: -len(last_line(text))].rstrip() if LINE.match(last_line(text)) else text


def commands_of(text: str) -> tuple[str, ...]:
    """Return the commands above a page's first table: those that made it."""
    return tuple(COMMAND.findall(re.split(r"^\|", text, maxsplit=1, flags=re.MULTILINE)[0]))


def digest(commands: Sequence[str], root: Path = ROOT) -> str:
    """Return the digest of what the commands' figures depend on, 12 hexadecimal digits."""
    own, parts = set[Path](), set[str]()
    for command in commands:
        own |= scripts_of(command, root)
        parts.add(re.sub(r" --page \S+", "", command))
    own = reached(own, root, lambda path: path.parts[0] != PACKAGE)
    named = {path for script in own for path in imports_of(root, script)}
    rooms = ROOMS | {room_of(path) for path in (*own, *named)} - MACHINERY - {""}
    for path in reached(own, root, lambda _: True):
        whole = path in own or room_of(path) in rooms
        parts |= definitions(root, path, whole and path.as_posix() not in SHARED)
    files = {file for room in rooms for file in (root / PACKAGE / room).glob("**/*.yaml")}
    words = {word for command in commands for word in shlex.split(command)}
    words |= {word for script in own for word in constants(root, script)}
    files |= {file for file in (root / "recipes").glob("*.yaml") if {file.stem, file.name} & words}
    for file in files:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        parts.add(f"{file.name} {json.dumps(content, sort_keys=True, default=str)}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]


def scripts_of(command: str, root: Path) -> set[Path]:
    """Return the files that a command starts, relative to ``root``."""
    words = [word for word in shlex.split(command) if not re.match(r"\w+=", word)]
    if words[0] == "mpq-deploy":
        found = [root / PACKAGE / "studies" / f"{words[1]}.py"]
    elif words[1] == "-m":
        place = root / words[2].replace(".", "/")
        found = [place.with_suffix(".py"), *sorted(place.glob("*.py"))]
    else:
        found = [root / words[1]]
    return {file.relative_to(root) for file in found if file.is_file()}


def room_of(path: Path) -> str:
    """Return the package's room that a file lies in, "graph/writers", the name of a loose file, or "" for others."""
    parts = path.with_suffix("").parts
    if parts[0] != PACKAGE:
        return ""
    return "/".join(parts[1:3] if parts[1] == "graph" and len(parts) > 3 else parts[1:2])


def reached(start: Iterable[Path], root: Path, follow: Callable[[Path], bool]) -> set[Path]:
    """Return ``start`` and all that is imported from there and satisfies ``follow``."""
    found, left = set[Path](), list(start)
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [one for one in imports_of(root, path) if follow(one)]
    return found


@lru_cache(None)
def tree_of(root: Path, path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse((root / path).read_text(encoding="utf-8"))


@lru_cache(None)
def imports_of(root: Path, path: Path) -> frozenset[Path]:
    """Return the files of the repository that a file imports, inside functions too."""
    names = set[str]()
    for node in ast.walk(tree_of(root, path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    places = [name.replace(".", "/") for name in sorted(names)]
    # A script's neighbours have no folder in front.
    tried = [Path(f"{place}.py") for place in places] + [
        path.parent / f"{place}.py" for place in places
    ]
    return frozenset(one for one in tried if (root / one).is_file())


@lru_cache(None)
def definitions(root: Path, path: Path, whole: bool) -> frozenset[str]:
    """Return what a file defines, without words: all, or what of a shared file or a stage changes figures."""
    kept = SHARED.get(path.as_posix(), ())
    found = []
    for node in tree_of(root, path).body:
        name = getattr(node, "name", "") or getattr(
            next(iter(getattr(node, "targets", ())), None), "id", ""
        )
        number = room_of(path) == "stages" and name.endswith("_FORMAT")
        if (whole or name in kept or number) and not isinstance(node, ast.Import | ast.ImportFrom):
            words: list[str] = []
            meaning(node, words)
            found.append("".join(words))
    return frozenset(found)


@lru_cache(None)
def constants(root: Path, path: Path) -> frozenset[str]:
    """Return the texts that a file holds."""
    nodes = (node for node in ast.walk(tree_of(root, path)) if isinstance(node, ast.Constant))
    return frozenset(node.value for node in nodes if isinstance(node.value, str))


def meaning(node: object, words: list[str]) -> None:
    """Append what a tree means to ``words``, in words of our own: ast.dump differs between versions of Python."""
    if isinstance(node, list):
        for one in node:
            text = isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
            if not text and not (isinstance(one, ast.keyword) and one.arg in TEXTS):
                meaning(one, words)
    elif not isinstance(node, ast.AST):
        words.append(f" {node!r}")
    elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        words.append(f"(Raise {ast.unparse(node.exc.func)})")
    else:
        words.append(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            if name not in WORDS and value is not None and value != []:
                words.append(f" {name}")
                meaning(value, words)
        words.append(")")


def main(arguments: Sequence[str]) -> int:
    """List the pages, mark them, or record that some were made."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--mark", action="store_true", help="say in pages that are older that they are"
    )
    parser.add_argument("--made", nargs="+", type=Path, default=[], metavar="PAGE")
    chosen = parser.parse_args(arguments)
    for page in chosen.made:
        page.write_text(made(page.read_text(encoding="utf-8")), encoding="utf-8")
    complaints = []
    for page in sorted((ROOT / "docs" / "results").glob("*.md")):
        if chosen.mark:
            page.write_text(marked(page.read_text(encoding="utf-8")), encoding="utf-8")
        state = state_of(page)
        complaints += [state.complaint] if state.complaint else []
        day = state.line["day"] if state.line else "unknown"
        print(
            f"{page.name:26} {'fresh' if state.fresh else 'older':6} {day:11} {'; '.join(state.commands)}"
        )
    print("\n".join(complaints) or "every page says by what code it was made", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
