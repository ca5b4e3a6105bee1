"""Time an engine on a device: ``python -m mpq_deploy.bench model.engine``.

Needs only NumPy and TensorRT. A package's installer has it too: ``PYTHONPATH=install.pyz python3 -m
mpq_deploy.bench``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpq_deploy.bench.bench import Schedule, bench_text, measure, origin_of, results
from mpq_deploy.bench.sources import Wish, parse_shapes, subject_of
from mpq_deploy.errors import MpqError
from mpq_deploy.system.files import write_text
from mpq_deploy.system.progress import PlainTalk


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    """The command line for single files; return the exit code."""
    about = "Time an engine, or an ONNX file, on this machine."
    parser = argparse.ArgumentParser(prog="mpq-bench", description=about)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path, help="another file, timed alternating with it")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shape", action="append", default=[], metavar="NAME:1x4x64x64")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("-o", "--out", type=Path, help="results as JSON")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    try:
        shapes, graphs = parse_shapes(chosen.shape), not chosen.no_cuda_graphs
        wish = Wish(chosen.backend, chosen.device, chosen.batch, graphs=graphs, shapes=shapes)
        named = [("ours", chosen.file), *([("other", chosen.against)] if chosen.against else [])]
        subjects = [subject_of(file, name, wish) for name, file in named]
        measured = measure(subjects, Schedule(chosen.calls, chosen.rounds), PlainTalk())
        origin = origin_of(chosen.file, subjects[0].backend, subjects[0].device)
        values = results(measured, origin)
        text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
        if chosen.out:
            write_text(chosen.out, text)
    except MpqError as error:
        hint = f"  {error.hint}\n" if error.hint else ""
        sys.stderr.write(f"mpq-bench: {error.message}\n{hint}")
        return error.exit_code
    write(text if chosen.json else bench_text(values) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
