"""The stage candidates: every weight form of every layer, rounded once for all budgets."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.rounding.candidate_store import ROW_ORDERS, wanted_schemes
from mpq_deploy.rounding.earlier_forms import EarlierForms
from mpq_deploy.rounding.rounder import Rounder, round_layers
from mpq_deploy.rounding.salient_rows import salient_first
from mpq_deploy.rounding.spread_rounding import round_over_workers
from mpq_deploy.run.folder import alike, begin_target
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import check_memory, hessian_room
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.files import Fields
from mpq_deploy.system.parallel.work import Alone

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


# Raised with every change of what the candidates' files hold.
CANDIDATES_FORMAT = 14
PRODUCTS = "layers.products"
TAKEN = {"schemes", "branches", "rules", "conv_products"}
# Of the stage's inputs those that no rounded form depends on.
LISTS = {f"recipe.allocate.{name}" for name in ("schemes", "branches", "ranges")}
ASIDE = LISTS | {"target.schemes", PRODUCTS}


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
    check_memory(run, STAGE)
    with ExitStack() as stack:
        making = [(run, folder, _earlier(run))]
        for later in run.later():
            fields = STAGE.fields(later)
            current = later.folder.changed_fields(STAGE.name, fields) == []
            if current or not alike(fields, STAGE.fields(run), ASIDE):
                continue
            check_memory(later, STAGE)
            begin_target(later.path, later.recipe.stored())
            place = later.folder.writing(STAGE.name, fields, str(computing_on()))
            known = _earlier(later, *((own, where) for own, where, _ in making))
            making.append((later, stack.enter_context(place), known))
        if isinstance(run.crew, Alone):
            every = [(Rounder.of(own, known), place) for own, place, known in making]
            round_layers(run, every, hessian_room(run))
        else:
            round_over_workers(run, folder, making[0][2])
        notes = [_ordered(*one) for one in making]
    return notes[0] + "".join(
        f"; for {one.target.name}: {said}" for (one, *_), said in zip(making[1:], notes[1:])
    )


def _ordered(run: Run, folder: Path, earlier: EarlierForms) -> str:
    """Add to rounded layers in ``folder`` which of their channels are promoted first; return what was made."""
    orders, how = salient_first(run, folder, earlier)
    numbers = {layer.name: number for number, layer in enumerate(run.exported.graph.layers)}
    np.savez(folder / ROW_ORDERS, **{str(numbers[name]): order for name, order in orders.items()})  # type: ignore[arg-type]
    return (
        f"{len(wanted_schemes(run.recipe))} schemes, rounding {run.recipe.quantize.rounding}{how}"
    )


def _earlier(run: Run, *making: tuple[Run, Path]) -> EarlierForms:
    """Return what was rounded for other targets, and is being in the folders of ``making``."""
    found = [
        *(
            (f, made_from[PRODUCTS])
            for f, made_from in run.others(STAGE.name, STAGE.fields(run), ASIDE)
        ),
        *((folder, STAGE.fields(other)[PRODUCTS]) for other, folder in making),
    ]
    return EarlierForms(
        tuple((f.relative_to(run.root).as_posix(), frozenset(names)) for f, names in found)
    )


STAGE = Stage(
    "candidates",
    make,
    inputs,
    reads=("export", "calibrate"),
    hint="Lower quantize.memory_mb and quantize.hessian_width, name fewer allocate.schemes, or",
)
