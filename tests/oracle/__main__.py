"""Every class of pipeline with its denoiser as the exported ONNX graph, beside diffusers alone.

    python -m tests.oracle [--page docs/results/pipelines.md] [--only FluxPipeline]

--only NAME     classes whose name begins so (repeatable)
--page FILE     write the table as Markdown
--record FILE   keep each class's result, and take those that are there (a class takes some 20 s)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks.pages import made
from mpq_deploy.errors import MpqError
from mpq_deploy.models.export import export_denoiser
from mpq_deploy.runtime.ort import OrtDenoiser
from tests.oracle.comparison import Comparison, compare, open_case
from tests.oracle.page import made_by
from tests.oracle.pipelines import BUILDERS, NOT_EXPORTED, REFUSED, STEPS, save_case

PACKAGES = ("mpq-deploy", "diffusers", "transformers", "torch", "onnx", "onnxruntime")
# Images by a graph: parts of the largest value.
EXPORTED, INPUTS = 2e-3, 1e-4
HEAD = """# Pipelines of diffusers

```sh
{command}
```

{versions}.

Each class is built from tiny configurations with random weights, saved, and called twice with the same noise, {steps}
steps: once by diffusers alone, with hooks on its own denoiser, and once as a build runs it, with the denoiser's
exported ONNX graph (float, ONNX Runtime) in its place. Everything else is the pipeline's own. *Inputs differ* and
*images* are the largest differences at any step, as parts of the largest value of what is compared, at least 1: later
steps start from what earlier ones gave, so they say how far the graph's rounding moves the run. With the denoiser
computed by PyTorch they are at most 1e-5 and 1e-4 (`tests/oracle/test_oracle.py`). Nothing here says how well a
trained model of that class takes a budget. Exit code 1 where a class's images differ by more than {limit:g}, or
it ends otherwise than the tests say.

"""


def main() -> int:
    """Run the classes and print their table; return 1 where one is not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--page", type=Path)
    parser.add_argument("--record", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [name for name in BUILDERS if name.startswith(tuple(chosen.only) or "")]
    found = recorded(chosen.record)
    for name in names:
        if name not in found:
            found[name] = outcome(name)
            record(chosen.record, name, found[name])
    found = {name: found[name] for name in names}
    text = page(found, chosen.only, chosen.page)
    sys.stdout.write(text)
    if chosen.page:
        chosen.page.write_text(made(text), encoding="utf-8")
    return 0 if all(as_expected(name, one) for name, one in found.items()) else 1


def outcome(name: str) -> Comparison | MpqError:
    """Return how the class differs, or why it is refused."""
    sys.stderr.write(f"{name}\n")
    with tempfile.TemporaryDirectory(prefix="oracle-") as place:
        folder = Path(place)
        try:
            case = save_case(name, folder)
            denoiser = open_case(case)
            export_denoiser(denoiser, folder / "export")
            session = OrtDenoiser(folder / "export" / "model.onnx", denoiser.spec)
            return compare(case, denoiser, session.run, folder)
        except MpqError as error:
            error.message = error.message.replace(str(folder / "pipeline"), "the folder")
            return error


def record(path: Path | None, name: str, found: Comparison | MpqError) -> None:
    """Append a class's result to the record."""
    if path is not None:
        content = {"message": found.message} if isinstance(found, MpqError) else asdict(found)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **content}) + "\n")


def recorded(path: Path | None) -> dict[str, Comparison | MpqError]:
    """Return the results of a record, none where there is no such file."""
    found: dict[str, Comparison | MpqError] = {}
    if path is not None and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            content = json.loads(line)
            name, message = content.pop("name"), content.pop("message", None)
            found[name] = Comparison(**content) if message is None else MpqError(message)
    return found


def as_expected(name: str, found: Comparison | MpqError) -> bool:
    """Whether the class passed, or is refused as the tests say."""
    if isinstance(found, MpqError):
        return name in REFUSED or name in NOT_EXPORTED
    return name not in REFUSED and found.images <= EXPORTED and found.inputs <= INPUTS


def page(found: dict[str, Comparison | MpqError], only: list[str], path: Path | None) -> str:
    """Return the results as Markdown."""
    command, versions = made_by("tests.oracle", PACKAGES, only, path)
    head = HEAD.format(command=command, versions=versions, steps=STEPS, limit=EXPORTED)
    ran = {name: one for name, one in found.items() if isinstance(one, Comparison)}
    refused = {name: one for name, one in found.items() if isinstance(one, MpqError)}
    by_torch = {name: one for name, one in refused.items() if name in NOT_EXPORTED}
    refused = {name: one for name, one in refused.items() if name not in by_torch}
    parts = [head + table(COLUMNS, [row(name, one) for name, one in ran.items()])]
    for title, ones in (("Without a graph", by_torch), ("Refused", refused)):
        why = [(name, one.message) for name, one in ones.items()]
        text = NO_GRAPH if ones is by_torch else ""
        parts += [f"## {title}\n\n{text}{table(('class', 'why'), why)}"] if why else []
    return "\n".join(parts)


NO_GRAPH = """Run by our code with PyTorch's denoiser these are as by diffusers alone, but PyTorch cannot export their
denoiser: no build is possible.

"""
COLUMNS = ("class", "denoiser", "inputs", "constants", "calls", "steps", "inputs differ", "images")


def row(name: str, one: Comparison) -> tuple[str, ...]:
    """Return the cells of a class that ran."""
    counts = (str(one.calls), str(one.steps))
    texts = (f"`{one.denoiser}`", listed(one.names), listed(one.constants))
    return (name, *texts, *counts, f"{one.inputs:.1e}", f"{one.images:.1e}")


def listed(names: Iterable[str]) -> str:
    """Return names, the elements of a list as one: ``residuals.0``, ``residuals.1`` as ``residuals.*``."""
    short = dict.fromkeys(f"{n.split('.')[0]}.*" if "." in n else n for n in names)
    return ", ".join(f"`{name}`" for name in short)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|---" * (lines[0].count("|") - 1) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
