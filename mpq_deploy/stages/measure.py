"""The stage measure: the loss of every (layer, scheme)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.calls.timesteps import sampled_steps, stride_shares
from mpq_deploy.graph.attention import separate_operands
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import MeasureSettings
from mpq_deploy.rounding.candidate_store import StoredCandidates, candidates_of
from mpq_deploy.run.folder import RECIPE, RunFolder, alike
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.chosen_method import OUTPUTS
from mpq_deploy.sensitivity.earlier_pairs import (
    Candidates,
    Names,
    Part,
    joined,
    known_pairs,
    same_schemes,
    unknown_pairs,
)
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.methods import METHODS, ORM_CONTROLS
from mpq_deploy.sensitivity.orm import adapted_steps
from mpq_deploy.sensitivity.subject import Sampling, Spread, Subject
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.files import Fields, canonical_json
from mpq_deploy.system.progress import Talk

# Raised with every change of what the table of a metric of final images holds.
IMAGES_FORMAT = 2
# Of the table of a metric of single outputs.
OUTPUTS_FORMAT = 2


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    section, chosen = run.recipe.measure, run.method
    fields = settings(section, "measure")
    # What auto stands for counts as if it had been named.
    own = section.replace(method=chosen.name)
    fields |= {
        "recipe.measure.method": chosen.name,
        "recipe.measure.calls": chosen.calls,
        "recipe.measure.probes": own.directions,
    }
    adaptive = section.sampling == "adaptive"
    if not adaptive:
        del fields["recipe.measure.coarse_timesteps"]
    if METHODS[chosen.name].images:
        fields["images.format"] = IMAGES_FORMAT
    elif chosen.name == OUTPUTS:
        fields["outputs.format"] = OUTPUTS_FORMAT
    # Settings of orm change no other method.
    orm = fields.pop("recipe.measure.orm")
    if adaptive or METHODS[chosen.name].weighs_bits:
        fields.update({f"recipe.measure.orm.{key}": value for key, value in orm.items()})
    return {**fields, **version_of("torch", "onnxruntime", "numpy", "highspy")}


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    check_memory(run, STAGE)
    chosen = run.method
    subject, notes = stage_subject(run)
    table = _measured(run, subject)
    own = chosen.name in ORM_CONTROLS or METHODS[table.metric].images
    if _held_out(run) is run.calibration.inputs and not own:
        optimistic = "losses are measured on the samples that the weights were rounded on"
        notes = (*notes, f"{optimistic}, so they are optimistic")
    replace(table, notes=tuple(dict.fromkeys((*table.notes, *notes)))).save(folder)
    for control in ORM_CONTROLS if chosen.name == "orm" else ():
        (folder / control).mkdir()
        measure(control, subject).save(folder / control)
    run.remove_shards("measure")
    why = f" ({chosen.reason})" if chosen.reason and table.metric == chosen.name else ""
    return f"{table.metric}{why}, {sum(map(len, table.losses.values()))} layer-scheme pairs"


def _measured(run: Run, subject: Subject) -> SensitivityTable:
    """Measure, but for what was measured by probes for another target of the same run."""
    method, every = run.method.name, candidates_of(run, run.exported.graph)
    if method != "probe" or subject.shares is not None:
        return measure(method, subject)
    known, later = known_pairs(every, _tables(run)), _later(run, every)
    if known is None:
        return measure(method, replace(subject, later=later))
    left = unknown_pairs(every, known.losses)
    if not left and all(one.name in known.losses for one in subject.attentions):
        return joined(known, None, every, subject.attentions)
    table = measure(method, replace(_left_of(subject, run, every, left), later=later))
    if table.metric != method:
        return measure(method, subject)
    return joined(known, table, every, subject.attentions)


def _later(run: Run, mine: Candidates) -> tuple[Subject, ...]:
    """Return what targets after this one have left to measure then: the same passes serve them."""
    found, tables, measured = list[Subject](), _tables(run), [mine]
    for other in run.later():
        if other.folder.record("candidates") is None:
            continue
        fields = STAGE.fields(other)
        current = other.folder.changed_fields(STAGE.name, fields) == []
        if current or not alike(fields, STAGE.fields(run), {"candidates"}):
            continue
        graph = other.exported.graph
        every = StoredCandidates.of(other.stage("candidates"), graph, limit=0)
        known = known_pairs(every, tables)
        names = {
            layer: {s for one in measured for s in same_schemes(own, one[layer])}.union(
                known.losses.get(layer, ()) if known else ()
            )
            for layer, own in every.items()
        }
        left = unknown_pairs(every, names)
        if left:
            found.append(_left_of(stage_subject(other)[0], other, every, left))
        measured.append(every)
    return tuple(found)


def kept_parts(run: Run) -> int:
    """Return the timesteps, or trajectories, that an interrupted call or another target's passes have left."""
    fields = json.loads(canonical_json(STAGE.fields(run)))
    keys = run.shard_cache(STAGE.name).keys()
    kept = [key for key in keys if fields.items() <= key.items()]
    ends = [key["trajectories"] for key in kept if key.get("part") == "trajectories"]
    steps = sum(1 for key in kept if key.get("part") == "probes")
    return steps + sum(int(end) - int(start) for start, end in ends)


