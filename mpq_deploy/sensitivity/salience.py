"""The error that each output channel of a layer causes at the denoiser's output.

With the probes of ``probe``, G_l = d<r, output>/dY_l, the error of output channel c of layer l
under the INT4 body is estimated as the mean of <G_{l,c}, dY_{l,c}>^2: the same quantity as a
scheme's loss, channel by channel, without the terms between channels. Our choice; MPQ-DM ranks by
the kurtosis of the weight's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.formats.candidates import LayerCandidates
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array
from mpq_deploy.onnx_torch.adjoint import layer_gradients, parts_within
from mpq_deploy.onnx_torch.pass_memory import PASS_COPIES, WHOLE_SHARE
from mpq_deploy.onnx_torch.torch_graph import TorchGraph
from mpq_deploy.sensitivity.layer_weights import Kept, float_matrix, node_attributes
from mpq_deploy.sensitivity.measured_calls import MEMORY_BYTES, SALIENCE_BATCH, Calls
from mpq_deploy.sensitivity.torch_projection import (
    apply_matrix,
    canonical_gradients,
    canonical_input,
)
from mpq_deploy.system.progress import Advance, Talk

# Of the probes' noise.
SEED = 0


def channel_errors(
    graph: LayerGraph,
    bodies: Mapping[str, Array],
    recorded: RecordedCalls,
    samples: int,
    talk: Talk,
) -> dict[str, Array]:
    """Return layer name -> float64 [O]: the error that each output channel of its body causes.

    ``bodies``: layer name -> the body's deployed weight, float32 [out_channels, reduction];
    ``samples``: calls of each timestep. Raises
    UnsupportedOperator when torch cannot evaluate the graph.
    """
    errors = ChannelErrors(graph, bodies, recorded, samples)
    sums = {layer.name: np.zeros(layer.out_channels) for layer in errors.layers}
    with talk.bar("salient channels", errors.steps * errors.calls) as advance:
        for step in range(errors.steps):
            for name, parts in errors.at(step, advance).items():
                for part in parts:
                    sums[name] += part
    return sums


class ChannelErrors:
    """The sums that ``channel_errors`` adds up, timestep by timestep; its arguments and errors."""

    def __init__(
        self, graph: LayerGraph, bodies: Mapping[str, Array], recorded: RecordedCalls, samples: int
    ) -> None:
        # To ask a mapping that reads files whether it holds a layer would read it.
        names = set(bodies)
        self.layers = [layer for layer in graph.layers if layer.name in names]
        self._output = recorded.spec.output
        self._calls = Calls(graph, recorded, samples)
        self._graph = TorchGraph(graph.model, torch.float32)
        self._differences: Kept[Any] = Kept(
            lambda layer: torch.from_numpy(bodies[layer.name] - float_matrix(graph, layer))[None],
            lambda difference: int(difference.nbytes),
            MEMORY_BYTES,
        )
        self._attributes = node_attributes(graph)
        with torch.no_grad():
            feeds = self._graph.feed(self._calls.feeds(0, self._calls.first))
            footprint, _ = self._graph.footprint(feeds, lambda *_: None)
        self._parts = parts_within(footprint, 0, MEMORY_BYTES)
        # One batch of several takes no more than one call may.
        most = max(1, WHOLE_SHARE * MEMORY_BYTES // max(1, PASS_COPIES * sum(footprint.made)))
        self._batch = self._calls.fixed_batch or min(SALIENCE_BATCH, self._calls.count, most)
        self.steps, self.calls = len(self._calls.timesteps), self._calls.count

    def at(self, step: int, advance: Advance) -> dict[str, Array]:
        """Return the terms of a timestep's sum in their order: layer name -> float64 [n, O]."""
        uses = [(layer, use) for layer in self.layers for use in layer.uses]
        nodes = [use for _, use in uses]
        errors: dict[str, list[Array]] = {layer.name: [] for layer in self.layers}
        for chunk in self._calls.chunks_of_step(self._batch):

            def direction(output: Any, seed: Any = (SEED, step, chunk.start)) -> list[Any]:
                return [
                    torch.from_numpy(
                        np.random.default_rng(seed).standard_normal(tuple(output.shape), np.float32)
                    )
                ]

            feeds = self._graph.feed(self._calls.feeds(step, chunk))
            for came in layer_gradients(
                self._graph, feeds, self._parts, nodes, {self._output: direction}
            ):
                layer, use = uses[came.number]
                with torch.no_grad():
                    attributes, difference = self._attributes[use.node], self._differences[layer]
                    errors[layer.name].append(
                        _by_channel(layer, attributes, came.x, came.rows[0], difference)
                    )
            advance(chunk.stop - chunk.start)
        return {name: np.stack(parts) for name, parts in errors.items() if parts}


def _by_channel(
    layer: Layer, attributes: dict[str, Any], x: Any, gradient: Any, difference: Any
) -> Array:
    """Return the sum over samples of <G_c, dY_c>^2, float64 [O].

    Rows of a tensor that all samples share (an embedding computed once) count as one sample.
    """
    rows = x.shape[0]
    errors = apply_matrix(layer, attributes, canonical_input(layer, x, rows), difference)
    g = canonical_gradients(layer, gradient[:, None], rows)
    products = (errors * g).reshape(rows, layer.out_channels, -1).sum(-1)
    return np.asarray(products.double().square().sum(0).numpy())


def body_weights(candidates: Mapping[str, LayerCandidates]) -> Mapping[str, Array]:
    """Return the INT4 body's weight of every layer with a ``rows`` scheme, dequantized on demand."""
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
