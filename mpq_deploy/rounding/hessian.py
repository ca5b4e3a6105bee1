"""The Hessian X^T X of each layer's inputs, for GPTQ, within a cap on memory.

In: a layer graph and the recorded calls. Out: one ``Hessian`` per layer, in graph order. The
denoiser runs once per group of layers whose matrices fit the cap together, and only up to the last
layer of the group. Of each activation a fixed random subset of output positions is used, the same
number per call. The graph itself gathers their rows (for a Conv: im2col patches), so that whole
activations never leave ONNX Runtime. NumPy multiplies the rows (A^T A at half the cost of a general
product), or torch on its GPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil, prod
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from mpq_deploy.calibrate.activation_shapes import ActivationShape, activation_shapes, tensors_of
from mpq_deploy.calls.recorded import Batch, RecordedCalls
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.layers import Layer, LayerGraph, LayerUse
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import QuantizeSettings
from mpq_deploy.rounding.arrays import fetched, names_of, placed
from mpq_deploy.system.progress import Advance, Talk
from mpq_deploy.system.sessions import (
    open_session,
    run_to_tensors,
    shares_gpu,
    within_gpu_memory,
)

# Share of the memory cap for rows that wait to be multiplied: each product also reads and writes
# the whole matrix, so a product of many rows costs less per row.
WAITING_SHARE = 0.25
# Widths of diagonal blocks are a multiple of the largest quantization block, so that none is cut.
WIDTH_MULTIPLE = 256
# Minimum number of rows per column of a Hessian (our choice).
ROWS_PER_COLUMN = 2.0
MIB = 2**20
# Calls that run together.
BATCH_SIZE = 8
# Seed of the random positions whose rows are taken.
SEED = 0


@dataclass(frozen=True)
class Hessian:
    """Mean of x x^T over the rows of a layer's input, float32 ``blocks`` [group * B, w, w].

    Each of the layer's groups has B = len(widths) diagonal blocks over consecutive columns of the
    reduction axis of ``weight.reshape(O, -1)``. Block b covers ``widths[b]`` columns, w is the
    largest width, and narrower blocks are padded with zeros. B is 1 unless the reduction exceeds
    ``hessian_width``. ``rows``: how many rows were averaged.
    """

    layer: Layer
    blocks: Array
    widths: tuple[int, ...]
    rows: int


def iterate_hessians(
    graph: LayerGraph,
    calls: RecordedCalls,
    settings: QuantizeSettings,
    talk: Talk,
    *,
    scratch: Path | None = None,
) -> Iterator[Hessian]:
    """Yield the Hessian of every layer, in graph order.

    A layer of reduction K uses about max(``hessian_rows``, ROWS_PER_COLUMN * K) rows of ``calls``,
    or all where there are fewer. A matrix of more than ``hessian_width`` columns is block-diagonal
    (``block_widths``). Layers that read one tensor through the same patches share one array: do not write into
    ``blocks``. Raises UsageError when one layer's matrices exceed ``memory_mb``, and ModelError
    when an input or its square is not finite.
    """
    plan = HessianPlan.of(graph, calls, settings, talk, scratch=scratch)
    for number in range(len(plan)):
        yield from plan.hessians(number)


class HessianPlan:
    """Groups of layers whose matrices fit the cap together; each group needs one run of all calls.

    The bits of a group's Hessians do not depend on the order or the process of the groups.
    """

    def __init__(self, source: _Source, groups: list[list[_Planned]]) -> None:
        self._source, self._groups = source, groups

    @classmethod
    def of(
        cls,
        graph: LayerGraph,
        calls: RecordedCalls,
        settings: QuantizeSettings,
        talk: Talk,
        *,
        scratch: Path | None = None,
        free: int = 0,
    ) -> HessianPlan:
        """Plan the Hessians; the arguments and errors are those of ``iterate_hessians``.

        ``free``: bytes that a group and the rows of one batch may take beyond the limit of
        ``memory_mb``, so that the calls run less often.
        """
        source = _Source(graph, calls, settings, talk, scratch)
        sizes = range(len(calls.spec.sizes)) or (None,)
        shapes = [activation_shapes(graph, calls, talk, scratch, size=one) for one in sizes]
        nodes = {node.name: node for node in graph.model.graph}
        planned = [
            (
                layer,
                tuple(
                    _Patches.at_sizes(
                        [_Patches.of(nodes[use.node], use, layer, of[use.input]) for of in shapes]
                    )
                    for use in layer.uses
                ),
            )
            for layer in graph.layers
        ]
        return cls(source, _groups(planned, source, free))

    def __len__(self) -> int:
        return len(self._groups)

    def layers(self, number: int) -> tuple[Layer, ...]:
        """Return the layers of group ``number``, in graph order."""
        return tuple(layer for layer, _ in self._groups[number])

    def hessians(
        self, number: int, gathered: Iterable[list[Array]] | None = None
    ) -> Iterator[Hessian]:
        """Yield the Hessians of group ``number``; raises as ``iterate_hessians`` does.

        ``gathered``: the rows of each batch, in order, from workers; None: run the calls here.
        """
        source, group = self._source, self._groups[number]
        jobs = self._jobs(number)
        if gathered is None:
            means = _accumulated_here(source, jobs, f"Hessians {number + 1} of {len(self)}")
        else:
            means = _accumulate(source, jobs, gathered)
        last = {patches: layer.name for layer, uses in group for patches in uses}
        for layer, uses in group:
            blocks, rows = _over_uses([means[patches] for patches in uses])
            for patches in set(uses):
                if last[patches] == layer.name:
                    del means[patches]
            # Uses of a layer have as many columns as its weight has.
            yield Hessian(layer, blocks, uses[0].widths(source.settings), rows)
            del blocks

    @property
    def timesteps(self) -> int:
        """How many timesteps were recorded."""
        return self._source.timesteps

    def calls(self, step: int) -> int:
        """Return how many calls of a timestep are run."""
        return sum(len(batch.calls) for batch in self._source.batches if batch.step == step)

    def gathering(self, number: int) -> Gathering:
        """Open the session that gathers the rows of group ``number`` for all timesteps."""
        source = self._source
        model = _gathering_graph(source.graph, self._jobs(number))
        with open_session(model, source.talk, scratch=source.scratch) as session:
            return Gathering(self._source, self._jobs(number), session)

    def _jobs(self, number: int) -> list[_Patches]:
        return list(dict.fromkeys(patches for _, uses in self._groups[number] for patches in uses))


@dataclass(frozen=True)
class _Source:
    graph: LayerGraph
    recorded: RecordedCalls
    settings: QuantizeSettings
    talk: Talk
    scratch: Path | None
    together: int | None = None

    @cached_property
    def batches(self) -> list[Batch]:
        """The batches of all calls, in order."""
        return list(self.recorded.batches(self.together or BATCH_SIZE))

    @property
    def timesteps(self) -> int:
        """How many timesteps were recorded."""
        return len(self.recorded.recorded.timesteps)

    @property
    def calls(self) -> int:
        """How many calls each timestep has."""
        return self.recorded.recorded.count

    @property
    def total_calls(self) -> int:
        """How many calls all timesteps have."""
        return self.calls * self.timesteps


@dataclass(frozen=True)
class _Patches:
    """How a node reads its input as rows [positions, group, columns]; the key of a Hessian.

    For a Conv the spatial attributes are per dimension; for a Gemm or MatMul ``kernel`` is empty.
    ``sized``: the geometry at each of the model's image sizes, where there are several.
    """

    tensor: str
    shape: ActivationShape
    channels: int
    group: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    out_size: tuple[int, ...] = ()
    sized: tuple[_Patches, ...] = ()

    @classmethod
    def at_sizes(cls, found: list[_Patches]) -> _Patches:
        """Combine the geometries ``found`` at each image size into one."""
        return found[0] if len(found) == 1 else replace(found[0], sized=tuple(found))

    def at(self, size: int) -> _Patches:
        """Return the geometry at image size ``size`` (its index)."""
        return self.sized[size] if self.sized else self

    @classmethod
    def of(cls, node: ir.Node, use: LayerUse, layer: Layer, shape: ActivationShape) -> _Patches:
        """Read the geometry of ``node``, the node of ``use``."""
        if layer.op != "Conv":
            return cls(use.input, shape, shape.shape[-1], 1)
        kernel, size = layer.kernel, shape.shape[2:]
        ones = (1,) * len(kernel)
        strides = _integers(node, "strides", ones)
        dilations = _integers(node, "dilations", ones)
        reach = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel))
        pads = _integers(node, "pads", (0,) * (2 * len(kernel)))
        automatic = node.attributes.get("auto_pad")
        mode = automatic.as_string() if automatic is not None else "NOTSET"
        if mode == "VALID":
            pads = (0,) * (2 * len(kernel))
        elif mode != "NOTSET":
            pads = _same_pads(size, strides, reach, mode == "SAME_UPPER")
        dims = len(kernel)
        out_size = tuple(
            (size[d] + pads[d] + pads[d + dims] - reach[d]) // strides[d] + 1 for d in range(dims)
        )
        return cls(
            use.input,
            shape,
            shape.shape[1],
            layer.group,
            kernel,
            strides,
            pads[:dims],
            dilations,
            out_size,
        )

    @property
    def columns(self) -> int:
        """Columns of one group: the layer's reduction."""
        return self.channels // self.group * prod(self.kernel)

    @property
    def rows_per_call(self) -> int:
        """Rows that one call gives."""
        if not self.kernel:
            return self.shape.elements // self.channels
        return self.shape.shape[0] * prod(self.out_size)

    def sampled(self, calls: int, settings: QuantizeSettings) -> int:
        """How many rows to take from each of ``calls`` calls."""
        width = max(self.widths(settings))
        rows = max(settings.hessian_rows, ceil(ROWS_PER_COLUMN * width))
        return min(self.rows_per_call, ceil(rows / calls))

    def row_bytes(self, calls: int, settings: QuantizeSettings) -> int:
        """Memory of the rows that are taken from one of ``calls`` calls."""
        return 4 * self.group * self.columns * self.sampled(calls, settings)

    def widths(self, settings: QuantizeSettings) -> tuple[int, ...]:
        """The columns of each diagonal block."""
        return block_widths(self.columns, self.group, settings)

    def bytes(self, settings: QuantizeSettings) -> int:
        """Memory of the matrices and of one product, as large as the widest block."""
        return matrix_bytes(self.widths(settings), self.group)

    def taps(self, positions: Array, calls: int) -> tuple[Array, Array | None]:
        """Return the input pixels of each row, and which of them are inside the image.

        ``positions`` int64 [M, r]: the rows' output positions within each call; M is 1 for a tensor
        that is the same for all calls. Returns indices into the flat view [pixels, channels], int64
        [M * r, taps] (0 where outside), and a bool array of that shape, None if all are inside.
        """
        per_call = np.arange(len(positions), dtype=np.int64)[:, None]
        if not self.kernel:
            return (self._product_rows(calls)[per_call, positions]).reshape(-1, 1), None
        frames, size = self.shape.shape[0], self.shape.shape[2:]
        out = np.unravel_index(positions.ravel(), (frames, *self.out_size))
        image = (per_call * frames).repeat(positions.shape[1], axis=1).ravel() + out[0]
        flat = np.repeat(image[:, None], prod(self.kernel), axis=1)
        inside = np.ones(flat.shape, bool)
        offsets = np.array(list(product(*(range(k) for k in self.kernel))), np.int64)
        for d, length in enumerate(size):
            at = (
                out[d + 1][:, None] * self.strides[d]
                - self.pads[d]
                + offsets[None, :, d] * self.dilations[d]
            )
            inside &= (at >= 0) & (at < length)
            flat = flat * length + at
        flat[~inside] = 0
        return flat, (None if inside.all() else inside)

    def _product_rows(self, calls: int) -> Array:
        """Return the flat indices of each call's rows, int64 [M, rows per call]."""
        axis = self.shape.batch_axis
        if axis is None:
            return np.arange(self.rows_per_call, dtype=np.int64)[None]
        dims = list(self.shape.shape[:-1])
        dims[axis : axis + 1] = [calls, dims[axis]]
        grid = np.arange(prod(dims), dtype=np.int64).reshape(dims)
        return np.moveaxis(grid, axis, 0).reshape(calls, -1)


