"""The error that each output channel of a layer causes at the denoiser's output.

With the probes of ``probe``, G_l = d<r, output>/dY_l, the error of output channel c of layer l
under the INT4 body is <G_{l,c}, dY_{l,c}>^2. Over positions of random signs its expectation is
proportional to ||G_{l,c}||^2 ||dY_{l,c}||^2, which hardly varies from probe to probe and is what is
summed over the calls: it ranks channels as well as the squares of three times as many calls do. Our
choice; MPQ-DM ranks channels by the kurtosis of the weight's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.formats.candidates import LayerCandidates
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array
from mpq_deploy.onnx_torch.adjoint import gradient_bytes, layer_gradients, parts_within
from mpq_deploy.onnx_torch.pass_memory import PASS_COPIES, WHOLE_SHARE, pass_bytes
from mpq_deploy.onnx_torch.torch_graph import TorchGraph
from mpq_deploy.sensitivity.layer_weights import Kept, float_matrix, node_attributes
from mpq_deploy.sensitivity.measured_calls import MEMORY_BYTES, SALIENCE_BATCH, Calls
from mpq_deploy.sensitivity.torch_projection import (
    apply_matrix,
    canonical_gradients,
    canonical_input,
)
from mpq_deploy.system.gpu_memory import Shrinking
from mpq_deploy.system.progress import Advance, Talk

# Seed of the probes' noise.
SEED = 0


def channel_errors(
    graph: LayerGraph,
    bodies: Mapping[str, Array],
    recorded: RecordedCalls,
    samples: int,
    talk: Talk,
) -> dict[str, Array]:
    """Return layer name -> float64 [O]: the error that each output channel of its body causes.

    ``bodies``: layer name -> the body's dequantized weight, float32 [out_channels, reduction];
    ``samples``: calls per timestep. Raises UnsupportedOperator when torch cannot evaluate the
    graph.
    """
    errors = ChannelErrors(graph, bodies, recorded, samples, talk)
    sums = {layer.name: np.zeros(layer.out_channels) for layer in errors.layers}
    with talk.bar("salient channels", errors.steps * errors.calls) as advance:
        for step in range(errors.steps):
            for name, parts in errors.at(step, advance).items():
                for part in parts:
                    sums[name] += part
    return sums


class ChannelErrors:
    """The terms that ``channel_errors`` sums, by timestep; same arguments and errors."""

    def __init__(
        self,
        graph: LayerGraph,
        bodies: Mapping[str, Array],
        recorded: RecordedCalls,
        samples: int,
        talk: Talk,
    ) -> None:
        # ``in`` on a mapping that reads files would read the layer's file.
        names = set(bodies)
        self.layers = [layer for layer in graph.layers if layer.name in names]
        self._calls = Calls(graph, recorded, samples)
        opened = partial(_OnDevice, graph, bodies, self.layers, self._calls)
        self._work = Shrinking(opened, "salient channels", talk)
        (self._batch,) = self._work.run(None, lambda _: (), lambda device, _: device.batch)
        self.steps, self.calls = len(self._calls.timesteps), self._calls.count

    def at(self, step: int, advance: Advance) -> dict[str, Array]:
        """Return layer name -> float64 [n, O]: the n terms of a timestep, in summing order."""
        errors: dict[str, list[Array]] = {layer.name: [] for layer in self.layers}
        for chunk in self._calls.chunks_of_step(self._batch):
            for found in self._work.run(
                chunk, self._calls.halves, lambda device, part: device.errors(step, part)
            ):
                for name, error in found:
                    errors[name].append(error)
            advance(chunk.stop - chunk.start)
        return {name: np.stack(parts) for name, parts in errors.items() if parts}


class _OnDevice:
    """The graph and the layers' weight errors on torch's device; ``batch``: calls run at once."""

    def __init__(
        self,
        graph: LayerGraph,
        bodies: Mapping[str, Array],
        layers: list[Layer],
        calls: Calls,
    ) -> None:
        self._calls, self._uses = calls, [(layer, use) for layer in layers for use in layer.uses]
        self._graph = TorchGraph(graph.model, torch.float32)
        device = self._graph.device
        memory = pass_bytes(device, MEMORY_BYTES)

        def difference(layer: Layer) -> Any:
            return torch.from_numpy(bodies[layer.name] - float_matrix(graph, layer))[None].to(
                device
            )

        self._differences: Kept[Any] = Kept(difference, lambda held: int(held.nbytes), memory)
        self._attributes = node_attributes(graph)
        with torch.no_grad():
            feeds = self._graph.feed(calls.feeds(0, calls.first))
            footprint, _ = self._graph.footprint(feeds, lambda *_: None)
        gradients = gradient_bytes(footprint, (use for _, use in self._uses), 1)
        self._parts = parts_within(footprint, gradients, memory)
        # A batch of several calls may take no more memory than one call may.
        most = max(1, WHOLE_SHARE * memory // max(1, PASS_COPIES * sum(footprint.made)))
        self.batch = calls.fixed_batch or min(SALIENCE_BATCH, calls.count, most)

    def errors(self, step: int, chunk: slice) -> list[tuple[str, Array]]:
        """Return (layer name, float64 [O]) per use of a layer, summed over a chunk of calls."""

        def direction(output: Any) -> list[Any]:
            random = np.random.default_rng((SEED, step, chunk.start))
            noise = random.standard_normal(tuple(output.shape), np.float32)
            return [torch.from_numpy(noise).to(output.device, non_blocking=True)]

        feeds = self._graph.feed(self._calls.feeds(step, chunk))
        nodes, directions = [use for _, use in self._uses], {self._calls.spec.output: direction}
        names, found = list[str](), list[Any]()
        for came in layer_gradients(self._graph, feeds, self._parts, nodes, directions):
            layer, use = self._uses[came.number]
            with torch.no_grad():
                attributes, difference = self._attributes[use.node], self._differences[layer]
                names.append(layer.name)
                found.append(_by_channel(layer, attributes, came.x, came.rows[0], difference))
        if not found:
            return []
        # One transfer for all layers: each transfer from a GPU waits for its queue.
        ends = np.cumsum([len(one) for one in found])[:-1]
        return list(zip(names, np.split(torch.cat(found).cpu().numpy(), ends), strict=True))


def _by_channel(
    layer: Layer, attributes: dict[str, Any], x: Any, gradient: Any, difference: Any
) -> Any:
    """Return the sum over samples of ||G_c||^2 ||dY_c||^2, a float64 tensor [O].

    A tensor that all samples share, such as an embedding computed once, counts as one sample.
    """
    rows = x.shape[0]
    errors = apply_matrix(layer, attributes, canonical_input(layer, x, rows), difference)
    g = canonical_gradients(layer, gradient[:, None], rows)
    energies = [
        one.square().reshape(len(one), layer.out_channels, -1).sum(-1) for one in (errors, g)
    ]
    return (energies[0].double() * energies[1].double()).sum(0)


def body_weights(candidates: Mapping[str, LayerCandidates]) -> Mapping[str, Array]:
    """Return layer -> the INT4 body's dequantized weight, for layers with a ``rows`` scheme.

    Each weight is read when it is indexed.
    """
    forms = {}
    for name, candidate in candidates.items():
        scheme = next((s for s in candidate.schemes if s.branch.promotes), None)
        if scheme is not None:
            forms[name] = scheme.body.weight_form
    return _Bodies(candidates, forms)


class _Bodies(Mapping[str, Array]):
    def __init__(self, candidates: Mapping[str, LayerCandidates], forms: Mapping[str, str]) -> None:
        self._candidates, self._forms = candidates, forms

    def __getitem__(self, name: str) -> Array:
        return self._candidates[name].weight_matrix(self._forms[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)
