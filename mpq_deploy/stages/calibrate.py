"""The stage calibrate: the inputs of the sampler's trajectories, and activation statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.calls.timesteps import KEPT_TIMESTEPS
from mpq_deploy.check.check import OPERATOR_RULES, check_dialect
from mpq_deploy.graph.attention import operand_names
from mpq_deploy.run.folder import alike
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import batch_within_memory, check_memory
from mpq_deploy.run.view import CALLS
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.files import Fields

if TYPE_CHECKING:
    from mpq_deploy.calibrate.spread_calibration import CalibrationSetup, KeptCalls
    from mpq_deploy.run.view import Run


# Raised with every change of what calibration leaves behind.
CALIBRATION_FORMAT = 9
# Settings that recorded calls do not depend on, beside how many and at how many timesteps.
NOT_RECORDED = {
    "recipe.allocate.attention",
    *(
        f"recipe.calibrate.{name}"
        for name in ("observed", "scale", "percentile", "reservoir", "shifts")
    ),
}
SAMPLES, TIMESTEPS = "recipe.calibrate.samples", "recipe.calibrate.timesteps"
# And those that what was observed of them does not depend on.
NOT_OBSERVED = {
    SAMPLES,
    *(f"recipe.calibrate.{n}" for n in ("observed", "scale", "percentile", "shifts")),
}
OBSERVED = "observed.npz"


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    # Its operands are calibrated where they may be rounded.
    attention = run.recipe.allocate.attention
    return {
        "calibration.format": CALIBRATION_FORMAT,
        **({} if attention == "fp16" else {"recipe.allocate.attention": attention}),
        **settings(run.recipe.calibrate, "calibrate"),
        "recipe.evaluate.sampler": run.recipe.evaluate.sampler,
        **version_of("onnxruntime", "numpy"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    from mpq_deploy.calibrate.calibrate import calibrate
    from mpq_deploy.calibrate.fp16_range import WIDE_FROM, large_values, named, save_beyond
    from mpq_deploy.calibrate.shifted_inputs import save_shifted
    from mpq_deploy.calibrate.spread_calibration import (
        kept_observed,
        kept_samples,
    )

    section = run.recipe.calibrate
    exported = run.exported
    check_memory(run, STAGE)
    batch = batch_within_memory(run, STAGE.name)
    check_dialect(run, exported.path, OPERATOR_RULES)
    setup = _setup(run, batch)
    section = setup.settings
    kept = _kept(run)
    recorded, stats, seen = calibrate(
        setup, exported.graph, run.talk, scratch=run.scratch(), crew=run.crew, kept=kept
    )
    if seen is not None:
        seen.save(folder / OBSERVED)
    recorded.save(folder / CALLS)
    recorded = recorded.used(section.timesteps)
    stats.save(folder / "stats.npz")
    save_shifted(stats, exported.graph, folder)
    # One call of each size at each timestep.
    watched = setup.calls(recorded.take(recorded.one_of_each()))
    beyond = large_values(exported.path, watched, run.talk, above=WIDE_FROM)
    if beyond:
        run.talk.line(
            f"  {len(beyond)} nodes stay in FP32, near FP16's limit or beyond: {named(beyond)}"
        )
    save_beyond(beyond, folder)
    count, same = recorded.count, kept_samples(kept, setup)
    known = f" (kept {same * count // section.samples} of them)" if same else ""
    before = kept_observed(kept, setup)
    known += f", {len(before.calls)} of them observed before" if before else ""
    return f"{len(recorded.timesteps)} timesteps x {count} calls{known}, {len(stats.activations)} activations"


def _setup(run: Run, batch: int) -> CalibrationSetup:
    from mpq_deploy.calibrate.spread_calibration import CalibrationSetup

    exported, section = run.exported, run.recipe.calibrate.replace(batch_size=batch)
    # A component without timesteps has so many inputs and no more.
    rows = exported.spec.calibration_rows
    if rows is not None:
        section = section.replace(samples=min(section.samples, rows))
    attention = run.recipe.allocate.attention != "fp16"
    operands = operand_names(exported.graph.model) if attention else ()
    return CalibrationSetup(exported.model, section, run.recipe.evaluate.sampler, operands)


def kept_counts(run: Run) -> tuple[int, int]:
    """Return how many trajectories the stage would keep from before, and how many observed calls of each timestep."""
    from mpq_deploy.calibrate.spread_calibration import kept_observed, kept_samples

    kept = _kept(run)
    if kept is None:
        return 0, 0
    setup = _setup(run, run.recipe.calibrate.batch_size)
    seen = kept_observed(kept, setup)
    return kept_samples(kept, setup), 0 if seen is None else len(seen.calls)


def _kept(run: Run) -> KeptCalls | None:
    """Return what the stage recorded before, from the same noise by the same sampler; None for nothing."""
    now, spec = STAGE.fields(run), run.exported.spec
    before = run.folder.made_before("calibrate", now, NOT_RECORDED | {SAMPLES, TIMESTEPS})
    if before is None or spec.recorded or spec.sizes or before.device != str(computing_on()):
        return None
    timesteps, samples = before.inputs[TIMESTEPS], before.inputs[SAMPLES]
    if max(timesteps, KEPT_TIMESTEPS) != max(now[TIMESTEPS], KEPT_TIMESTEPS):
        return None
    from mpq_deploy.calibrate.kept_observation import KeptObservation
    from mpq_deploy.calibrate.spread_calibration import KeptCalls

    folder, observed = run.stage("calibrate"), None
    if alike(before.inputs, now, NOT_OBSERVED) and OBSERVED in before.outputs:
        observed = KeptObservation.load(folder / OBSERVED)
    samples = min(samples, spec.calibration_rows or samples)
    return KeptCalls(CallSet.load(folder / CALLS), samples, observed)


STAGE = Stage(
    "calibrate",
    make,
    inputs,
    reads=("export",),
    hint="Lower calibrate.batch_size, or",
)
