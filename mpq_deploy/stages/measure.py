"""The stage measure: the loss of every (layer, scheme)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.calls.timesteps import sampled_steps, stride_shares
from mpq_deploy.graph.attention import separate_operands
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import MeasureSettings
from mpq_deploy.rounding.candidate_store import candidates_of
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.run.view import RECIPE, Run
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
    # Settings of orm change no other method.
    orm = fields.pop("recipe.measure.orm")
    if adaptive or METHODS[section.method].weighs_bits:
        fields.update({f"recipe.measure.orm.{key}": value for key, value in orm.items()})
    return {**fields, **version_of("torch", "onnxruntime", "numpy", "highspy")}


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    check_memory(run, STAGE)
    section = run.recipe.measure
    subject, notes = stage_subject(run)
    table = measure(section.method, subject)
    if _held_out(run) is run.calibration.inputs and section.method not in ORM_CONTROLS:
        optimistic = "losses are measured on the samples that the weights were rounded on"
        notes = (*notes, f"{optimistic}, so they are optimistic")
    replace(table, notes=(*table.notes, *notes)).save(folder)
    for control in ORM_CONTROLS if section.method == "orm" else ():
        (folder / control).mkdir()
        measure(control, subject).save(folder / control)
    run.remove_shards("measure")
    return f"{table.metric}, {sum(map(len, table.losses.values()))} layer-scheme pairs"


def stage_subject(run: Run) -> tuple[Subject, tuple[str, ...]]:
    """Return what the recipe measures, spread over workers, and notes on the timesteps."""
    steps, shares, notes = _measured_steps(run)
    chosen = tuple(int(step) for step in steps)
    subject = measured_subject(chosen, run)
    return replace(subject, spread=_spread(run, chosen), shares=shares), notes


def measured_subject(chosen: tuple[int, ...], run: Run) -> Subject:
    """Return the run's candidates at positions ``chosen`` of the calibrated timesteps."""
    exported = run.exported
    calls = _held_out(run).at(np.array(chosen)), exported.spec
    of = (exported.graph, candidates_of(run, exported.graph), run.calibration.stats)
    attention = run.recipe.allocate.attention != "fp16"
    attentions = separate_operands(exported.graph.model) if attention else ()
    return Subject(*of, *calls, _settings(run), run.talk, rotate=True, attentions=attentions)


def _held_out(run: Run) -> CallSet:
    """Return the recorded calls to measure on."""
    return run.calibration.inputs.split(run.recipe.measure.samples)[1]


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


def _measured_steps(run: Run) -> tuple[Array, tuple[float, ...] | None, tuple[str, ...]]:
    """Choose calibrated timesteps to measure; return them, their shares, and notes on them."""
    section, calls = run.recipe.measure, _held_out(run)
    available = len(calls.timesteps)
    count = min(section.timesteps, available)
    if section.sampling == "uniform" or count == available:
        fewer = f"all {available} calibrated timesteps are measured: measure.timesteps asks for {section.timesteps}"
        notes = (fewer,) if section.timesteps > available else ()
        return sampled_steps(available, count), None, notes
    exported = run.exported
    recorded = RecordedCalls(calls, exported.spec)
    coarse = min(section.coarse_timesteps, available)
    chosen = adapted_steps(exported.graph, recorded, _settings(run), run.talk, count, coarse)
    shares = stride_shares(chosen, available)
    note = (
        f"{count} of {available} timesteps are measured, more of them where the layers' importance "
        "changes fastest (our choice); each counts for its share of the trajectory"
    )
    return chosen, tuple(float(share) for share in shares), (note,)


STAGE = Stage(
    "measure",
    make,
    inputs,
    reads=("export", "calibrate", "candidates"),
    hint="Lower measure.batch_size and measure.probes, name fewer allocate.schemes, or",
)
