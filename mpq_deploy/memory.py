"""What a stage will take of memory, before it starts, and whether the machine has it.

In: the layers of an exported model and the recipe. Out: a ``StageMemory``. What is counted follows from how the stages
work: weights are mapped from their file and count once; values of one call, Hessians, stacks of candidates and the work
on one layer are held beside them. The constants were fitted to peaks of resident memory (docs/results/scale.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mpq_deploy.errors import UsageError
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.recover.estimate import available_memory
from mpq_deploy.runtime.ort import LARGE_WEIGHTS_BYTES

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.recipe import Recipe

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on. Bytes are of float32, values those of one call; shapes that are not declared count 0.

    ``weights``: bytes of all constants; ``largest``: elements of the largest layer's weight; ``values``: bytes of all
    values; ``alive``: most bytes of them that live at once; ``outputs``: bytes of the layers' outputs.
    """

    weights: int
    largest: int
    values: int
    alive: int
    outputs: int


def model_size(graph: LayerGraph) -> ModelSize:
    """Add up the constants and declared values of ``graph``."""
    model = graph.model.graph
    weights = sum(v.const_value.nbytes for v in model.initializers.values() if v.const_value is not None)
    sizes = {value.name or "": _bytes(value) for node in model for value in node.outputs}
    last = {value.name: number for number, node in enumerate(model) for value in node.inputs if value is not None}
    alive = most = 0
    ends: dict[int, int] = {}
    for number, node in enumerate(model):
        made = sum(sizes[value.name or ""] for value in node.outputs)
        alive += made
        most = max(most, alive)
        for value in node.outputs:
            end = last.get(value.name, number)
            ends[end] = ends.get(end, 0) + sizes[value.name or ""]
        alive -= ends.pop(number, 0)
    uses = [use for layer in graph.layers for use in layer.uses]
    return ModelSize(
        weights,
        max((layer.weights for layer in graph.layers), default=0),
        sum(sizes.values()),
        most,
        sum(sizes.get(use.output, 0) for use in uses),
    )


def _bytes(value: ir.Value) -> int:
    """Return the bytes of ``value`` for one call; axes that are not declared count 1.

    Exporters leave the keys' axis of an attention open, so long attention is underestimated: a stage that would fit is
    not refused.
    """
    if value.shape is None:
        return 0
    return FLOAT32_BYTES * prod(size if isinstance(size, int) else 1 for size in value.shape)


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage holds at its peak: of ``weights``, of ``values`` of its calls, and of its ``work``."""

    stage: str
    weights: int
    values: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.values + self.work


# The interpreter with NumPy, ONNX and ONNX Runtime; with torch.
BARE_BYTES, TORCH_BYTES = 200 << 20, 400 << 20
# ONNX Runtime's copies of the weights, in the layouts of its kernels, beside the mapped ones; large models have none.
SESSION_COPIES = 1.5
# Its arena grows by steps, so it holds more than lives at once.
ARENA_SHARE = 1.5
# Arrays of a layer's size that rounding it holds, beside those of each form; and that stacking its errors holds.
ROUNDING_ARRAYS, FORM_ARRAYS, STACK_ARRAYS = 3, 1, 2
# Of all values of a pass, what autograd holds (many are views of others).
VALUE_SHARE = 0.6
# Where stacks would take so many times their bound, none are kept (``sensitivity.probe``).
HELD_SHARE = 4
# Calls at once behind the Hessians; what the probes bound values and kept stacks by; the candidates that are kept.
HESSIAN_BATCH, MEASURE_BYTES, HELD_BYTES = 8, 1 << 30, 512 << 20


def estimate_stage(stage: str, size: ModelSize, recipe: Recipe, forms: int) -> StageMemory:
    """Estimate the peak of a stage from ``calibrate`` to ``quantize``; ``forms``: weight forms per layer, at most."""
    layer = FLOAT32_BYTES * size.largest
    session = size.weights if size.weights >= LARGE_WEIGHTS_BYTES else int((1 + SESSION_COPIES) * size.weights)
    if stage == "calibrate":
        return StageMemory(stage, session, int(ARENA_SHARE * recipe.calibrate.batch_size * size.alive), BARE_BYTES)
    if stage == "candidates":
        rounding = layer * (ROUNDING_ARRAYS + FORM_ARRAYS * forms)
        if recipe.quantize.rounding == "nearest":
            return StageMemory(stage, 0, 0, BARE_BYTES + rounding)
        hessians, values = recipe.quantize.memory_mb << 20, int(ARENA_SHARE * HESSIAN_BATCH * size.alive)
        if rounding > session + values:
            return StageMemory(stage, 0, 0, BARE_BYTES + hessians + rounding)
        return StageMemory(stage, session, values, BARE_BYTES + hessians)
    if stage == "measure":
        batch = min(recipe.measure.batch_size, recipe.measure.calls)
        one = int(VALUE_SHARE * size.values) + recipe.measure.probes * size.outputs
        values = max(one, min(batch * one, int(VALUE_SHARE * MEASURE_BYTES)))
        stacks = size.weights * (1 + forms)
        kept = min(stacks, MEASURE_BYTES) if stacks < HELD_SHARE * MEASURE_BYTES else 0
        kept += min(HELD_BYTES, size.weights * (FLOAT32_BYTES + forms) // FLOAT32_BYTES)
        work = TORCH_BYTES + layer * (STACK_ARRAYS + forms) + kept
        return StageMemory(stage, size.weights, values, work)
    # Codes of one byte per weight, of all layers.
    return StageMemory(stage, size.weights // FLOAT32_BYTES, 0, BARE_BYTES + layer * ROUNDING_ARRAYS)


def refuse_too_large(estimate: StageMemory, available: int | None, hint: str) -> None:
    """Raise UsageError when ``estimate`` exceeds the ``available`` bytes; nothing where the system does not say."""
    if available is None or estimate.total <= available:
        return
    raise UsageError(
        f"The stage '{estimate.stage}' would need about {estimate.total / 1e9:.1f} GB of memory "
        f"({estimate.weights / 1e9:.1f} for weights, {estimate.values / 1e9:.1f} for values, "
        f"{estimate.work / 1e9:.1f} for its work), and this machine has {available / 1e9:.1f} GB free.",
        hint,
    )


__all__ = ["ModelSize", "StageMemory", "available_memory", "model_size", "refuse_too_large"]
