"""Random adjoint probes: the expected output error of every scheme from a few backward passes.

For timestep t, sample n and a probe r ~ N(0, I) shaped like the output, one backward pass gives G_l
= d<r, output>/dY_l for every layer l at once. With dY_{l,s} the local error of scheme s and J_l the
Jacobian of the denoiser's output with respect to Y_l,

    E_r <G_l, dY_{l,s}>^2 = ||J_l dY_{l,s}||^2,

the output's squared error to first order, whether dY is noise or structured. The loss is the mean
of this square over samples and probes, divided by the mean of ||output||^2 over the samples, and
averaged over timesteps: the same ratio as the measured NMSE. Related: CLADO (arXiv 2307.05657),
HAWQ, MixDQ. Probes at the output need no labels, unlike a task loss; the projections, kept as
vectors, give the cross terms between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from mpq_deploy.errors import ModelError
from mpq_deploy.formats.fp8 import FP8_SCHEME, FloatGrid, operand_grids
from mpq_deploy.graph.layers import Layer, LayerUse
from mpq_deploy.models.spec import Array
from mpq_deploy.onnx_torch.adjoint import (
    UseGradients,
    gradient_bytes,
    layer_gradients,
    parts_within,
)
from mpq_deploy.onnx_torch.pass_memory import PASS_COPIES, pass_bytes
from mpq_deploy.onnx_torch.torch_graph import TorchGraph
from mpq_deploy.sensitivity.layer_weights import (
    InputRounding,
    StackStore,
    input_roundings,
    node_attributes,
)
from mpq_deploy.sensitivity.measured_calls import HELD_SHARE, MEMORY_BYTES, STACK_BYTES, Calls
from mpq_deploy.sensitivity.subject import Subject, timestep_of
from mpq_deploy.sensitivity.table import Nested, SensitivityTable, table_from_projections
from mpq_deploy.sensitivity.torch_projection import ProjectedUse, TorchStack, project_layer
from mpq_deploy.system.gpu_memory import Shrinking
from mpq_deploy.system.parallel.work import Pool, Result, Shard, Within, Work, run_shards
from mpq_deploy.system.progress import Talk


def measure_probe(subject: Subject) -> SensitivityTable:
    """Return the table of all schemes of all layers, with its projections.

    Raises UnsupportedOperator when torch cannot evaluate a node of the graph here, and ModelError
    when a float value is NaN or Inf.
    """
    calls = subject.calls()
    with subject.crew.open(subject.job("probes", _probing), subject.talk) as pool:
        batch, ends, notes = batch_plan(subject, pool, _Task(), "probes")
        tasks = (_Task(step, batch, ends) for step in range(len(calls.timesteps)))
        shards = [_shard(subject, calls, task) for task in tasks]
        results = list(run_shards(pool, "probes", shards, subject.talk, subject.store))
    power = np.array([float(result["power"]) for result in results])
    square = np.where(power > 0, power / calls.count, 1.0).astype(np.float32)[:, None, None]
    values: Nested = {name: {} for name, _ in measured_pairs(subject)}
    partial: Nested = {name: {} for name, _ in measured_pairs(subject)}
    for number, (layer, scheme) in enumerate(measured_pairs(subject)):
        both = [result["values"][number] for result in results]
        values[layer][scheme] = np.stack([one[0] for one in both]) / np.sqrt(square)
        partial[layer][scheme] = np.stack([one[1] for one in both]) / square
    return table_from_projections(calls.timesteps, values, notes, calls.turns, partial)


def _shard(subject: Subject, calls: Calls, task: _Task) -> Shard:
    """Return the shard of a timestep."""
    assert task.step_index is not None
    name = f"probes, timestep {calls.timesteps[task.step_index]:g}"
    key = {"part": "probes", "batch": task.batch, "ends": list(task.ends), "step": task.step_index}
    return subject.shard(name, task, calls.count, **key)


def _plan_shard(subject: Subject, task: Any, what: str) -> Shard:
    return subject.shard(f"{what}, size of batches", task, 0, part=f"{what}, plan")


def batch_plan(
    subject: Subject, pool: Pool, task: Any, what: str
) -> tuple[int, tuple[int, ...], tuple[str, ...]]:
    """Run ``Probing.plan`` in a worker; return its batch, ends and notes."""
    first = _plan_shard(subject, task, what)
    (plan,) = run_shards(pool, "", [first], Within.silent(subject.talk), subject.store)
    notes = tuple(str(note) for note in plan["notes"])
    return int(plan["batch"]), tuple(int(end) for end in plan["ends"]), notes


# A slice of calls, and the parts of the graph (slices of nodes) that are differentiated in turn.
Piece = tuple[slice, tuple[slice, ...]]
# Where even this many parts need more memory than the GPU has, the CPU computes.
MOST_PARTS = 64


@dataclass(frozen=True)
class _Task:
    """A timestep to probe with batches of ``batch`` calls; no timestep: plan batch and ``ends``.

    ``ends``: the node at which each part of the graph ends.
    """

    step_index: int | None = None
    batch: int = 0
    ends: tuple[int, ...] = ()


def measured_pairs(subject: Subject) -> list[tuple[str, str]]:
    """Return every (layer or attention, scheme), in the order in which projections are stacked."""
    layers = [(n.name, s.name) for n in subject.layers for s in subject.candidates[n.name].schemes]
    return [*layers, *((one.name, s) for one in subject.attentions for s in ("fp16", FP8_SCHEME))]


def _probing(subject: Subject) -> Work:
    """Return the function that computes a ``_Task``.

    A plan has ``batch``, ``ends`` and ``notes``. A timestep has ``power``, the sum of ||output||^2
    over the calls, and ``values`` float32 [pairs, 2, probes, calls]: the projections, and the sums of
    the squares of their parts. The results of ``subject.later`` go into the stores of these subjects.
    """
    calls, every = subject.calls(), (subject, *subject.later)
    pairs = [measured_pairs(one) for one in every]
    work = Shrinking(partial(Probing, subject), "probes", subject.talk)
    smaller = partial(smaller_pieces, calls)

    def compute(task: _Task, talk: Talk) -> Result:
        if task.step_index is None:
            plan = work.run(None, lambda _: (), lambda probing, _: probing.plan())[0]
            for one in subject.later:
                one.keep(_plan_shard(one, task, "probes"), plan)
            return plan
        parts = tuple(slice(start, end) for start, end in zip((0, *task.ends), task.ends))
        shape = (2, subject.settings.directions, calls.count)
        stacked = [np.zeros((len(own), *shape), np.float32) for own in pairs]
        values: list[Nested] = [{} for _ in every]
        for nested, rows, own in zip(values, stacked, pairs, strict=True):
            for row, (layer, scheme) in zip(rows, own, strict=True):
                nested.setdefault(layer, {})[scheme] = row
        step, power = task.step_index, 0.0

        def probe(probing: Probing, piece: Piece) -> float:
            return probing.probe(step, *piece, values)

        with talk.bar("probes", calls.count) as advance:
            for chunk in calls.chunks_of_step(task.batch):
                power += sum(work.run((chunk, parts), smaller, probe))
                advance(chunk.stop - chunk.start)
        results = [{"power": np.array(power), "values": rows} for rows in stacked]
        for one, result in zip(subject.later, results[1:], strict=True):
            one.keep(_shard(one, calls, task), result)
        return results[0]

    return compute


def smaller_pieces(calls: Calls, piece: Piece) -> list[Piece]:
    """Halve the calls of a piece, else each of its parts of the graph; empty at ``MOST_PARTS``."""
    chunk, parts = piece
    fewer = calls.halves(chunk)
    if fewer:
        return [(half, parts) for half in fewer]
    if len(parts) >= MOST_PARTS or all(part.stop - part.start < 2 for part in parts):
        return []
    cuts = [((part.start + part.stop) // 2, part) for part in parts]
    halves = [(slice(part.start, at), slice(at, part.stop)) for at, part in cuts]
    return [(chunk, tuple(one for pair in halves for one in pair if one.start < one.stop))]


@dataclass(frozen=True)
class _Operand:
    """A tensor that an attention rounds to FP8, treated as a use whose input and output it is."""

    attention: str
    tensor: str
    grid: FloatGrid

    @property
    def use(self) -> LayerUse:
        return LayerUse("", self.tensor, self.tensor)

    def products(self, x: Any, gradients: Any, samples: int) -> Any:
        """Return <G, error> and the sum of its rows' squares, [2, probes, samples].

        ``x``: the operand, of which a row is what its last axis holds; ``gradients`` [probes, ...].
        """
        error = (self.grid.rounded(x, torch) - x).reshape(samples, -1, x.shape[-1])
        rows = torch.einsum("nre,pnre->pnr", error, gradients.reshape(-1, *error.shape))
        return torch.stack([rows.sum(-1), rows.square().sum(-1)])


@dataclass(frozen=True)
class _Use:
    layer: Layer
    use: LayerUse
    roundings: dict[str, InputRounding]


@dataclass(frozen=True)
class _Judged:
    """What is measured of one subject: its weight errors and, by place number, its layers' uses.

    ``attentions``: whether the rounding of attention operands is measured, too.
    """

    stacks: StackStore[TorchStack]
    uses: dict[int, _Use]
    attentions: bool

    @classmethod
    def of(
        cls, subject: Subject, places: list[tuple[str, LayerUse]], device: Any, limit: int
    ) -> _Judged:
        """Read the candidates of ``subject`` for ``places``, (layer name, use) each."""
        candidates, layers = subject.candidates, {layer.name: layer for layer in subject.layers}
        make = partial(TorchStack.of, device=device)
        uses = {
            number: _Use(
                layers[name], use, input_roundings(subject.stats, use, candidates[name].schemes)
            )
            for number, (name, use) in enumerate(places)
            if name in layers
        }
        stacks = StackStore(subject.graph, candidates, make, limit)
        return cls(stacks, uses, bool(subject.attentions))


class Probing:
    """The graph in torch, and what a subject's and its ``later`` ones' inner products need."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self._settings = subject, subject.settings
        self._calls, self._output = subject.calls(), subject.spec.output
        apart = [one.name for one in subject.attentions]
        self._graph = TorchGraph(subject.graph.model, apart=apart)
        self._device = self._graph.device
        self._attributes = node_attributes(subject.graph)
        every = (subject, *subject.later)
        held = pass_bytes(self._device, STACK_BYTES)
        held = held if sum(map(_stack_bytes, every)) < HELD_SHARE * held else 0
        names = {layer.name for one in every for layer in one.layers}
        layers = [layer for layer in subject.graph.layers if layer.name in names]
        uses = [(layer.name, use) for layer in layers for use in layer.uses]
        limit = held // len(every)
        self._judged = [_Judged.of(one, uses, self._device, limit) for one in every]
        self._uses = [use for _, use in uses]
        self._operands = [
            _Operand(one.name, tensor, grid)
            for one in subject.attentions
            for tensor, grid in operand_grids(one, subject.stats).items()
        ]

    @property
    def _places(self) -> list[LayerUse]:
        return [*self._uses, *(one.use for one in self._operands)]

    @property
    def _rounded(self) -> list[int]:
        found = (
            number for own in self._judged for number, use in own.uses.items() if use.roundings
        )
        return sorted(set(found))

    def plan(self) -> Result:
        """Return ``batch`` (samples evaluated at once), ``ends`` of the graph's parts, ``notes``.

        A graph with a value that is not [samples, ...] in the order of the samples (such as the
        embedding of a scalar timestep) is evaluated one sample at a time. The graph is cut into
        parts only where one batch takes several times the allowed memory. The plan does not depend
        on which schemes are measured, so that measuring only some later gives the same bytes.
        """
        batch, ends, notes = self._plan()
        return {
            "batch": np.array(batch),
            "ends": np.array(ends, np.int64),
            "notes": np.array(notes, np.str_),
        }

    def _plan(self) -> tuple[int, tuple[int, ...], tuple[str, ...]]:
        finite = _Finite()
        with torch.no_grad():
            footprint, _ = self._graph.footprint(
                self._graph.feed(self._calls.feeds(0, self._calls.first)), finite.look
            )
        finite.refuse()
        uses = [use for layer in self._subject.graph.layers for use in layer.uses]
        places = [*uses, *(one.use for one in self._operands)]
        gradients = gradient_bytes(footprint, places, self._settings.directions, range(len(uses)))
        one, most = (
            PASS_COPIES * sum(footprint.made) + sum(gradients),
            pass_bytes(self._device, MEMORY_BYTES),
        )
        whole, parts = (len(footprint.made),), parts_within(footprint, gradients, most)
        if len(parts) > 1:
            return self._calls.fixed_batch or 1, tuple(part.stop for part in parts), ()
        if not self._calls.paired:
            return self._calls.fixed_batch or 1, whole, ()
        largest = min(self._settings.batch_size, self._calls.count)
        batch = max(1, min(largest, most // max(one, 1)))
        mixed = self._mixed(places) if batch > 1 else ""
        if mixed:
            return (
                1,
                whole,
                (f"samples were measured one by one: '{mixed}' does not keep them apart",),
            )
        return batch, whole, ()

    def _mixed(self, places: list[LayerUse]) -> str:
        """Return the first layer input or output that mixes a batch's samples; "" for none."""
        names = list(dict.fromkeys(name for use in places for name in (use.input, use.output)))
        with torch.no_grad():
            first, pair = (
                self._graph.run(self._graph.feed(self._calls.feeds(0, chunk)), keep=names)
                for chunk in (self._calls.first, slice(0, 2))
            )
            apart = _fetched([_starts_with(pair[name], first[name]) for name in names])
        return next((name for name, kept in zip(names, apart, strict=True) if not kept), "")

    def probe(
        self, step_index: int, chunk: slice, parts: Sequence[slice], values: Sequence[Nested]
    ) -> float:
        """Add a chunk's inner products to each subject's ``values``; return its ||output||^2."""
        arrays, power = self._calls.feeds(step_index, chunk), 0.0

        def seeds(output: Any) -> list[Any]:
            nonlocal power
            power = float(output.double().square().sum().cpu())
            if not np.isfinite(power):
                finite = _Finite()
                with torch.no_grad():
                    self._graph.footprint(self._graph.feed(arrays), finite.look)
                finite.refuse()
            noise = self._noise(step_index, chunk, tuple(output.shape[1:]))
            return [one.reshape(output.shape) for one in noise]

        products, _ = self._back(arrays, parts, seeds, chunk.stop - chunk.start)
        for nested, own in zip(values, products, strict=True):
            for layer, scheme, found in own:
                nested[layer][scheme][..., chunk] += found
        return power

    def run(self, arrays: Mapping[str, Array]) -> Array:
        """Return the output for the graph's inputs ``arrays``."""
        with torch.no_grad():
            output = self._graph.run(self._graph.feed(arrays))[self._output]
        return np.asarray(output.float().cpu().numpy())

    def back(
        self,
        arrays: Mapping[str, Array],
        parts: Sequence[slice],
        seeds: Callable[[Any], list[Any]],
        samples: int,
        into: Sequence[str] = (),
    ) -> tuple[list[tuple[str, str, Array]], dict[str, list[Any]]]:
        """Backpropagate the output gradients that ``seeds`` returns, one per direction.

        Returns (layer, scheme, products [2, probes, samples]) of every use (``project_layer``), and by name the
        gradients of the graph inputs ``into`` that the output depends on, one per direction.
        """
        products, back = self._back(arrays, parts, seeds, samples, into)
        return products[0], back

    def _back(
        self,
        arrays: Mapping[str, Array],
        parts: Sequence[slice],
        seeds: Callable[[Any], list[Any]],
        samples: int,
        into: Sequence[str] = (),
    ) -> tuple[list[list[tuple[str, str, Array]]], dict[str, list[Any]]]:
        """Do as ``back``, but return one list of inner products per subject."""
        feeds, timestep = self._graph.feed(arrays), timestep_of(self._subject.spec, arrays)
        feeds.update({name: feeds[name].detach().requires_grad_() for name in into})
        products = [list[tuple[str, str, Any]]() for _ in self._judged]
        back = dict[str, list[Any]]()
        for came in layer_gradients(
            self._graph, feeds, parts, self._places, {self._output: seeds}, self._rounded
        ):
            with torch.no_grad():
                if came.number < 0:
                    back[next(name for name in into if feeds[name] is came.x)] = came.rows
                elif came.number >= len(self._uses):
                    one = self._operands[came.number - len(self._uses)]
                    found = one.products(came.x, torch.stack(came.rows), samples).float()
                    for own, place in zip(self._judged, products, strict=True):
                        place += [(one.attention, FP8_SCHEME, found)] if own.attentions else []
                else:
                    for own, place in zip(self._judged, products, strict=True):
                        place += self._products(own, came, timestep, samples)
        return [_numbers(own) for own in products], back

    def _noise(self, step_index: int, chunk: slice, shape: tuple[int, ...]) -> Any:
        """Draw each sample's probes from its own seed, whatever the batch: [P, samples, ...]."""
        rows = [
            np.random.default_rng((self._settings.seed, step_index, call)).standard_normal(
                (self._settings.directions, *shape), np.float32
            )
            for call in range(chunk.start, chunk.stop)
        ]
        return torch.from_numpy(np.stack(rows, 1)).to(self._device, non_blocking=True)

    def _products(
        self, own: _Judged, came: UseGradients, timestep: float | None, samples: int
    ) -> list[tuple[str, str, Any]]:
        item = own.uses.get(came.number)
        if item is None:
            return []
        attributes = self._attributes[item.use.node]
        roundings = {form: rounding.at(timestep) for form, rounding in item.roundings.items()}
        use = ProjectedUse(item.layer, attributes, own.stacks[item.layer], roundings)
        through = torch.stack(came.through, 1) if came.through else None
        rows = torch.stack(came.rows, 1)
        found = project_layer(use, came.x, rows, through, samples)
        return [(item.layer.name, scheme, product.float()) for scheme, product in found.items()]


def _numbers(products: list[tuple[str, str, Any]]) -> list[tuple[str, str, Array]]:
    """Fetch all products in one transfer: each transfer from a GPU waits for its queue."""
    if not products:
        return []
    fetched = torch.stack([found for *_, found in products]).cpu().numpy()
    pairs = zip(products, fetched, strict=True)
    return [(layer, scheme, found) for (layer, scheme, _), found in pairs]


class _Finite:
    """Checks a forward pass for NaN and Inf; the flags stay on the device until the end."""

    def __init__(self) -> None:
        self._names, self._found = list[str](), list[Any]()

    def look(self, name: str, value: Any) -> None:
        """Check one value."""
        if value.is_floating_point():
            self._names.append(name)
            self._found.append(torch.isfinite(value).all())

    def refuse(self) -> None:
        """Raise ModelError for the first value that was not finite."""
        for name, finite in zip(self._names, _fetched(self._found), strict=True):
            if not finite:
                raise ModelError(
                    f"The float model's tensor '{name}' holds NaN or Inf on calibration inputs.",
                    "Check the model's weights and the calibration inputs.",
                )


def _fetched(flags: list[Any]) -> list[bool]:
    """Return scalar bool tensors as Python bools, with one transfer per device."""
    places = {flag.device for flag in flags}
    by_place = {
        place: iter(torch.stack([f for f in flags if f.device == place]).cpu().tolist())
        for place in places
    }
    return [bool(next(by_place[flag.device])) for flag in flags]


def _stack_bytes(subject: Subject) -> int:
    """Return the bytes of all layers' float weights and weight errors in float32."""
    forms = {
        layer: len({s.weight_form for s in subject.candidates[layer.name].schemes})
        for layer in subject.layers
    }
    return sum(4 * layer.weights * (1 + count) for layer, count in forms.items())


def _starts_with(pair: Any, first: Any) -> Any:
    """Whether the first half of ``pair`` (2 samples) is close to ``first`` (1): a bool tensor."""
    if pair.numel() != 2 * first.numel():
        return torch.zeros((), dtype=torch.bool)
    half, alone = pair.reshape(2, -1)[0].float(), first.reshape(-1).float()
    return ((half - alone).abs() <= 1e-3 * half.abs().max() + 1e-2 * alone.abs()).all()
