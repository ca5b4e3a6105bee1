"""Measure how the package is built: rooms, names, lengths, and import circles, each beside its limit.

    python scripts/house.py [PACKAGE]

Prints a table with what breaks a limit below it. Exit code 1 when a limit is broken. Reads source text alone;
nothing of the package is imported.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mpq_deploy"
MAX_LOOSE_FILES, MAX_FOLDERS, MAX_CIRCLE = 5, 24, 3
MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_MANY_PARAMETERS = 50, 6, 10
MAX_COLUMNS, MAX_LONG_LINES_PERCENT = 100, 3.0
LINES_BEFORE, SMALLER_BY = 43_131, 0.12
FORMATS, STAGES = "formats", "stages"
# What says by its name that it holds a format's or a branch's name, whatever it is compared with.
FORM_NAMES = frozenset(
    {"family", "series", "weight_form", "activation_form", "branch_kind", "scheme_name"}
)
# What may hold one: it counts when it is compared with one of these words, or read from a branch or scheme.
KIND_NAMES = frozenset({"kind", "form", "name", "branch", "scheme", "precision"})
OWNERS = frozenset({"branch", "scheme", "weight", "activation", "precision"})
BRANCHES = ("rows", "cols", "lowrank", "scale", "omq", "zres")
NUMBER_FORMATS = ("fp16", "fp8", "fp4", "nvfp4", "int4", "int8", "simulated")
KINDS = frozenset((*BRANCHES, *NUMBER_FORMATS, "w8a8", "w8a16", "w4a16", "w4a8"))
ENDINGS = ("+", "-sim")


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its place in the package, and its tree."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, str(self.path))

    @property
    def room(self) -> str:
        """The folder at the top of the package, "" for a loose file."""
        return self.path.parts[0] if len(self.path.parts) > 1 else ""


@dataclass(frozen=True)
class Measure:
    """A count, the limit that it must keep, and what makes it up."""

    name: str
    value: float
    limit: float
    names: Sequence[str] = ()

    @property
    def kept(self) -> bool:
        """Whether the value is within its limit."""
        return self.value <= self.limit


def read_package(folder: Path) -> list[Module]:
    """Read every Python file under ``folder``, in order of its name."""
    modules = []
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder)
        parts = [folder.name, *path.with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name, path, file.read_text(encoding="utf-8")))
    return modules


def loose_files(modules: Sequence[Module]) -> list[str]:
    """Files at the top of the package, ``__init__`` aside."""
    return [m.path.name for m in modules if not m.room and m.path.stem != "__init__"]


def top_folders(modules: Sequence[Module]) -> list[str]:
    """Folders at the top of the package that hold Python files."""
    return sorted({m.room for m in modules} - {""})


def repeated_names(modules: Sequence[Module]) -> list[str]:
    """Module names that occur more than once, ``__init__``, ``__main__`` and stages aside."""
    counts = Counter(
        m.path.stem for m in modules if m.room != STAGES and not m.path.stem.startswith("__")
    )
    return sorted(name for name, count in counts.items() if count > 1)


def functions(
    modules: Sequence[Module],
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method with its place, such as ``graph/save.py:12 save``."""
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module.path.as_posix()}:{node.lineno} {node.name}", node


def long_functions(modules: Sequence[Module]) -> list[str]:
    """Functions of more than 50 lines, signature and docstring included."""
    lengths = {
        place: (node.end_lineno or 0) - node.lineno + 1 for place, node in functions(modules)
    }
    return [f"{place} ({lines})" for place, lines in lengths.items() if lines > MAX_FUNCTION_LINES]


def functions_of_many_parameters(modules: Sequence[Module]) -> list[str]:
    """Functions of more than 6 parameters; ``self`` and ``cls`` do not count, ``*args`` and ``**kwargs`` do."""
    counts = {place: _parameters(node.args) for place, node in functions(modules)}
    return [f"{place} ({count})" for place, count in counts.items() if count > MAX_PARAMETERS]


def _parameters(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args]
    own = bool(named) and named[0].arg in ("self", "cls")
    starred = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(named) - own + len(arguments.kwonlyargs) + starred


def long_lines_percent(modules: Sequence[Module]) -> float:
    """Lines of more than 100 columns, in percent of all lines."""
    lines = [line for m in modules for line in m.text.splitlines()]
    return 100 * sum(len(line) > MAX_COLUMNS for line in lines) / max(1, len(lines))


def count_lines(modules: Sequence[Module]) -> int:
    """Lines of all files together, blank ones and comments included."""
    return sum(len(m.text.splitlines()) for m in modules)


def kind_comparisons(modules: Sequence[Module]) -> list[str]:
    """Places outside formats/ that compare a format's or branch's kind with a string."""
    places = []
    for module in modules:
        if module.room != FORMATS:
            lines = sorted({node.lineno for node in ast.walk(module.tree) if _compares_kind(node)})
            places += [f"{module.path.as_posix()}:{line}" for line in lines]
    return places


