"""The stage measure: the loss of every (layer, scheme)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.calls.recorded import CalibrationSet, RecordedCalls
from mpq_deploy.calls.timesteps import sampled_steps, stride_shares
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import MeasureSettings
from mpq_deploy.rounding.candidate_store import candidates_of
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.run.view import RECIPE, Exported, Run
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.methods import METHODS, ORM_CONTROLS
from mpq_deploy.sensitivity.orm import adapted_steps
from mpq_deploy.sensitivity.subject import Spread, Subject
from mpq_deploy.system.files import Fields
from mpq_deploy.system.progress import Talk


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    section = run.recipe.measure
    fields = settings(section, "measure")
    adaptive = section.sampling == "adaptive"
    if not adaptive:
        del fields["recipe.measure.coarse_timesteps"]
    # What orm is told concerns nobody else: other methods stay as they are.
    orm = fields.pop("recipe.measure.orm")
    if adaptive or METHODS[section.method].weighs_bits:
        fields.update({f"recipe.measure.orm.{key}": value for key, value in orm.items()})
    return {
        **fields,
        **version_of("torch", "onnxruntime", "numpy", "highspy"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    check_memory(run, STAGE)
    section = run.recipe.measure
    subject, said = stage_subject(run)
    table = measure(section.method, subject)
    recorded = run.calibration.inputs
    if recorded.split(section.samples)[1] is recorded and section.method not in ORM_CONTROLS:
        note = "losses are measured on the samples that the weights were rounded on, so they are optimistic"
        said = (*said, note)
    replace(table, notes=(*table.notes, *said)).save(folder)
    for control in ORM_CONTROLS if section.method == "orm" else ():
        (folder / control).mkdir()
        measure(control, subject).save(folder / control)
    run.remove_shards("measure")
    return f"{table.metric}, {sum(map(len, table.losses.values()))} layer-scheme pairs"


def stage_subject(run: Run) -> tuple[Subject, tuple[str, ...]]:
    """Return what the run's recipe measures, spread over its workers, and notes about the timesteps."""
    steps, shares, notes = _measured_steps(run, *_measured_model(run)[:2])
    chosen = tuple(int(step) for step in steps)
    subject = measured_subject(chosen, run)
    return replace(subject, spread=_spread(run, chosen), shares=shares), notes


def measured_subject(chosen: tuple[int, ...], run: Run) -> Subject:
    """Return what the stage measures: the run's candidates, at positions ``chosen`` of the calibrated timesteps."""
    exported, held_out, stats = _measured_model(run)
    calls = (held_out.at(np.array(chosen)), exported.conditions, exported.spec, _settings(run), run.talk)
    return Subject(exported.graph, candidates_of(run, exported.graph), stats, *calls, rotate=True)


def _measured_model(run: Run) -> tuple[Exported, CalibrationSet, CalibrationStats]:
    """Return the model, calls and statistics to measure with."""
    exported = run.exported
    recorded, stats = run.calibration
    _, held_out = recorded.split(run.recipe.measure.samples)
    return exported, held_out, stats


def _spread(run: Run, chosen: tuple[int, ...]) -> Spread:
    return Spread(
        run.crew,
        run.path,
        (RECIPE, "export", "calibrate", "candidates"),
        partial(_opened_subject, chosen),
        run.shard_cache("measure"),
        STAGE.fields(run),
    )


def _opened_subject(chosen: tuple[int, ...], root: Path, talk: Talk) -> Subject:
    return measured_subject(chosen, Run.opened(root, talk))


def _settings(run: Run) -> MeasureSettings:
    """Return the run's settings, with no more calls than there are samples."""
    section = run.recipe.measure
    return section.replace(calls=min(section.calls, section.samples))


def _measured_steps(
    run: Run, exported: Exported, calls: CalibrationSet
) -> tuple[Array, tuple[float, ...] | None, tuple[str, ...]]:
    """Choose which of the calibrated timesteps are measured; return them, their shares and notes."""
    section = run.recipe.measure
    available = len(calls.timesteps)
    count = min(section.timesteps, available)
    if section.sampling == "uniform" or count == available:
        fewer = f"all {available} calibrated timesteps are measured: measure.timesteps asks for {section.timesteps}"
        return sampled_steps(available, count), None, (fewer,) if section.timesteps > available else ()
    recorded = RecordedCalls(calls, exported.conditions, exported.spec)
    coarse = min(section.coarse_timesteps, available)
    chosen = adapted_steps(exported.graph, recorded, _settings(run), run.talk, count, coarse)
    shares = stride_shares(chosen, available)
    note = (
        f"{count} of {available} timesteps are measured, more of them where the layers' importance changes fastest "
        "(our choice); each counts for its share of the trajectory"
    )
    return chosen, tuple(float(share) for share in shares), (note,)


STAGE = Stage(
    "measure",
    make,
    inputs,
    reads=("export", "calibrate", "candidates"),
    hint="Lower measure.batch_size and measure.probes, name fewer allocate.schemes, or",
)
