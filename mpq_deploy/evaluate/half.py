"""Whether the deployed file's FP16 arithmetic gives what its FP32 twin gives, by a few calls.

In: the float file, the deployed one and its twin, some recorded calls. Out: the output's error of
both against the float model's, and the values that FP16 does not hold. Images and errors of an
evaluation are the twin's, which no overflow of FP16 can reach: that would show in the engine alone.
ONNX Runtime computes much of an FP16 graph in FP32 on the CPU, so values beyond FP16 need not show
in its output either, and are looked for in the float model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from mpq_deploy.calibrate.fp16_range import LARGEST_FP16, LargeValue, large_values, named
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError
from mpq_deploy.evaluate.output_error import nmse
from mpq_deploy.models.spec import Array
from mpq_deploy.runtime.ort import make_session, run_session
from mpq_deploy.system.progress import Talk

# Timesteps at which one call is compared: the noisiest, the middle and the last.
TIMESTEPS = 3
# FP16 arithmetic is worth a warning where it makes the error so many times larger, above so much
# (our choice).
WORSE, LEAST = 2.0, 1e-4


@dataclass(frozen=True)
class HalfPrecision:
    """The output's error (NMSE) of the deployed FP16 file and of its FP32 twin on ``calls``.

    ``beyond``: nodes that the file computes in FP16 and whose values pass its range in the float
    model, in graph order. ``unknown``: why there are no errors, where ONNX Runtime has no kernel for
    the file. ``simulated``: what the twin does in place of what ONNX Runtime lacks, so that the file
    cannot run there.
    """

    deployed: float = 0.0
    twin: float = 0.0
    calls: int = 0
    beyond: tuple[LargeValue, ...] = ()
    unknown: str = ""
    simulated: str = ""

    @property
    def note(self) -> str:
        """Both, for the report."""
        if self.simulated:
            large = f" {_named(self.beyond)}." if self.beyond else ""
            return f"{self.simulated}. What FP16 arithmetic adds is unknown.{large}"
        if self.unknown:
            return f"What the deployed file's FP16 arithmetic costs is unknown: {self.unknown}"
        large = f" {_named(self.beyond)}." if self.beyond else ""
        return (
            f"The deployed file computes in FP16: on {self.calls} calls in ONNX Runtime its output's error is "
            f"{self.deployed:.2e}, that of the graph in FP32 arithmetic that everything else here was measured on "
            f"{self.twin:.2e}.{large}"
        )

    @property
    def warning(self) -> str:
        """What to warn of; empty for nothing."""
        if self.beyond:
            return f"{_named(self.beyond)}: an engine may give NaN, unless TensorRT fuses them with what follows"
        if self.unknown:
            return self.note
        if self.deployed <= max(WORSE * self.twin, LEAST):
            return ""
        return (
            f"FP16 arithmetic makes the output's error {self.deployed / max(self.twin, 1e-12):.3g} times what was "
            f"measured in FP32 ({self.deployed:.2e}, {self.twin:.2e}): the engine's images will be worse than shown"
        )


class ComparedFiles(NamedTuple):
    """The float graph, the deployed one and its FP32 twin."""

    float_model: Path
    deployed: Path
    twin: Path


def half_precision(
    files: ComparedFiles,
    calls: RecordedCalls,
    talk: Talk,
    wide: Collection[str] = (),
    simulated: str = "",
) -> HalfPrecision:
    """Run one recorded call at some timesteps through all three files, one file after the other.

    ``wide``: nodes that the deployed file computes in FP32, since FP16 does not hold their values.
    Where the twin is ``simulated``, which says of what, the deployed file cannot be run.
    Raises ModelError, naming the nodes whose values FP16 does not hold, where the deployed file's
    output is not finite.
    """
    recorded = calls.recorded
    steps = np.unique(np.linspace(0, len(recorded.timesteps) - 1, TIMESTEPS).round().astype(int))
    some = replace(calls, recorded=recorded.at(steps).take(np.zeros(1, np.int64)))
    beyond = large_values(files.float_model, some, talk, wide)
    if simulated:
        return HalfPrecision(beyond=beyond, simulated=simulated)
    try:
        half = _outputs(make_session(files.deployed, fake_quant_only=True), some)
    except ModelError as error:
        return HalfPrecision(beyond=beyond, unknown=error.message)
    for timestep, output in zip(some.recorded.timesteps, half, strict=True):
        if not np.isfinite(output).all():
            raise ModelError(
                f"In FP16 the output is not finite at timestep {timestep:g}: {_named(beyond)}.",
                "An engine would give no images. Such a model needs its weights scaled down where its normalisation "
                "allows that, or training in FP16 (bfloat16 reaches further).",
            )
    expected = _outputs(make_session(files.float_model), some)
    single = _outputs(make_session(files.twin, fake_quant_only=True), some)
    errors = [
        np.mean([nmse(*pair) for pair in zip(expected, other, strict=True)])
        for other in (half, single)
    ]
    return HalfPrecision(float(errors[0]), float(errors[1]), len(steps), beyond)


def _outputs(session: ort.InferenceSession, calls: RecordedCalls) -> Array:
    """Return a file's output for each call, one call at each timestep, float32 [K, ...]."""
    halves = {entry.name for entry in session.get_inputs() if entry.type == "tensor(float16)"}
    rows = []
    for batch in calls.batches(1):
        feed = {n: v.astype(np.float16) if n in halves else v for n, v in batch.feed.items()}
        rows.append(np.asarray(run_session(session, calls.spec.output, feed), np.float32))
    return np.stack(rows)


def _named(large: Sequence[LargeValue]) -> str:
    if not large:
        return f"no value of the float model is above {LARGEST_FP16:,.0f}, so one within an operator must be"
    return f"FP16 ends at {LARGEST_FP16:,.0f}, and in the float model these reach beyond: {named(large)}"
