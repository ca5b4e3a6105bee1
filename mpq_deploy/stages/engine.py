"""The stage engine: built in a child process and verified from its log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.engine.builder import BuildRequest, build_engine
from mpq_deploy.engine.failure import BuilderKilledError
from mpq_deploy.engine.plan_engine import batch_profile, check_target_memory, expected_layers
from mpq_deploy.engine.target import RTX, Target, builder_present
from mpq_deploy.errors import EngineError
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.system.files import Fields, canonical_json

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


SIMULATED_PLAN = (
    "the plan is simulated: no engine can hold its schemes, ONNX Runtime runs the graph"
)


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    target = run.target
    return {
        "quantize": run.digest(run.deployed_stage),
        "target": target.model_dump(mode="json"),
        **settings(run.recipe.engine, "engine"),
        **version_of("tensorrt-rtx", "tensorrt"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    target = run.target
    reason = SIMULATED_PLAN if run.plan.simulated else _no_engine_reason(run, target)
    if reason:
        (folder / "none.json").write_text(canonical_json({"reason": reason}), encoding="utf-8")
        return f"none: {reason}"
    check_target_memory(run, target)
    check_memory(run, STAGE)
    request = BuildRequest(run.built, target.build_target, batch_profile(run))
    try:
        record = build_engine(
            request, folder, expected_layers(run), run.talk, run.path / "engine.log"
        )
    except BuilderKilledError as error:
        raise EngineError(
            f"The stage 'engine' was interrupted. {error.message}", error.hint
        ) from error
    record.require_verified()
    return f"{record.backend} {record.version}, {record.weights_bytes or 0:,} bytes of weights, verified"


def _no_engine_reason(run: Run, target: Target) -> str:
    if not run.recipe.engine.build:
        return "the recipe says engine.build: false"
    if target.builder == "none":
        return f"the target {target.name} has no engine: ONNX Runtime runs the graph"
    if target.builder != RTX and not builder_present(target):
        # No name of the run here: what a stage writes is the same wherever it lies.
        return f"an engine for {target.name} is built on the device, from what 'mpq-deploy package' makes"
    return ""


STAGE = Stage(
    "engine",
    make,
    inputs,
    after=("export", "allocate", "quantize", "recover"),
    computes=False,
    hint="Lower the budget, set engine.build: false and build on the device ('mpq-deploy package'), or",
)