def _integers(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else default


def _same_pads(
    size: tuple[int, ...], strides: tuple[int, ...], reach: tuple[int, ...], upper: bool
) -> tuple[int, ...]:
    """Return the pads of ONNX's auto_pad SAME_UPPER or SAME_LOWER: output ceil(size / stride)."""
    total = [max((ceil(n / s) - 1) * s + r - n, 0) for n, s, r in zip(size, strides, reach)]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return tuple(small + large) if upper else tuple(large + small)


def _widths(columns: int, max_width: int) -> tuple[int, ...]:
    """Split ``columns`` into equal widths to ``max_width``, multiples of 256 but for the last."""
    if columns <= max_width:
        return (columns,)
    width = ceil(columns / ceil(columns / max_width) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    width = min(width, max_width)
    return tuple(min(width, columns - start) for start in range(0, columns, width))


def matrix_bytes(widths: Sequence[int], group: int) -> int:
    """Return the bytes of ``group`` matrices of diagonal blocks, and of one product on its way."""
    return 4 * (group * len(widths) + 1) * max(widths) ** 2


def block_widths(columns: int, group: int, settings: QuantizeSettings) -> tuple[int, ...]:
    """Return the columns of the diagonal blocks of a Hessian, of ``group`` matrices.

    At most ``hessian_width``, and no more than lets the matrices fit ``memory_mb`` where blocks of
    ``WIDTH_MULTIPLE`` columns do.
    """
    widths = _widths(columns, settings.hessian_width)
    count = len(widths)
    while matrix_bytes(widths, group) > matrices_cap(settings) and max(widths) > WIDTH_MULTIPLE:
        count += 1
        widths = _widths(columns, WIDTH_MULTIPLE * ceil(columns / (count * WIDTH_MULTIPLE)))
    return widths


def matrices_cap(settings: QuantizeSettings) -> int:
    """Return the bytes that Hessians may take together: the rest of the limit is for waiting rows."""
    return int((1 - WAITING_SHARE) * settings.memory_mb * MIB)


_Planned = tuple[Layer, tuple[_Patches, ...]]


def _groups(planned: list[_Planned], source: _Source, free: int) -> list[list[_Planned]]:
    """Cut the layers, in order, into groups whose distinct matrices fit the cap, or ``free`` bytes.

    Raises UsageError where the matrices of one layer exceed the cap, however narrow their blocks.
    """
    groups: list[list[_Planned]] = []
    settings, calls = source.settings, source.total_calls
    cap, batch = matrices_cap(settings), min(source.together or BATCH_SIZE, source.calls)
    held: set[_Patches] = set()
    used = rows = 0
    for layer, uses in planned:
        need = sum(p.bytes(settings) for p in set(uses))
        if need > cap:
            raise UsageError(
                f"The Hessians of layer '{layer.name}' take {need:,} bytes; quantize.memory_mb leaves {cap:,} "
                "for them.",
                f"Raise quantize.memory_mb to at least {ceil(need / (1 - WAITING_SHARE) / MIB)}.",
            )
        more = set(uses) - held
        new = sum(p.bytes(settings) for p in more)
        gathered = sum(batch * p.row_bytes(calls, settings) for p in more)
        waiting = (used + new) / (1 - WAITING_SHARE)
        fits = used + new <= cap or waiting + rows + gathered <= free
        if not groups or not fits:
            groups.append([])
            held, used, new, rows = set(), 0, need, 0
        groups[-1].append((layer, uses))
        held |= set(uses)
        used, rows = used + new, rows + gathered
    return groups


@dataclass
class _Sum:
    """The sum of X^T X so far, in the end its mean: ``blocks`` float32 [group * B, w, w].

    ``rows``: how many rows were summed; ``population``: how many rows the calls have.
    """

    blocks: Array
    rows: int = 0
    population: int = 0


def _over_uses(means: list[_Sum]) -> tuple[Array, int]:
    """Return the mean of x x^T over all uses of a layer, weighted by population, and the rows."""
    if len(means) == 1:
        return means[0].blocks, means[0].rows
    total = sum(part.population for part in means)
    blocks = np.zeros_like(means[0].blocks)
    for part in means:
        blocks += part.blocks * np.float32(part.population / total)
    return blocks, sum(part.rows for part in means)


class Gathering:
    """Gathers the rows of each of ``jobs`` (the matrices of a group) in an open session."""

    def __init__(
        self, source: _Source, jobs: list[_Patches], session: ort.InferenceSession
    ) -> None:
        self._source, self._jobs, self._session = source, jobs, session
        self._needed = {entry.name for entry in session.get_inputs()}
        self._calls, self._total = source.calls, source.total_calls

    def at(self, step: int, advance: Advance) -> Iterator[list[Array]]:
        """Yield the rows of each batch of a timestep; report each batch's calls to ``advance``."""
        for batch in self._source.batches:
            if batch.step == step:
                yield self.rows(batch)
                advance(len(batch.calls))

    def rows(self, batch: Batch) -> list[Array]:
        """Run ``batch``; return float32 [rows, group, columns] per job, 0 outside the image.

        Where ONNX Runtime and torch compute on the same GPU, the rows are tensors there.
        """
        jobs = self._jobs
        taps = [
            _batch_taps(job, batch, self._calls, self._total, self._source.settings) for job in jobs
        ]
        feed = batch.feed | {f"hessian.rows.{i}": flat.ravel() for i, (flat, _) in enumerate(taps)}
        feed = {k: v for k, v in feed.items() if k in self._needed}
        if shares_gpu(self._session):
            shapes = [(flat.size, job.channels) for job, (flat, _) in zip(jobs, taps, strict=True)]
            results = run_to_tensors(self._session, feed, shapes)
        else:
            results = self._session.run(None, feed)
        return [
            _as_rows(job, gathered.reshape(*flat.shape, job.channels), inside)
            for job, gathered, (flat, inside) in zip(jobs, results, taps, strict=True)
        ]


def _as_rows(job: _Patches, gathered: Array, inside: Array | None) -> Array:
    """Return ``gathered`` [rows, taps, channels] as [rows, group, columns], 0 if not ``inside``."""
    if inside is not None:
        gathered[names_of(gathered).asarray(~inside)] = 0
    count, taps, channels = gathered.shape
    # Columns run over channels and then taps, as in the weight, within each group of channels.
    rows: Array = gathered.swapaxes(1, 2).reshape(count, job.group, channels // job.group * taps)
    return rows


def _accumulated_here(source: _Source, jobs: list[_Patches], label: str) -> dict[_Patches, _Sum]:
    """Return the mean of x x^T for each of ``jobs``; smaller batches if GPU memory runs out."""

    def accumulated(size: int) -> dict[_Patches, _Sum]:
        cut = replace(source, together=size)
        return _accumulate(cut, jobs, _gathered_here(cut, jobs, label))

    return within_gpu_memory(accumulated, BATCH_SIZE, f"calls of {label}", source.talk)


def _gathered_here(source: _Source, jobs: list[_Patches], label: str) -> Iterator[list[Array]]:
    """Run the calls once; yield the rows of each batch."""
    model = _gathering_graph(source.graph, jobs)
    with (
        open_session(model, source.talk, scratch=source.scratch) as session,
        source.talk.bar(label, source.total_calls) as advance,
    ):
        gathering = Gathering(source, jobs, session)
        for batch in source.batches:
            yield gathering.rows(batch)
            advance(len(batch.calls))


def _accumulate(
    source: _Source, jobs: list[_Patches], gathered: Iterable[list[Array]]
) -> dict[_Patches, _Sum]:
    """Return the mean of x x^T for each of ``jobs``; ``gathered``: their rows in every batch.

    Raises ModelError when an input or its square is not finite.
    """
    settings = source.settings
    sums = {}
    for job in jobs:
        widths = job.widths(settings)
        sums[job] = _Sum(np.zeros((job.group * len(widths), max(widths), max(widths)), np.float32))
    waiting = _Waiting(sums, settings)
    for batch, parts in zip(source.batches, gathered, strict=True):
        for job, rows in zip(jobs, parts, strict=True):
            waiting.add(job, rows)
            repeats = len(batch.calls) if job.shape.batch_axis is not None else 1
            sums[job].population += repeats * job.at(batch.size).rows_per_call
    waiting.finish()
    for job in jobs:
        sums[job].blocks /= np.float32(sums[job].rows)
        if not np.isfinite(np.einsum("bii->", sums[job].blocks)):
            raise ModelError(
                f"The activation '{job.tensor}' is not finite, or so large that its square is not.",
                "Calibrate again: the observers name the layer and the timestep.",
            )
    return sums


def _batch_taps(
    job: _Patches, batch: Batch, calls: int, total_calls: int, settings: QuantizeSettings
) -> tuple[Array, Array | None]:
    """Draw this batch's rows of ``job``: one at random in each of r equal strides of every call.

    The draw depends on seed, tensor, timestep and call, not on the batch. Returns as ``taps``.
    """
    job = job.at(batch.size)
    count = job.sampled(total_calls, settings)
    seed = (SEED, zlib.crc32(job.tensor.encode()), batch.step)
    jitter = np.random.default_rng(seed).random((calls, count))[batch.calls]
    positions = ((np.arange(count) + jitter) * (job.rows_per_call / count)).astype(np.int64)
    np.minimum(positions, job.rows_per_call - 1, out=positions)
    if job.shape.batch_axis is None:
        positions = positions[:1]
    return job.taps(positions, len(batch.calls))


class _Waiting:
    """Collects rows before they are multiplied: of each job a share of what its matrices take.

    When a job's rows are multiplied depends on that job alone, so that its bits do not depend on
    which others are gathered with it.
    """

    def __init__(self, sums: dict[_Patches, _Sum], settings: QuantizeSettings) -> None:
        self.sums, self.settings = sums, settings
        share = WAITING_SHARE / (1 - WAITING_SHARE)
        self.limits = {job: share * job.bytes(settings) for job in sums}
        self.rows: dict[_Patches, list[Array]] = {job: [] for job in sums}
        self.bytes = dict.fromkeys(sums, 0)

    def add(self, job: _Patches, rows: Array) -> None:
        """Add ``rows`` float32 [rows, group, columns]."""
        self.rows[job].append(rows)
        self.bytes[job] += rows.nbytes
        self.sums[job].rows += len(rows)
        if self.bytes[job] > self.limits[job]:
            self.multiply(job)

    def finish(self) -> None:
        """Multiply all rows that are left."""
        for job in self.rows:
            self.multiply(job)

    def multiply(self, job: _Patches) -> None:
        """Add X^T X of the waiting rows of ``job`` to its sum."""
        if not self.rows[job]:
            return
        xp = names_of(self.rows[job][0])
        rows = placed(xp.concatenate(self.rows[job]))
        self.rows[job], self.bytes[job] = [], 0
        widths = job.widths(self.settings)
        start = 0
        for number, width in enumerate(widths):
            columns = rows[:, :, start : start + width]
            place = self.sums[job].blocks[number :: len(widths), :width, :width]
            if job.group == 1:
                matrix = names_of(rows).ascontiguousarray(columns[:, 0])
                place[0] += fetched(matrix.T @ matrix)
            else:
                matrices = columns.swapaxes(0, 1)
                place += fetched(matrices.swapaxes(1, 2) @ matrices)
            start += width


def _gathering_graph(graph: LayerGraph, jobs: list[_Patches]) -> ir.Model:
    """Return a copy of the graph whose outputs are each job's gathered pixels [indices, channels].

    The indices of job i are the input ``hessian.rows.i``, int64.
    """
    model = graph.model.clone()
    values = tensors_of(model)
    model.graph.outputs.clear()
    views: dict[tuple[str, bool], ir.Value] = {}
    for number, job in enumerate(jobs):
        key = (job.tensor, bool(job.kernel))
        if key not in views:
            views[key] = _pixels(model, values[job.tensor], job)
        name = f"hessian.rows.{number}"
        rows = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([f"rows_{number}"])
        )
        model.graph.inputs.append(rows)
        gather = ir.node("Gather", [views[key], rows], attributes={"axis": 0})
        gather.outputs[0].name = f"hessian.output.{number}"
        gather.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        views_producer = views[key].producer()
        assert views_producer is not None
        model.graph.insert_after(views_producer, gather)
        model.graph.outputs.append(gather.outputs[0])
    return model


def _pixels(model: ir.Model, tensor: ir.Value, job: _Patches) -> ir.Value:
    """Add a view [pixels, channels] of an activation, in float32, right after its producer."""
    nodes: list[ir.Node] = []
    value = tensor
    if tensor.dtype != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}))
        value = nodes[-1].outputs[0]
    if job.kernel:
        order = [0, *range(2, len(job.shape.shape)), 1]
        nodes.append(ir.node("Transpose", [value], attributes={"perm": order}))
        value = nodes[-1].outputs[0]
    shape = add_constant(
        model, f"hessian.view.{job.channels}", np.asarray([-1, job.channels], np.int64)
    )
    nodes.append(ir.node("Reshape", [value, shape]))
    producer = tensor.producer()
    if producer is not None:
        model.graph.insert_after(producer, nodes)
    else:
        model.graph.insert_before(model.graph[0], nodes)
    return nodes[-1].outputs[0]
