"""What a stage will take of memory, before it starts, and whether there is so much.

In: the layers of an exported model and the recipe. Out: a ``StageMemory``. What is counted follows
from how the stages work: weights are mapped from their file and count once; values of one call,
Hessians, stacks of candidates and the work on one layer are held beside them. The constants were
fitted to peaks of resident memory (docs/results/memory.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.engine.engine_memory import BUILDER_BYTES, BUILDER_COPIES, BUILDER_NODE_BYTES
from mpq_deploy.formats.scheme import BRANCH_KINDS
from mpq_deploy.graph.attention import plain_attention
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.graph.shapes import known_shapes
from mpq_deploy.models.weight_files import read_headers
from mpq_deploy.onnx_torch.merged_nodes import merged_nodes
from mpq_deploy.onnx_torch.pass_memory import (
    BOUNDARY_SHARE,
    DISTINCT_SHARE,
    PASS_COPIES,
    VALUE_SHARE,
    WHOLE_SHARE,
)
from mpq_deploy.rounding.candidate_store import held_bytes
from mpq_deploy.rounding.hessian import BATCH_SIZE as HESSIAN_BATCH
from mpq_deploy.rounding.hessian import (
    ROWS_PER_COLUMN,
    WAITING_SHARE,
    block_widths,
    matrices_cap,
    matrix_bytes,
)
from mpq_deploy.rounding.quantizers import (
    NEAREST_ARRAYS,
    TOGETHER_BYTES,
    lanes_of,
    rounding_bytes,
    rounding_threads,
)
from mpq_deploy.runtime.fused_attention import LEAST_SCORES
from mpq_deploy.runtime.ort import (
    ARENA_SHARE,
    HESSIAN_ARENA_SHARE,
    LARGE_WEIGHTS_BYTES,
    SESSION_COPIES,
)
from mpq_deploy.sensitivity.measured_calls import (
    HELD_SHARE,
    LARGE_STACK_BYTES,
    SALIENCE_BATCH,
    STACK_ARRAYS,
    STACK_BYTES,
)
from mpq_deploy.sensitivity.measured_calls import MEMORY_BYTES as MEASURE_BYTES
from mpq_deploy.system.lanes import lanes_for
from mpq_deploy.system.memory import Room, refuse_too_large
from mpq_deploy.system.threads import threads_here

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from mpq_deploy.recipe import Recipe

FLOAT32_BYTES = 4
IN_PLACE = {
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Exp",
        "Erf",
        "Tanh",
        "Sigmoid",
        "Relu",
        "Gelu",
        "Softmax",
        "Cast",
    ),
    *(
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Dropout",
        "Neg",
        "Reciprocal",
        "Clip",
        "Where",
    ),
}


@dataclass(frozen=True)
class Patches:
    """What a layer's Hessian is made of: ``group`` matrices over ``columns`` inputs, from ``rows`` rows per call."""

    group: int
    columns: int
    rows: int


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on. Bytes are of float32, values those of one call.

    ``weights``: bytes of all constants; ``largest``: elements of the largest layer's weight;
    ``values``: bytes of all values that torch makes; ``alive``: most bytes that live at once in
    ONNX Runtime; ``outputs``: bytes of the layers' outputs; ``nodes``: of the graph; ``patches``:
    one entry per Hessian.
    """

    weights: int
    largest: int
    values: int
    alive: int
    outputs: int
    nodes: int = 0
    patches: tuple[Patches, ...] = ()


def model_size(path: Path, graph: LayerGraph, inputs: Mapping[str, tuple[int, ...]]) -> ModelSize:
    """Add up constants and values of ``graph``, read from ``path``, for one call of ``inputs``.

    Shapes are inferred from those of the inputs, computed ones included: exporters leave the keys'
    axis of an attention open, which is the longest of all. Values whose shape depends on data count
    nothing.
    """
    proto, shapes = known_shapes(path, inputs)
    sizes = {name: FLOAT32_BYTES * prod(shape) for name, shape in shapes.items()}
    model = graph.model.graph
    weights = sum(
        v.const_value.nbytes for v in model.initializers.values() if v.const_value is not None
    )
    made = {name: sizes.get(name, 0) for node in proto.node for name in node.output if name}
    apart = {
        value.name
        for found in merged_nodes(model).values()
        for node in found.dropped
        for value in node.outputs
    }
    patches = {
        (use.input, layer.group, layer.reduction): Patches(
            layer.group,
            layer.reduction,
            prod(shapes.get(use.output, ())) // max(layer.out_channels, 1),
        )
        for layer in graph.layers
        for use in layer.uses
    }
    return ModelSize(
        weights,
        max((layer.weights for layer in graph.layers), default=0),
        sum(size for name, size in made.items() if name not in apart),
        _most_alive(proto.node, made | dict.fromkeys(_in_blocks(model, made), 0)),
        sum(made.get(use.output, 0) for layer in graph.layers for use in layer.uses),
        len(proto.node),
        tuple(patches.values()),
    )


def _in_blocks(nodes: Iterable[ir.Node], sizes: Mapping[str, int]) -> list[str]:
    """Return the scores and probabilities that a session on the CPU never holds (``runtime.fused_attention``)."""
    found = [one for node in nodes if (one := plain_attention(node)) is not None]
    names = [[value.name or "" for node in one.dropped for value in node.outputs] for one in found]
    least = FLOAT32_BYTES * LEAST_SCORES
    return [name for each in names for name in each if sizes.get(name, 0) >= least]


def _most_alive(nodes: Collection[onnx.NodeProto], sizes: Mapping[str, int]) -> int:
    """Return the most bytes of computed values that live at once.

    ONNX Runtime writes results of ``IN_PLACE`` over an input of the same size that nothing else
    reads.
    """
    last = {name: number for number, node in enumerate(nodes) for name in node.input}
    alive = most = 0
    for number, node in enumerate(nodes):
        ended = [
            sizes.get(name, 0) for name in dict.fromkeys(node.input) if last.get(name) == number
        ]
        made = [sizes.get(name, 0) for name in node.output]
        in_place = node.op_type in IN_PLACE and made[0] in ended
        alive += sum(made) - (made[0] if in_place else 0)
        most = max(most, alive)
        alive -= sum(ended) - (made[0] if in_place else 0)
        alive -= sum(size for name, size in zip(node.output, made) if name not in last)
    return most


def source_size(files: Iterable[Path]) -> tuple[int, int]:
    """Return the float32 bytes and number of tensors in safetensors ``files``, from headers.

    Raises ModelError for a file that is none.
    """
    # File by file: parts of a pipeline have tensors of the same names.
    shapes = [shape for path in files for shape in read_headers([path]).shapes.values()]
    return FLOAT32_BYTES * sum(map(prod, shapes)), len(shapes)


@dataclass(frozen=True)
class StageMemory:
    """Bytes at a stage's peak: ``weights``, ``values`` of calls, its ``work``, and ``code``.

    ``code`` is what the process holds of the interpreter, libraries and graphs; in a process that
    has run other stages it is there already.
    """

    stage: str
    weights: int
    values: int
    work: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.values + self.work + self.code

    def fits(self, room: Room, held: int) -> bool:
        """Whether the ``room`` holds this; ``code`` may be among the bytes ``held`` already."""
        return room.holds(self.total - min(held, self.code))

    def refuse_too_large(self, room: Room | None, hint: str, held: int = 0) -> None:
        """Raise UsageError when this exceeds the ``room``; ``code`` may be among the bytes ``held`` already."""
        parts = {"weights": self.weights, "values": self.values, "its work": self.work + self.code}
        refuse_too_large(f"The stage '{self.stage}'", parts, room, hint, min(held, self.code))


# A worker of the stage candidates, without its graph: the interpreter with NumPy, ONNX and its
# runtime.
ROUNDER_BYTES = 190 << 20
# The interpreter with NumPy and ONNX; with the solver or ONNX Runtime; with torch; with diffusers
# and the exporter.
BARE_BYTES, SESSION_BYTES, TORCH_BYTES, EXPORT_BYTES = 140 << 20, 85 << 20, 400 << 20, 530 << 20
# What each node of the graph takes: its objects; those and a session's, or a plan's; the exporter,
# per parameter.
OBJECT_BYTES, NODE_BYTES, PARAMETER_BYTES = 37_000, 130_000, 280_000
# The float module, and of the file's pages and the source's those that are in memory when most of
# both are.
EXPORT_COPIES = 1.6
# For an ONNX file: the interpreter; per node and per byte of weights, the sessions of the file and
# of the export.
ONNX_BYTES, ONNX_NODE_BYTES, ONNX_COPIES = 125 << 20, 72_000, 2.1
# Calls of the largest batch of the comparison.
COMPARED_CALLS = 2


def estimate_torch_export(weights: int, parameters: int) -> StageMemory:
    """Estimate the export of a module of PyTorch: ``weights`` bytes in float32, in so many ``parameters``."""
    return StageMemory(
        "export", int(EXPORT_COPIES * weights), 0, 0, EXPORT_BYTES + PARAMETER_BYTES * parameters
    )


def estimate_onnx_export(path: Path, inputs: Mapping[str, tuple[int, ...]]) -> StageMemory:
    """Estimate the export of the ONNX file ``path`` for ``inputs`` of these shapes (one call)."""
    proto, shapes = known_shapes(path, inputs)
    sizes = {name: FLOAT32_BYTES * prod(shape) for name, shape in shapes.items()}
    weights = sum(FLOAT32_BYTES * prod(tensor.dims) for tensor in proto.initializer)
    made = {name: sizes.get(name, 0) for node in proto.node for name in node.output if name}
    values = COMPARED_CALLS * _most_alive(proto.node, made)
    held = weights if weights >= LARGE_WEIGHTS_BYTES else int(ONNX_COPIES * weights)
    return StageMemory("export", held, values, 0, ONNX_BYTES + ONNX_NODE_BYTES * len(proto.node))


def estimate_engine(weights: int, nodes: int) -> StageMemory:
    """Estimate the builder's host memory for ``weights`` bytes as planned and a graph of so many ``nodes``."""
    child = BUILDER_BYTES + BUILDER_NODE_BYTES * nodes
    return StageMemory("engine", BUILDER_COPIES * weights, 0, child, _bare(nodes))