def _left_of(subject: Subject, run: Run, every: Candidates, left: Names) -> Subject:
    """Return ``subject`` with what is ``left`` of its candidates; attentions are measured beside whatever it is."""
    chosen = tuple(int(step) for step in _measured_steps(run)[0])
    return replace(subject, candidates=Part(every, left), spread=_spread(run, chosen, left))


def _tables(run: Run) -> list[tuple[SensitivityTable, Candidates]]:
    """Return what was measured for other targets, with the candidates behind it."""
    found: list[tuple[SensitivityTable, Candidates]] = []
    for folder, made_from in run.others("measure", STAGE.fields(run), {"candidates"}):
        record = RunFolder(folder.parent).record("candidates")
        if record is not None and record.digest == made_from["candidates"]:
            of = StoredCandidates.of(folder.parent / "candidates", run.exported.graph, limit=0)
            found.append((SensitivityTable.load(folder), of))
    return found


def stage_subject(run: Run) -> tuple[Subject, tuple[str, ...]]:
    """Return what the recipe measures, spread over workers, and notes on the timesteps."""
    steps, shares, notes = _measured_steps(run)
    chosen = tuple(int(step) for step in steps)
    subject = measured_subject(chosen, run)
    return replace(subject, spread=_spread(run, chosen), shares=shares), notes


def measured_subject(
    chosen: tuple[int, ...],
    run: Run,
    left: Names | None = None,
    section: MeasureSettings | None = None,
) -> Subject:
    """Return the run's candidates at positions ``chosen`` of the calibrated timesteps.

    ``left``: the pairs to measure, None: all of them; ``section``: the settings, None: the run's.
    """
    exported = run.exported
    calls = _held_out(run).at(np.array(chosen)), exported.spec
    every: Candidates = candidates_of(run, exported.graph)
    every = every if left is None else Part(every, left)
    of = (exported.graph, every, run.calibration.stats)
    attention = run.recipe.allocate.attention != "fp16"
    attentions = separate_operands(exported.graph.model) if attention else ()
    section = section or _settings(run)
    subject = Subject(*of, *calls, section, run.talk, rotate=True, attentions=attentions)
    return replace(subject, sampling=sampling_of(run, METHODS[section.method].images))


def sampling_of(run: Run, trajectories: bool = True) -> Sampling:
    """Return how the run's model is sampled; ``trajectories``: with what only these need."""
    recipe = run.recipe
    steps, kind = recipe.calibrate.steps, recipe.evaluate.sampler
    alone = not run.is_part
    pipeline = run.exported.model.pipeline if trajectories and alone else None
    return Sampling(run.exported.conditions, steps, kind, pipeline, alone)


def _held_out(run: Run) -> CallSet:
    """Return the recorded calls to measure on."""
    return run.calibration.inputs.split(run.recipe.measure.samples)[1]


def _spread(run: Run, chosen: tuple[int, ...], left: Names | None = None) -> Spread:
    # A worker may have another folder, which does not show who shares the measurement.
    opener = partial(_opened_subject, chosen, left, _settings(run))
    opened, root, files = run.for_workers(opener, RECIPE, "export", "calibrate", "candidates")
    key = {**STAGE.fields(run), **({} if left is None else {"left": left})}
    return Spread(run.crew, root, files, opened, run.shard_cache("measure"), key)


def _opened_subject(
    chosen: tuple[int, ...], left: Names | None, section: MeasureSettings, root: Path, talk: Talk
) -> Subject:
    return measured_subject(chosen, Run.opened(root, talk), left, section)


def _settings(run: Run) -> MeasureSettings:
    """Return the run's settings with the metric's calls, no more than there are samples."""
    section, chosen = run.recipe.measure, run.method
    return section.replace(method=chosen.name, calls=min(chosen.calls, section.samples))


def _measured_steps(run: Run) -> tuple[Array, tuple[float, ...] | None, tuple[str, ...]]:
    """Choose calibrated timesteps to measure; return them, their shares, and notes on them."""
    section, calls = run.recipe.measure, _held_out(run)
    available = len(calls.timesteps)
    count = min(section.timesteps, available)
    # Trajectories go through all steps.
    if section.sampling == "uniform" or count == available or METHODS[run.method.name].images:
        fewer = f"all {available} calibrated timesteps are measured: measure.timesteps asks for {section.timesteps}"
        notes = (fewer,) if section.timesteps > available else ()
        return sampled_steps(available, count), None, notes
    exported = run.exported
    spec = exported.spec
    if spec.sizes:
        size = calls.largest(spec)
        calls, spec = calls.at_size(spec, size), spec.at_size(size)
    recorded = RecordedCalls(calls, spec)
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
