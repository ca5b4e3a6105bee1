"""Refuse a stage that this machine has too little memory for, before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.precision.scheme import SCHEMES

if TYPE_CHECKING:
    from mpq_deploy.memory import StageMemory
    from mpq_deploy.pipeline import Pipeline

HINTS = {
    "calibrate": "Lower calibrate.batch_size, or use a machine with more memory.",
    "candidates": "Lower quantize.memory_mb and quantize.hessian_width, name fewer allocate.schemes, or use a machine "
    "with more memory.",
    "measure": "Lower measure.batch_size and measure.probes, name fewer allocate.schemes, or use a machine with more "
    "memory.",
    "quantize": "Use a machine with more memory.",
}


def check_memory(pipeline: Pipeline, stage: str, graph: LayerGraph) -> StageMemory:
    """Estimate what ``stage`` takes; raises UsageError when this machine has less."""
    from mpq_deploy.memory import available_memory, estimate_stage, model_size, refuse_too_large

    recipe = pipeline.recipe
    named = recipe.allocate.schemes
    forms = {s.weight_form for s in SCHEMES.values() if not s.branch and (s.name in named or s.family in named)}
    estimate = estimate_stage(stage, model_size(graph), recipe, len(forms))
    refuse_too_large(estimate, available_memory(), HINTS[stage])
    return estimate