def estimate_stage(
    stage: str,
    size: ModelSize,
    recipe: Recipe,
    forms: int,
    workers: int = 0,
    rows: int | None = None,
) -> StageMemory:
    """Estimate the peak of a stage; ``forms``: weight forms per layer, at most.

    ``workers``: processes of this machine that round layers; what they hold counts as work.
    ``rows``: of the model's inputs at once, None: calibrate's batch.
    """
    if stage in ("calibrate", "evaluate"):
        # As many batches at once as there are lanes.
        calls = lanes_for(size.weights).count * (rows or recipe.calibrate.batch_size)
        values, code = (
            int(ARENA_SHARE * calls * size.alive),
            SESSION_BYTES + NODE_BYTES * size.nodes,
        )
        weights = _session(size.weights)
        if stage == "evaluate":
            # A quantized graph's session holds all weights dequantized, beside its file.
            weights = max(weights, size.weights + size.weights // FLOAT32_BYTES)
        return StageMemory(stage, weights, values, 0, code)
    if stage == "candidates":
        return _candidates(size, recipe, forms, workers)
    if stage == "measure":
        return _measure(size, recipe, forms)
    if stage == "allocate":
        # Every weight is looked at for what may be folded into it, so all of its file is in memory
        # once.
        return StageMemory(stage, size.weights, 0, 0, SESSION_BYTES + NODE_BYTES * size.nodes)
    # Codes of one byte per weight, of all layers.
    work = FLOAT32_BYTES * size.largest * NEAREST_ARRAYS
    return StageMemory(stage, size.weights // FLOAT32_BYTES, 0, work, _bare(size.nodes))


def _bare(nodes: int) -> int:
    return BARE_BYTES + OBJECT_BYTES * nodes


def _session(weights: int) -> int:
    return weights if weights >= LARGE_WEIGHTS_BYTES else int((1 + SESSION_COPIES) * weights)


def _candidates(size: ModelSize, recipe: Recipe, forms: int, workers: int) -> StageMemory:
    """Return the largest of the phases: rounding a layer, gathering Hessians, ordering salient channels."""
    code, gptq = SESSION_BYTES + NODE_BYTES * size.nodes, recipe.quantize.rounding != "nearest"
    held, beside = (
        hessian_bytes(size, recipe) if gptq else (0, 0),
        code if gptq else _bare(size.nodes),
    )
    threads = rounding_threads(threads_here().blas)
    lanes = lanes_of(_rounding(size, recipe, forms), threads)
    largest = _rounding(size, recipe, forms, lanes)
    rounding = max(largest, min(threads * largest, TOGETHER_BYTES)) + held[0]
    if workers:
        # Hessians lie in files then.
        rounding = workers * _rounder_bytes(size, recipe, forms)
    phases = [StageMemory("candidates", 0, 0, rounding, beside)]
    if gptq:
        # Weights that sessions do not copy are in memory once, whoever has mapped them.
        sessions = _session(size.weights) * (
            1 if size.weights >= LARGE_WEIGHTS_BYTES else max(workers, 1)
        )
        values = max(workers, 1) * _gathered_values(size, recipe)
        work = sum(held) + workers * _gatherer_bytes(size, recipe)
        phases += [StageMemory("candidates", sessions, values, work, code)]
    promotes = any(BRANCH_KINDS[kind].promotes for kind in recipe.allocate.branches)
    if promotes and recipe.quantize.salience == "probe":
        values, kept = _salience(size)
        torch = max(TORCH_BYTES, code)
        work = workers * (kept + torch) if workers else kept
        phases += [StageMemory("candidates", size.weights, max(workers, 1) * values, work, torch)]
    return max(phases, key=lambda phase: phase.total)


def _rounding(size: ModelSize, recipe: Recipe, forms: int, lanes: int = 1) -> int:
    """Return the bytes of the arrays that rounding the largest layer takes, beside its Hessian.

    ``lanes``: how many parts of it are rounded at once.
    """
    width = max((_blocks(patches, recipe)[1] for patches in size.patches), default=0)
    return rounding_bytes(size.largest, width, forms, recipe.quantize.rounding == "gptq", lanes)


def candidates_worker_bytes(size: ModelSize, recipe: Recipe, forms: int) -> int:
    """Estimate what a worker of the stage holds: as it gathers rows for Hessians, or as it rounds a layer."""
    rounding = _rounder_bytes(size, recipe, forms)
    if recipe.quantize.rounding == "nearest":
        return rounding
    gathering = (
        _session(size.weights) + _gathered_values(size, recipe) + _gatherer_bytes(size, recipe)
    )
    return max(rounding, gathering)


def salience_worker_bytes(size: ModelSize) -> int:
    """Estimate what a worker holds that measures channels, beside its code."""
    return size.weights + sum(_salience(size))


def _salience(size: ModelSize) -> tuple[int, int]:
    """Return the bytes of a batch's values, and of the differences of weights that are kept."""
    calls = int(WHOLE_SHARE * MEASURE_BYTES / max(PASS_COPIES * DISTINCT_SHARE * size.values, 1))
    return _adjoint(size, 1, max(1, min(SALIENCE_BATCH, calls))), min(size.weights, MEASURE_BYTES)


def _gathered_values(size: ModelSize, recipe: Recipe) -> int:
    return int(HESSIAN_ARENA_SHARE * min(HESSIAN_BATCH, _rounded_on(recipe)) * size.alive)


def _gatherer_bytes(size: ModelSize, recipe: Recipe) -> int:
    """Return what a worker holds beside its session: its code, and a timestep's rows, twice while they are sent."""
    rows = sum(_row_bytes(patches, recipe) for patches in size.patches)
    # At most the rows of as many Hessians as fit the cap.
    held, _ = hessian_bytes(size, recipe)
    whole = sum(_matrix_bytes(patches, recipe) for patches in size.patches)
    return _rounder_code(size) + 2 * int(rows * held / max(whole, 1)) // recipe.calibrate.timesteps


def _rounder_bytes(size: ModelSize, recipe: Recipe, forms: int) -> int:
    """Return what a worker holds that rounds a layer: its code, the layer's Hessian, and the work on it."""
    hessian = 0
    if recipe.quantize.rounding != "nearest":
        shapes = [(p.group * _blocks(p, recipe)[0], _blocks(p, recipe)[1]) for p in size.patches]
        hessian = FLOAT32_BYTES * max((count * width**2 for count, width in shapes), default=0)
    return _rounder_code(size) + hessian + _rounding(size, recipe, forms)


def _rounder_code(size: ModelSize) -> int:
    return ROUNDER_BYTES + OBJECT_BYTES * size.nodes


def _blocks(patches: Patches, recipe: Recipe) -> tuple[int, int]:
    """Return into how many diagonal blocks of which width a Hessian is cut."""
    widths = block_widths(patches.columns, patches.group, recipe.quantize)
    return len(widths), max(widths)


def _rounded_on(recipe: Recipe) -> int:
    """Return the calls of a timestep that weights are rounded on (``calls.recorded.CallSet.split``)."""
    samples = recipe.calibrate.samples
    rest = samples - recipe.measure.samples
    return (rest if rest >= samples / 5 else samples) * (1 + recipe.quantize.noise_draws)


def _calls(recipe: Recipe) -> int:
    """Return the calls of all timesteps that weights are rounded on."""
    return max(1, recipe.calibrate.timesteps * _rounded_on(recipe))


def hessian_bytes(size: ModelSize, recipe: Recipe) -> tuple[int, int]:
    """Return the bytes of the Hessians held at once and of the rows that wait for them, both within the cap."""
    section = recipe.quantize
    matrices = sum(_matrix_bytes(patches, recipe) for patches in size.patches)
    waiting = sum(_row_bytes(patches, recipe) for patches in size.patches)
    most = int(WAITING_SHARE * (section.memory_mb << 20))
    return min(matrices, matrices_cap(section)), min(waiting, most)


def hessian_groups(size: ModelSize, recipe: Recipe, free: int = 0) -> int:
    """Return how often the calls behind Hessians run: once for each group that fits together.

    ``free``: as in ``HessianPlan.of``.
    """
    cap, groups, used, held = matrices_cap(recipe.quantize), 1, 0, 0
    batch = min(HESSIAN_BATCH, _rounded_on(recipe)) / _calls(recipe)
    for patches in size.patches:
        need = _matrix_bytes(patches, recipe)
        taken = int(need / (1 - WAITING_SHARE)) + int(batch * _row_bytes(patches, recipe))
        if used and used + need > cap and held + taken > free:
            groups, used, held = groups + 1, 0, 0
        used, held = used + need, held + taken
    return groups


def _matrix_bytes(patches: Patches, recipe: Recipe) -> int:
    """Return the bytes of a Hessian, with one more of its blocks for the product on its way."""
    widths = block_widths(patches.columns, patches.group, recipe.quantize)
    return matrix_bytes(widths, patches.group)


def _row_bytes(patches: Patches, recipe: Recipe) -> int:
    """Return the bytes of all rows behind a Hessian."""
    calls = _calls(recipe)
    wanted = max(recipe.quantize.hessian_rows, ceil(ROWS_PER_COLUMN * _blocks(patches, recipe)[1]))
    rows = calls * min(patches.rows, ceil(wanted / calls))
    return FLOAT32_BYTES * patches.group * patches.columns * rows


def _adjoint(size: ModelSize, directions: int, calls: int) -> int:
    """Return what a backward pass holds: the whole graph, or a part where it takes several times its bound."""
    if (
        PASS_COPIES * DISTINCT_SHARE * size.values + directions * size.outputs
        > WHOLE_SHARE * MEASURE_BYTES
    ):
        return MEASURE_BYTES + int(BOUNDARY_SHARE * size.alive)
    return calls * (int(VALUE_SHARE * size.values) + directions * size.outputs)


def _measure(size: ModelSize, recipe: Recipe, forms: int) -> StageMemory:
    batch = min(recipe.measure.batch_size, recipe.measure.calls)
    # Gradients of layers' outputs and of their inputs, which are about as large.
    probes = 2 * recipe.measure.directions
    # As the probes choose how many calls to evaluate at once.
    most = MEASURE_BYTES // max(
        int(PASS_COPIES * DISTINCT_SHARE * size.values) + probes * size.outputs, 1
    )
    values = _adjoint(size, probes, max(1, min(batch, most)))
    stacks = size.weights * (1 + forms)
    kept = min(stacks, STACK_BYTES) if stacks < HELD_SHARE * STACK_BYTES else 0
    kept += held_bytes(size.weights * (FLOAT32_BYTES + forms) // FLOAT32_BYTES)
    largest = FLOAT32_BYTES * size.largest
    at_once = min(largest * forms, max(LARGE_STACK_BYTES, largest))
    work = largest * STACK_ARRAYS + at_once + kept
    return StageMemory("measure", size.weights, values, work, TORCH_BYTES)
