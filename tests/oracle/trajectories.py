"""The derivative of every pipeline's image beside differences of images that diffusers makes.

    python -m tests.oracle.trajectories [--page docs/results/pipeline-trajectories.md] [--only FluxPipeline]

--only NAME     classes whose name begins so (repeatable)
--page FILE     write the table as Markdown
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pages import made
from mpq_deploy.calls.pipeline_runs import PipelineRuns
from mpq_deploy.calls.pipeline_tape import PipelineTape
from mpq_deploy.errors import MpqError
from mpq_deploy.models.denoiser import Denoiser
from tests.oracle.comparison import open_case
from tests.oracle.page import made_by
from tests.oracle.pipelines import BUILDERS, REFUSED, STEPS, Case, save_case

SEED = 5
# Errors of these parts of the outputs' standard deviation: where images are clipped or a random network
# is steep, only small ones are nearly linear, and float32 blurs the smallest.
SIZES = (1e-3, 1e-4, 1e-5)
CLOSE = 0.05
PACKAGES = ("mpq-deploy", "diffusers", "transformers", "torch")
HEAD = """# Trajectories through pipelines of diffusers

```sh
{command}
```

{versions}.

Each class is built from tiny configurations with random weights and called once, {steps} steps, with an error added to
the denoiser's output at every call. *By the derivative*: how the errors change half the square of the image to first
order, from one backward pass through the pipeline. The last columns are this over what was measured, by two images that
the pipeline makes by itself with errors of either sign, of 1e-3, 1e-4 and 1e-5 of the outputs. One of them is to be
within {close:.0%}. *Through*: the inputs of the denoiser that depend on earlier outputs.

"""


@dataclass(frozen=True)
class Agreement:
    """``predicted`` change of half the image's square; ``measured`` for each of ``sizes``; denoiser calls.

    ``through``: the denoiser's inputs that depend on outputs of earlier calls.
    """

    predicted: float
    measured: tuple[float, ...]
    calls: int
    through: tuple[str, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Derivative over measured, by size."""
        return tuple(self.predicted / one if one else float("inf") for one in self.measured)

    @property
    def off(self) -> float:
        """How far the best of the ratios is from one."""
        return min(abs(one - 1) for one in self.ratios)


def agreement(case: Case, denoiser: Denoiser, sizes: tuple[float, ...] = SIZES) -> Agreement:
    """Differentiate the case's image, and make images with errors. Raises NoTrajectory."""
    runs, reference = PipelineRuns(case.folder, denoiser.spec), denoiser.network.reference
    found = PipelineTape.of(runs, 0, STEPS, SEED, reference)
    random = np.random.default_rng(0)
    outputs = [one.detach().numpy() for one in found.tape.outputs]
    errors = [random.standard_normal(one.shape, np.float32) * one.std() for one in outputs]
    predicted = 0.0

    def through(call: int, wanted: Any) -> dict[str, list[Any]]:
        nonlocal predicted
        predicted += float((wanted[0].double() * torch.from_numpy(errors[call])).sum())
        given = tuple(found.tape.given[call])
        return _through_torch(denoiser, found.feeds[call], given, wanted[0]) if given else {}

    # The gradient of half the square is the image itself, whatever the order of its axes.
    found.tape.back([found.tape.final.detach()], through)

    def half_square(size: float) -> float:
        """Of the image that diffusers makes with ``size`` of the errors."""
        left = iter(errors)
        runs.compute = lambda feeds: reference(feeds) + np.float32(size) * next(left)
        return float(np.square(runs.image(0, STEPS, SEED), dtype=np.float64).sum()) / 2

    plain = float(found.tape.final.detach().double().square().sum()) / 2
    # With autograd on, PyTorch takes other kernels for attention.
    assert abs(half_square(0.0) / plain - 1) <= 1e-3, "another image"
    measured = tuple((half_square(s) - half_square(-s)) / (2 * s) for s in sizes)
    names = dict.fromkeys(name for given in found.tape.given for name in given)
    return Agreement(predicted, measured, len(outputs), tuple(names))


def _through_torch(
    denoiser: Denoiser, feeds: Mapping[str, Any], given: tuple[str, ...], wanted: Any
) -> dict[str, list[Any]]:
    """Return the gradients of inputs ``given``, by the float module and torch's autograd alone."""
    network: Any = denoiser.network
    tensors = {item.name: torch.from_numpy(feeds[item.name]) for item in network.inputs}
    leaves = {name: tensors[name].requires_grad_() for name in given}
    output = network._call(network.module.requires_grad_(False), *tensors.values())
    rows = torch.autograd.grad(output, list(leaves.values()), wanted, allow_unused=True)
    return {name: [row] for name, row in zip(leaves, rows, strict=True) if row is not None}


def outcome(name: str) -> Agreement | MpqError:
    """Return how the class agrees, or why it has no derivative."""
    sys.stderr.write(f"{name}\n")
    with tempfile.TemporaryDirectory(prefix="oracle-") as place:
        try:
            case = save_case(name, Path(place))
            return agreement(case, open_case(case))
        except MpqError as error:
            return error


def main() -> int:
    """Run the classes and print their table; return 1 where a derivative is not as measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--page", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [name for name in BUILDERS if name.startswith(tuple(chosen.only) or "")]
    found = {name: outcome(name) for name in names if name not in REFUSED}
    text = page(found, chosen.only, chosen.page)
    sys.stdout.write(text)
    if chosen.page:
        chosen.page.write_text(made(text), encoding="utf-8")
    ran = [one for one in found.values() if isinstance(one, Agreement)]
    return 0 if ran and all(one.off <= CLOSE for one in ran) else 1


def page(found: dict[str, Agreement | MpqError], only: list[str], path: Path | None) -> str:
    """Return the results as Markdown."""
    command, versions = made_by("tests.oracle.trajectories", PACKAGES, only, path)
    lines = [HEAD.format(command=command, versions=versions, steps=STEPS, close=CLOSE)]
    lines.append("| class | calls | through | by the derivative | 1e-3 | 1e-4 | 1e-5 |\n")
    lines.append("|---|---:|---|---:|---:|---:|---:|\n")
    ran = {name: one for name, one in found.items() if isinstance(one, Agreement)}
    for name, one in ran.items():
        through = ", ".join(f"`{n}`" for n in dict.fromkeys(n.split(".")[0] for n in one.through))
        cells = (name, one.calls, through or "-", f"{one.predicted:.4g}")
        ratios = [f"{ratio:.3f}" for ratio in one.ratios]
        lines.append(f"| {' | '.join(map(str, (*cells, *ratios)))} |\n")
    close = sum(one.off <= CLOSE for one in ran.values())
    lines.append(f"\n{close} of {len(ran)} agree within {CLOSE:.0%}.\n")
    why = {name: one.message for name, one in found.items() if isinstance(one, MpqError)}
    lines += [f"\nWithout: {name}: {message}.\n" for name, message in why.items()]
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
