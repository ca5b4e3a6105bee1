"""Compare the results of two run folders, such as those of two versions of this package, and say what differs.

    python scripts/same_results.py OLD NEW [--renamed old=new] [--removed field] [--words]

Compared: the plan, losses and sizes by value; graphs, weights and the engine's list of layers by digest; records of
the engine and of recovery by value; a package by its parts, the installer's own code aside; ``report.json`` value by
value. Aside: seconds, memory, versions, digests of what is compared itself, paths, and the engine's own bytes, in which
TensorRT writes numbers that differ at each build. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BY_DIGEST = (
    *(f"quantize/{name}" for name in ("model.onnx", "model.fp32.onnx", "weights.bin")),
    *(f"recover/{name}" for name in ("model.onnx", "model.fp32.onnx", "weights.bin")),
    "engine/layers.txt",
)
BY_VALUE = (
    *("allocate/plan.json", "quantize/size.json", "recover/size.json", "recover/recovery.json"),
    *("engine/build.json", "report.json"),
)
PACKAGES = "*.mpq.tar"
# What the installer brings of its own, and the list of digests over all parts.
INSTALLER = frozenset({"install.pyz", "build.sh", "SHA256SUMS"})
# Fields that say how a run was made, not what came out of it; `digests`, `parts` and `from` hold digests of files that
# are compared themselves.
ASIDE = re.compile(
    r"(.*_)?(seconds|versions?)|peak_rss_bytes|cached|cpu_latency|made_by|reproduce|sha256|digests|parts|from"
)


@dataclass(frozen=True)
class Rules:
    """What may differ: fields by their new names, fields that one run lacks, and the wording of texts."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    words: bool = False


def differing_runs(old: Path, new: Path, rules: Rules) -> list[str]:
    """One line per difference between two run folders; raise FileNotFoundError where one is no run."""
    for folder in (old, new):
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no run.json")
    lines = []
    for name in (*BY_DIGEST, *BY_VALUE):
        parts = [_read(folder / name) for folder in (old, new)]
        lines += differing_parts(name, *parts, rules)
    packages = sorted({file.name for folder in (old, new) for file in folder.glob(PACKAGES)})
    for name in packages:
        lines += differing_packages(old / name, new / name, rules)
    return lines


def differing_parts(name: str, old: bytes | None, new: bytes | None, rules: Rules) -> list[str]:
    """Compare one file, JSON by value and others by digest; None stands for a file that is not there."""
    if old is None or new is None:
        return [] if old is new else [f"{name}: only in {'NEW' if old is None else 'OLD'}"]
    if name.endswith(".json"):
        return [
            f"{name}: {line}" for line in differing_values(json.loads(old), json.loads(new), rules)
        ]
    digests = [hashlib.sha256(content).hexdigest()[:12] for content in (old, new)]
    return (
        [] if digests[0] == digests[1] else [f"{name}: bytes differ ({digests[0]}, {digests[1]})"]
    )


def differing_packages(old: Path, new: Path, rules: Rules) -> list[str]:
    """Compare the parts of two packages, the installer's own aside."""
    if not (old.is_file() and new.is_file()):
        return [f"{old.name}: only in {'OLD' if old.is_file() else 'NEW'}"]
    before, after = _unpacked(old), _unpacked(new)
    lines: list[str] = []
    for name in sorted((before.keys() | after.keys()) - INSTALLER):
        lines += differing_parts(f"{old.name}/{name}", before.get(name), after.get(name), rules)
    return lines


def differing_values(old: Any, new: Any, rules: Rules, place: str = "") -> Iterator[str]:
    """Walk two JSON values and yield each place that differs, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        before = {rules.renamed.get(k, k): v for k, v in old.items() if k not in rules.removed}
        after = {k: v for k, v in new.items() if k not in rules.removed}
        for key in sorted(k for k in before.keys() | after.keys() if not ASIDE.fullmatch(k)):
            where = f"{place}.{key}" if place else key
            if key in before and key in after:
                yield from differing_values(before[key], after[key], rules, where)
            else:
                yield f"{where}: only in {'OLD' if key in before else 'NEW'}"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new)):
            yield from differing_values(*pair, rules, f"{place}[{number}]")
    elif not _equal(old, new, rules):
        yield f"{place}: {_short(old)} -> {_short(new)}"


def _equal(old: Any, new: Any, rules: Rules) -> bool:
    """Whether two plain values are one: numbers to the last bit, NaN like NaN, texts with their new names."""
    if isinstance(old, str) and isinstance(new, str):
        is_prose = " " in old and " " in new
        return rules.renamed.get(old, old) == new or old == new or (rules.words and is_prose)
    return type(old) is type(new) and (old == new or (old != old and new != new))


def _short(value: Any) -> str:
    """A value in at most 60 characters; lists and tables by their length."""
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _unpacked(archive: Path) -> dict[str, bytes]:
    """The regular files of a tar archive by name; nothing is written to disk."""
    with tarfile.open(archive) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar if member.isfile())
        return {name.removeprefix("./"): content.read() for name, content in files if content}


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form old=new")
    return old, new


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what differs; return 0 for equal results, 1 for others, 2 for folders that are no runs."""
    parser = argparse.ArgumentParser(description="Compare the results of two run folders.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--renamed",
        type=_pair,
        action="append",
        default=[],
        metavar="old=new",
        help="field or value",
    )
    parser.add_argument(
        "--removed", action="append", default=[], help="field that only one of the runs has"
    )
    parser.add_argument("--words", action="store_true", help="texts of several words may differ")
    chosen = parser.parse_args(arguments)
    rules = Rules(dict(chosen.renamed), frozenset(chosen.removed), chosen.words)
    try:
        lines = differing_runs(chosen.old, chosen.new, rules)
    except FileNotFoundError as error:
        print(f"same_results: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines) if lines else "the results are the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
