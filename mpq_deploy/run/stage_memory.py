"""Refuse a stage that there is too little memory for, before it starts; say it when memory runs out after all."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.calls.guidance import rows_per_step
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.rounding.candidate_store import wanted_schemes
from mpq_deploy.system import memory
from mpq_deploy.system.parallel.work import Alone

if TYPE_CHECKING:
    from mpq_deploy.run.memory_model import ModelSize, StageMemory
    from mpq_deploy.run.stage import Stage
    from mpq_deploy.run.view import Run

# Stages whose batch follows memory.
BATCHED = ("calibrate", "evaluate")
MORE = "use a machine with more memory, or set MPQ_DEPLOY_MEMORY to what may be taken if the estimate is wrong."


def check_memory(run: Run, stage: Stage) -> StageMemory:
    """Estimate what ``stage`` takes, in batches that fit; raises UsageError when there is less."""
    estimate = stage_memory(run, stage.name, fitting_batch(run, stage.name))
    fewer = "Give fewer --workers. " if _rounding_workers(run, stage.name) else ""
    estimate.refuse_too_large(
        memory.memory_room(), f"{fewer}{stage.hint} {MORE}", memory.held_memory()
    )
    return estimate


def batch_within_memory(run: Run, stage: str) -> int:
    """Return how many samples ``stage`` takes at once: as the recipe says, or fewer where memory is short."""
    size, batch = _batch_size(run, stage), fitting_batch(run, stage)
    if batch < size:
        run.talk.line(f"  {batch} instead of {size} samples at once: {memory.memory_room()}")
    return batch


def fitting_batch(run: Run, stage: str) -> int:
    """Return the recipe's batch of ``stage``, halved until it fits; one is returned unseen."""
    room, held, batch = memory.memory_room(), memory.held_memory(), _batch_size(run, stage)
    while batch > 1 and room is not None and not stage_memory(run, stage, batch).fits(room, held):
        batch //= 2
    return batch


def _batch_size(run: Run, stage: str) -> int:
    """Return the batch that the recipe sets for ``stage``; 1 where none follows memory."""
    if stage == "evaluate":
        return run.recipe.evaluate.batch_size
    return run.recipe.calibrate.batch_size if stage == "calibrate" else 1


def saying_memory_ran_out(stage: Stage) -> AbstractContextManager[None]:
    """Turn a failed allocation in the block, which makes ``stage``, into MemoryRanOutError."""
    kept = "Finished work is kept: run the command again to continue from there."
    return memory.saying_memory_ran_out(
        f"the stage '{stage.name}'", f"{stage.hint} use a machine with more memory. {kept}"
    )


def stage_memory(run: Run, stage: str, batch: int | None = None) -> StageMemory:
    """Estimate what ``stage`` takes, workers on this machine included; those before it are current.

    ``batch``: samples that the model is given at once, None: as many as the recipe says. With
    guidance each has two rows.
    """
    from mpq_deploy.run.memory_model import estimate_stage

    if stage == "export":
        return _export(run)
    if stage == "engine":
        return _engine(run)
    size, forms = _sizes(run)
    if stage == "measure":
        forms += _rescaled_forms(run)
    rows = None
    if stage in BATCHED:
        # To look at a pipeline's class takes seconds of imports, which other stages are spared.
        rows = (batch or _batch_size(run, stage)) * rows_per_step(run.exported.spec)
    found = estimate_stage(stage, size, run.recipe, forms, _rounding_workers(run, stage), rows)
    if stage in BATCHED and run.exported.spec.pipeline is not None:
        more, code = _other_parts(run)
        found = replace(found, weights=found.weights + more, code=found.code + code)
    return found


# Share of what candidates leave free that more Hessians at once may take (our choice).
FREE_SHARE = 0.5


def hessian_room(run: Run) -> int:
    """Return the bytes that Hessians may take beyond ``quantize.memory_mb``; 0 where none are known free.

    The calls behind Hessians run once per group that fits memory: 37 times for Stable Diffusion 1.5
    within the default limit. Workers' shares are not counted, so with them there is none.
    """
    room = memory.memory_room()
    if room is None or not isinstance(run.crew, Alone):
        return 0
    needed = max(stage_memory(run, "candidates").total - memory.held_memory(), 0)
    return max(int(FREE_SHARE * (room.bytes - needed)), 0)


