"""The stage candidates: every weight form of every layer, rounded once for all budgets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.rounding.candidate_store import ROW_ORDERS, wanted_schemes
from mpq_deploy.rounding.earlier_forms import EarlierForms
from mpq_deploy.rounding.rounder import Rounder, round_layers
from mpq_deploy.rounding.salient_rows import salient_first
from mpq_deploy.rounding.spread_rounding import round_over_workers
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.system.files import Fields
from mpq_deploy.system.parallel.work import Alone

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


# Raised with every change of what the candidates' files hold.
CANDIDATES_FORMAT = 11
PRODUCTS = "layers.products"
TAKEN = {"schemes", "branches", "rules", "conv_products"}


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    target = run.target
    return {
        "recipe.allocate.schemes": list(run.recipe.allocate.schemes),
        "recipe.allocate.branches": list(run.recipe.allocate.branches),
        "recipe.allocate.ranges": list(run.recipe.allocate.ranges),
        "recipe.measure.samples": run.recipe.measure.samples,
        "candidates.format": CANDIDATES_FORMAT,
        "target.schemes": target.model_dump(mode="json", include=TAKEN),
        PRODUCTS: [n.name for n in run.exported.graph.layers if n.window is not None],
        **settings(run.recipe.quantize, "quantize"),
        **version_of("onnxruntime", "numpy", "torch"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    exported = run.exported
    check_memory(run, STAGE)
    earlier = _earlier(run)
    if isinstance(run.crew, Alone):
        round_layers(run, Rounder.of(run, earlier), folder)
    else:
        round_over_workers(run, folder, earlier)
    orders, how = salient_first(run, folder, earlier)
    numbers = {layer.name: number for number, layer in enumerate(exported.graph.layers)}
    np.savez(folder / ROW_ORDERS, **{str(numbers[name]): order for name, order in orders.items()})  # type: ignore[arg-type]
    return (
        f"{len(wanted_schemes(run.recipe))} schemes, rounding {run.recipe.quantize.rounding}{how}"
    )


def _earlier(run: Run) -> EarlierForms:
    """Return what was rounded for other targets: forms depend on none of what is left aside."""
    lists = (f"recipe.allocate.{name}" for name in ("schemes", "branches", "ranges"))
    aside = {*lists, "target.schemes", PRODUCTS}
    return EarlierForms(
        tuple(
            (folder.relative_to(run.base).as_posix(), frozenset(made_from[PRODUCTS]))
            for folder, made_from in run.others("candidates", STAGE.fields(run), aside)
        )
    )


STAGE = Stage(
    "candidates",
    make,
    inputs,
    reads=("export", "calibrate"),
    hint="Lower quantize.memory_mb and quantize.hessian_width, name fewer allocate.schemes, or",
)
