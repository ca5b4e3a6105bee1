"""What the stages know of a target's speed: costs per layer and scheme at the deployed batch, and a plan's totals."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.engine.target import Target, load_target
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.formats.scheme import FP16, SCHEMES, Scheme
from mpq_deploy.graph.attention import projections
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.latency.costs import LatencyCosts, PlanLatency
from mpq_deploy.latency.joins import Joins
from mpq_deploy.latency.latency_table import LatencyTable
from mpq_deploy.latency.others import activations_of, weighed_nodes
from mpq_deploy.latency.roofline import LAUNCH_SECONDS, Rates
from mpq_deploy.rounding.control_schemes import CONTROLS, INT8_RULE, control_plans, control_scheme
from mpq_deploy.run.view import Exported
from mpq_deploy.system.files import Fields, canonical_json

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.view import Run

FIGURES = {"title", "figures_of", "bandwidth_bytes_per_s", "int8_ops_per_s", "fp16_ops_per_s"}
FIGURES |= {"fp8_ops_per_s", "fp4_ops_per_s"}
# The engine is made after the plan: it makes no plan out of date, and counts in the next.
SHOWN = "engine.products"


def latency_inputs(recipe: Recipe) -> Fields:
    """Return what latencies depend on beside the graph: figures, batch, table."""
    table = read_table(recipe)
    return {
        "target.figures": load_target(recipe.target).model_dump(mode="json", include=FIGURES),
        "recipe.engine.batch_opt": recipe.engine.batch_opt,
        "latency_table": table.digest_fields() if table else None,
        "latency.launch_seconds": LAUNCH_SECONDS,
    }


def shown_products(run: Run) -> str | None:
    """Return what an engine of this run shows of its kernels, as text; None without one."""
    shown = run.shown_products
    return canonical_json(asdict(shown)) if shown else None


def read_table(recipe: Recipe) -> LatencyTable | None:
    """Read the recipe's latency table, if it has one. Raises UsageError when it is none, or of another target."""
    path = recipe.allocate.latency_table
    if path is None:
        return None
    table = LatencyTable.load(Path(path))
    table.require(load_target(recipe.target).name, recipe.engine.batch_opt)
    return table


def needs_latency(recipe: Recipe) -> bool:
    """Whether there is no plan where nothing is known of latency: balanced does without it."""
    return recipe.allocate.max_latency is not None or recipe.allocate.objective == "latency"


def check_latency(recipe: Recipe, target: Target) -> None:
    """Find mistakes about latency that need no run folder."""
    section = recipe.allocate
    if section.max_loss is not None and section.objective != "latency":
        raise UsageError(
            "allocate.max_loss is for allocate.objective: latency.",
            "The default, balanced, takes allocate.slack.",
        )
    table = read_table(recipe)
    if needs_latency(recipe) and (target.simulated or (table is None and Rates.of(target) is None)):
        raise UsageError(
            f"The speed of the target {target.name} is unknown: it has no figures to estimate latency from.",
            "Choose a target of one device, give the figures in a YAML that extends it, or give --latency-table.",
        )


def call_shapes(run: Run, exported: Exported) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all that counts at the engine's usual batch, by tensor.

    Raises ModelError where a shape does not follow the batch.
    """
    from mpq_deploy.calibrate.activation_shapes import activation_shapes

    graph, batch = exported.graph, run.recipe.engine.batch_opt
    uses = [
        name for layer in graph.layers for use in layer.uses for name in (use.input, use.output)
    ]
    others = [name for node in weighed_nodes(graph) for name in activations_of(node)]
    names = tuple(dict.fromkeys([*uses, *others]))
    recorded = run.calibration.inputs
    calls = RecordedCalls(recorded, exported.spec)
    found = activation_shapes(graph, calls, run.talk, run.scratch(), names)
    return {
        name: tuple(
            size * batch if axis == one.batch_axis else size for axis, size in enumerate(one.shape)
        )
        for name, one in found.items()
    }


def latency_costs(run: Run, exported: Exported) -> tuple[LatencyCosts | None, str]:
    """Return the costs on the recipe's target, or None and why nothing can be said.

    Raises ModelError for a graph without clear shapes where the plan depends on latency.
    """
    recipe = run.recipe
    target, table = load_target(recipe.target), read_table(recipe)
    if target.simulated or (table is None and Rates.of(target) is None):
        return None, ""
    try:
        shapes = call_shapes(run, exported)
    except ModelError as error:
        if needs_latency(recipe):
            raise
        return None, f"latency is not estimated: {error.message}"
    groups = projections(exported.graph) if recipe.allocate.tie_qkv else ()
    joins = Joins(exported.graph, groups, run.shown_products)
    return LatencyCosts(exported.graph, shapes, target, recipe.engine.batch_opt, table, joins), ""


def plan_latency_info(
    costs: LatencyCosts,
    exported: Exported,
    schemes: Mapping[str, str],
    int8: Mapping[str, Scheme],
    ours_ns: int,
    recipe: Recipe,
) -> PlanLatency:
    """Describe the latency of a plan (layer -> scheme name), of which the solver counted ``ours_ns``.

    ``int8``: the scheme of each layer where everything is in INT8.
    """
    layers, target = exported.graph.layers, load_target(recipe.target)
    limit = recipe.allocate.max_latency
    static = {layer.name: control_scheme(layer, INT8_RULE[:1], target) for layer in layers}
    slower = costs.slower_in_int8(layers, static)
    fp16_ns = costs.plan_ns(layers, {layer.name: FP16 for layer in layers})
    int8_ns = costs.plan_ns(layers, {**static, **int8})
    # Counted before everything INT4 is added up: the solver may not have looked at those entries.
    measured, estimated = len(costs.measured), len(costs.estimated)
    source, basis = costs.source(), costs.basis()
    times = _control_times(costs, exported.graph, target)
    return PlanLatency(
        ours_ms=ours_ns / 1e6,
        fp16_ms=fp16_ns / 1e6,
        int8_ms=int8_ns / 1e6,
        others_ms=costs.others_ns / 1e6,
        batch=costs.batch,
        source=source,
        basis=basis,
        measured=measured,
        estimated=estimated,
        slower_in_int8=slower,
        taken=tuple(n for n in slower if SCHEMES[schemes[n]].activation == int8[n].activation),
        objective=recipe.allocate.objective,
        limit_ms=None if limit is None else limit.nanoseconds / 1e6,
        int4_ms=times.pop("int4", None),
        controls_ms=times,
        fusion=costs.joins.basis({layer.name: SCHEMES[schemes[layer.name]] for layer in layers}),
    )


def _control_times(costs: LatencyCosts, graph: LayerGraph, target: Target) -> dict[str, float]:
    """Return the milliseconds of the controls beside INT8, by name, as far as they are known."""
    times = {}
    for name, plan in control_plans(graph, target).items():
        # A table may lack a layer, for a target without figures.
        with suppress(UsageError):
            if CONTROLS[name].products != INT8_RULE:
                times[name] = costs.plan_ns(graph.layers, plan) / 1e6
    return times
