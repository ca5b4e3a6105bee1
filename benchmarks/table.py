"""What the benchmarks share: their options, Markdown tables, PASS/FAIL lines, and the page that keeps a result."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pages import made

from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.run.pipeline import STAGES
from mpq_deploy.run.view import Run

PACKAGES = (
    "mpq-deploy",
    "numpy",
    "onnx",
    "onnxruntime",
    "torch",
    "diffusers",
    "highspy",
    "scipy",
    "tensorrt-rtx",
)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, all others are set right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def verdict(passed: bool, what: str, found: str) -> str:
    """Return one line of the list of checks."""
    return f"- {'PASS' if passed else 'FAIL'}: {what}: {found}"


def decibels(value: float | None) -> str:
    """Return a PSNR as text; None is how a sweep writes an infinite one."""
    return "same" if value is None else f"{value:.1f}"


def versions(packages: Sequence[str] = PACKAGES) -> str:
    """Name Python and every installed package with its version, and how busy the machine is."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    load = os.getloadavg()[0]
    return (
        f"{', '.join(found)}; {os.cpu_count()} cores, load average {load:.1f} when the script ended"
    )


def command() -> str:
    """Return the command that runs this script again."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


class Page:
    """Prints its parts as they come, and keeps them as one Markdown page."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []

    def say(self, text: str) -> None:
        """Print a part."""
        print(text + "\n", flush=True)
        self._parts.append(text)

    def save(self, path: Path | None) -> None:
        """Write the page, command and versions on top, its code at the end; None writes nothing."""
        if path is None:
            return
        head = [f"# {self._title}", f"```sh\n{command()}\n```", versions() + "."]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made("\n\n".join([*head, *self._parts])), encoding="utf-8")

    def conclude(self, checks: Sequence[tuple[bool, str]], path: Path | None) -> NoReturn:
        """Say the checks, write the page, and exit: 0 when all passed, else 1."""
        if checks:
            self.say("\n".join(line for _, line in checks))
        self.save(path)
        sys.exit(0 if all(passed for passed, _ in checks) else 1)


def bench_parser(description: str | None, recipe: bool = True) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes: ``--page``, and ``--set`` where it builds by a recipe."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    if recipe:
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="a recipe entry, repeatable",
        )
    parser.add_argument("--page", type=Path, help="keep the result as a Markdown page")
    return parser


def bench_recipe(path: str | Path | None, changes: Sequence[str], values: dict[str, Any]) -> Recipe:
    """Return the recipe of a benchmark: the file, its own ``values`` over it, then KEY=VALUE ``changes``.

    Plans are those of the least error: what bytes buy is compared, not what speed costs. Controls have
    all images: tables set them beside plans of many budgets.
    """
    given = {}
    for change in changes:
        key, _, value = change.partition("=")
        given[key] = yaml.safe_load(value)
    usual = {"allocate.objective": "quality", "evaluate.controls_images": "all"}
    return load_recipe(path, {**usual, **values, **given})


def weights_digest(run: Run) -> str:
    """Say which weights were measured, as a paragraph: the start of the SHA-256 of each weights file."""
    files: dict[str, str] = STAGES["export"].fields(run)["model.files"]
    named = [
        f"{name} {digest[:12]}"
        for name, digest in files.items()
        if name.endswith((".safetensors", ".onnx"))
    ]
    return f"Weights (SHA-256): {', '.join(named)}."


def made_by_stages(run: Run, stages: Iterable[str]) -> str:
    """Say what each stage took when it was last made, as a paragraph."""
    timings = run.folder.timings()
    parts = [
        f"{name} {timings[name]['seconds']:.1f} s, {timings[name]['peak_rss_bytes'] / 1e6:.0f} MB"
        for name in stages
        if name in timings
    ]
    return "Stages, when they were last made: " + "; ".join(parts) + "."