def _compares_kind(node: ast.AST) -> bool:
    """Whether ``node`` is ``x.kind == "rows"``, ``x.form in (...)``, ``x.startswith("+")`` or a match on them."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(
            _is_kind(one, _strings(other)) for one in sides for other in sides if one is not other
        )
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        words = _strings(node.args[0])
        if node.func.attr not in ("startswith", "endswith", "removeprefix", "removesuffix"):
            return False
        named = bool(_last_name(node.func.value) & (FORM_NAMES | KIND_NAMES))
        return any((w.startswith(ENDINGS) and len(w) > 1) or (named and w in KINDS) for w in words)
    if isinstance(node, ast.Match):
        patterns = [case.pattern for case in node.cases]
        words = {c.value for p in patterns for c in ast.walk(p) if isinstance(c, ast.Constant)}
        return _is_kind(node.subject, {w for w in words if isinstance(w, str)})
    return False


def _is_kind(subject: ast.expr, words: set[str]) -> bool:
    """Whether ``subject`` names a format or branch, given the words that it is compared with."""
    if not words:
        return False
    if _last_name(subject) & FORM_NAMES:
        return True
    owner = _last_name(subject.value) if isinstance(subject, ast.Attribute) else set()
    return bool(_last_name(subject) & KIND_NAMES) and (bool(owner & OWNERS) or bool(words & KINDS))


def _last_name(node: ast.expr) -> set[str]:
    """The name that an expression ends with: ``kind`` of ``scheme.branch.kind``; none of a call."""
    if isinstance(node, ast.Attribute):
        return {node.attr}
    return {node.id} if isinstance(node, ast.Name) else set()


def _strings(node: ast.expr) -> set[str]:
    """String constants of an expression: one, or those of a tuple, list or set."""
    items = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {i.value for i in items if isinstance(i, ast.Constant) and isinstance(i.value, str)}


def largest_import_circle(modules: Sequence[Module]) -> list[str]:
    """The files of the largest import circle; imports in functions count, those under TYPE_CHECKING do not."""
    names = {m.name for m in modules}
    imports = {m.name: sorted(imported_modules(m, names) - {m.name}) for m in modules}
    circles = [circle for circle in _strong_components(imports) if len(circle) > 1]
    return sorted(max(circles, key=len, default=[]))


def imported_modules(module: Module, names: set[str]) -> set[str]:
    """Modules among ``names`` that ``module`` imports, wherever the import stands."""
    package = module.path.stem == "__init__"
    found: set[str] = set()
    for node in _imports(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = module.name.split(".")[: (None if package else -1)]
        base = base[: len(base) - node.level + 1] if node.level else []
        source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        # A name may be a module of the package, or something that the package's own file defines.
        found |= {
            f"{source}.{a.name}" if f"{source}.{a.name}" in names else source for a in node.names
        }
    return found & names


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in _last_name(node.test):
            for other in node.orelse:
                yield from _imports(other)
        else:
            yield from _imports(node)


def _strong_components(edges: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Tarjan's strongly connected components of a graph of ``node: its successors``."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for successor in edges[node]:
            if successor not in index:
                visit(successor)
            if successor in stack:
                low[node] = min(low[node], low[successor])
        if low[node] == index[node]:
            start = stack.index(node)
            components.append(stack[start:])
            del stack[start:]

    for node in edges:
        if node not in index:
            visit(node)
    return components


def measure(modules: Sequence[Module]) -> list[Measure]:
    """Return every measure with its limit."""
    counted = {
        "loose files at the top": (loose_files, MAX_LOOSE_FILES),
        "folders at the top": (top_folders, MAX_FOLDERS),
        "module names that occur twice": (repeated_names, 0),
        f"functions over {MAX_FUNCTION_LINES} lines": (long_functions, 0),
        f"functions with over {MAX_PARAMETERS} parameters": (
            functions_of_many_parameters,
            MAX_MANY_PARAMETERS,
        ),
        "files in the largest import circle": (largest_import_circle, MAX_CIRCLE),
    }
    measures = []
    for name, (collect, limit) in counted.items():
        names = collect(modules)
        measures.append(Measure(name, len(names), limit, names))
    places = kind_comparisons(modules)
    files = len({place.split(":")[0] for place in places})
    percent = round(long_lines_percent(modules), 2)
    return [
        *measures,
        Measure("files that compare kinds as strings outside formats/", files, 0, places),
        Measure(f"% of lines over {MAX_COLUMNS} columns", percent, MAX_LONG_LINES_PERCENT),
        Measure("package lines", count_lines(modules), int(LINES_BEFORE * (1 - SMALLER_BY))),
    ]


def table(measures: Sequence[Measure]) -> str:
    """Return the measures as a Markdown table, and below it what breaks a limit."""
    lines = ["| measure | value | limit | ok |", "|---|---:|---:|---|"]
    lines += [
        f"| {m.name} | {m.value:,} | {m.limit:,} | {'yes' if m.kept else 'NO'} |" for m in measures
    ]
    for m in measures:
        if not m.kept and m.names:
            lines += ["", f"{m.name}:", *(f"  {name}" for name in m.names)]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table of the package; return 1 when a limit is broken."""
    measures = measure(read_package(Path(arguments[0]).resolve() if arguments else PACKAGE))
    print(table(measures))
    return 0 if all(m.kept for m in measures) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
