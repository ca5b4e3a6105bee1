"""The engine of a run's plan: batch sizes, what it must hold, and whether it fits the target."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mpq_deploy.engine.builder import BatchProfile
from mpq_deploy.engine.engine_memory import MemoryEstimate, estimate_memory, refuse_too_large
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import Target
from mpq_deploy.formats.fp8 import FP8_SCHEME
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.attention import separate_operands
from mpq_deploy.graph.save import constant_bytes, repeated_bytes, widened_bytes
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


def batch_profile(run: Run) -> BatchProfile:
    """Return the batch sizes of the recipe, and the shapes of the inputs that have a batch axis.

    Of several sizes the engine is tuned for the first, and covers all heights and widths between.
    """
    section = run.recipe.engine
    inputs = [item for item in run.exported.spec.inputs if item.batched]
    sized = [item for item in inputs if item.sizes]
    return BatchProfile(
        *(section.batch_min, section.batch_opt, section.batch_max),
        {item.name: item.shape for item in inputs},
        {item.name: tuple(map(min, zip(*item.sizes))) for item in sized},
        {item.name: item.sizes[0] for item in sized},
    )


def expected_layers(run: Run) -> ExpectedLayers:
    """Return what the plan's engine must hold."""
    schemes = {name: SCHEMES[scheme] for name, scheme in run.plan.schemes.items()}
    graph, size = run.built, run.plan.size_bytes
    apart = repeated_bytes(graph), widened_bytes(graph)
    if run.recipe.lora_slots:
        # Factors that slots undo.
        size += constant_bytes(graph) - constant_bytes(run.deployed / DEPLOYED)
    expected = ExpectedLayers.of(run.exported.graph.layers, schemes, size, *apart)
    fp8 = (
        node
        for one in separate_operands(run.exported.graph.model)
        for node in (one.scores, one.name)
        if run.plan.schemes.get(one.name) == FP8_SCHEME
    )
    return replace(expected, fp8_attention=tuple(fp8), slots=bool(run.recipe.lora_slots))


def check_target_memory(run: Run, target: Target) -> MemoryEstimate:
    """Estimate what the engine takes; raises UsageError when that is more than the target has."""
    batch = run.recipe.engine.batch_max
    shapes = run.exported.spec.input_shapes(batch)
    estimate = estimate_memory(run.built, shapes, run.plan.size_bytes)
    refuse_too_large(estimate, target, batch)
    return estimate
