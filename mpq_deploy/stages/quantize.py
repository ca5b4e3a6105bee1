"""The stage quantize: the graphs of the plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.check.check import check_dialect
from mpq_deploy.errors import MpqError
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED
from mpq_deploy.graph.writers.plan_graphs import write_plan, write_plan_slots
from mpq_deploy.run.stage import Stage, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.system.files import Fields, canonical_json

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


SLOTS_FORMAT = 2


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    versions = version_of("onnx", "onnx-ir", "numpy")
    return {"dialect": run.target.dialect, **slot_fields(run), **versions}


def slot_fields(run: Run) -> Fields:
    """Return the setting of slots for LoRAs, where there are any, with their form's number."""
    rank = run.recipe.lora_slots
    return {"recipe.lora_slots": [SLOTS_FORMAT, rank]} if rank else {}


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    plan = run.plan
    check_memory(run, STAGE)
    check_deployed(run, folder, write_plan(run, plan.schemes, folder))
    return f"{plan.size_bytes:,} bytes of constants, as planned"


def check_deployed(run: Run, folder: Path, written: int) -> None:
    """Check the deployed graph in ``folder``, and record its ``written`` bytes of constants.

    Where the recipe has slots for LoRAs, the graphs with them are written beside it.

    Raises MpqError where they are not those of the plan.
    """
    if written != run.plan.size_bytes:
        raise MpqError(
            f"The deployed file holds {written:,} bytes of constants, the plan says {run.plan.size_bytes:,}.",
            "This is a bug: please report it with the model's structure.",
        )
    check_dialect(run, folder / DEPLOYED)
    if run.recipe.lora_slots:
        check_dialect(run, write_plan_slots(run, folder))
    (folder / "size.json").write_text(canonical_json({"size_bytes": written}), encoding="utf-8")


STAGE = Stage(
    "quantize",
    make,
    inputs,
    reads=("export", "calibrate", "candidates", "allocate"),
    computes=False,
)