def _other_parts(run: Run) -> tuple[int, int]:
    """Return what a pipeline holds beside its denoiser: weights, in float32, and the libraries that run them."""
    from mpq_deploy.models.additions import LEFT_OUT
    from mpq_deploy.run.memory_model import EXPORT_BYTES, source_size

    spec, folder = run.exported.spec.pipeline, run.exported.model.pipeline
    if spec is None or folder is None:
        return 0, 0
    others = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    for name in (spec.component, *LEFT_OUT):
        others.pop(name, None)
    return sum(source_size(_weight_files(part))[0] for part in others.values()), EXPORT_BYTES


def _rounding_workers(run: Run, stage: str) -> int:
    """Return how many processes of this machine round layers in ``stage``, beside this one; 0: this one does."""
    from mpq_deploy.system.parallel.processes import Processes

    return run.crew.workers if stage == "candidates" and isinstance(run.crew, Processes) else 0


def rounding_worker_bytes(run: Run) -> int:
    """Estimate what a worker of the stage candidates holds, beside what every worker does (``PROCESS_BYTES``)."""
    from mpq_deploy.run.memory_model import candidates_worker_bytes
    from mpq_deploy.system.parallel.processes import PROCESS_BYTES

    size, forms = _sizes(run)
    return max(0, candidates_worker_bytes(size, run.recipe, forms) - PROCESS_BYTES)


def salience_worker_bytes(run: Run) -> int:
    """Estimate what a worker holds that orders salient channels, beside what every worker does."""
    from mpq_deploy.run.memory_model import salience_worker_bytes as worker_bytes

    return worker_bytes(_sizes(run)[0])


def _sizes(run: Run) -> tuple[ModelSize, int]:
    """Return the size of the exported model, and the weight forms per layer, at most."""
    recipe = run.recipe
    named = recipe.allocate.schemes
    forms = {
        s.weight_form
        for s in SCHEMES.values()
        if not s.branch and (s.name in named or s.family in named)
    }
    return run.exported.size, len(forms)


def _rescaled_forms(run: Run) -> int:
    """Return the weight forms of each layer for rescaled inputs: measured together, rounded some at a time."""
    wanted = wanted_schemes(run.recipe)
    return len({s.weight_form for s in wanted if s.branch.rescales and not s.range.moves})


def _export(run: Run) -> StageMemory:
    from mpq_deploy.models.additions import DENOISERS, place_of
    from mpq_deploy.models.locate import SINGLE_FILE, locate
    from mpq_deploy.models.open import source_denoiser
    from mpq_deploy.run.memory_model import estimate_onnx_export, estimate_torch_export, source_size
    from mpq_deploy.system.progress import Talk

    recipe = run.recipe
    path = locate(recipe.model)
    if path.suffix == SINGLE_FILE:
        return estimate_torch_export(*source_size([path]))
    if path.is_file():
        # Its weights stay on the disk, and what it warns of is said when it is opened for good.
        return estimate_onnx_export(path, source_denoiser(recipe, Talk()).spec.input_shapes())
    parts = (place_of(recipe.component)[0],) if recipe.component else DENOISERS
    part = next((path / name for name in parts if (path / name).is_dir()), path)
    return estimate_torch_export(*source_size(_weight_files(part)))


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of one variant: the plain one where there is one."""
    from mpq_deploy.models.weight_files import STEMS, find_weights, weight_paths

    for stem in STEMS:
        if any(folder.glob(f"{stem}*.safetensors")):
            files = weight_paths(folder, stem, find_weights(folder, stem))
            return [file for file in files if file.is_file()]
    return []


def _engine(run: Run) -> StageMemory:
    import onnx

    from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED
    from mpq_deploy.run.memory_model import estimate_engine

    plan = run.plan
    model = onnx.load(run.deployed / DEPLOYED, load_external_data=False)
    return estimate_engine(plan.size_bytes, len(model.graph.node))
