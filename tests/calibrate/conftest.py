"""Tiny denoisers with recorded calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec
from tests.calls.sets import call_set, samples_of
from tests.graphs import GraphBuilder, denoiser_graph


@dataclass
class Case:
    """A graph, the calls recorded for it, and a second way of looking at its activations."""

    proto: onnx.ModelProto
    spec: DenoiserSpec
    recorded: CallSet

    @property
    def graph(self) -> LayerGraph:
        return layer_graph(ir.from_proto(self.proto))

    def activations(self, names: list[str]) -> dict[str, list[list[Array]]]:
        """Return each tensor's values, by timestep and call, from calls of one sample without optimisation."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        inputs = {value.name for value in proto.graph.input}
        for name in names:
            if name not in inputs:
                proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(proto.SerializeToString(), options)
        fetched = [name for name in names if name not in inputs]
        found: dict[str, list[list[Array]]] = {name: [] for name in names}
        for k, timestep in enumerate(self.recorded.timesteps):
            for name in names:
                found[name].append([])
            for n in range(len(self.recorded.rows)):
                feed: dict[str, Any] = {"sample": samples_of(self.recorded)[k, n : n + 1]}
                if "timestep" in inputs:
                    shape = (1,) if self.spec.timestep.batched else ()
                    feed["timestep"] = np.full(shape, timestep, np.float32)
                results = dict(zip(fetched, session.run(fetched, feed))) if fetched else {}
                for name in names:
                    found[name][-1].append(results.get(name, feed.get(name)))
        return found


def case(
    builder: GraphBuilder,
    shape: tuple[int, ...],
    timesteps: int = 3,
    calls: int = 5,
    batched: bool = True,
) -> Case:
    rng = np.random.default_rng(7)
    spec = DenoiserSpec(
        name="tiny",
        source="test",
        sample=InputSpec(name="sample", shape=shape),
        timestep=InputSpec(name="timestep", batched=batched),
        scheduler={},
    )
    samples = rng.standard_normal((timesteps, calls, *shape)).astype(np.float32)
    steps = np.linspace(900, 20, timesteps).astype(np.float32)
    recorded = call_set(samples, steps, np.zeros(calls, np.int64), spec)
    return Case(builder.model(), spec, recorded)


def denoiser_case(**options: int) -> Case:
    return case(denoiser_graph(channels=16, size=7 if options.get("odd") else 8), (3, 8, 8))


def with_timestep(builder: GraphBuilder, x: str, channels: int) -> str:
    """Add the timestep to ``x`` [N, channels, ...] so that a graph has both inputs."""
    builder.input("timestep", ["N"])
    column = builder.op(
        "Unsqueeze", ["timestep", builder.weight("axes123", np.array([1, 2, 3], np.int64))], "t"
    )
    small = builder.op(
        "Mul", [column, builder.weight("small", np.asarray(0.001, np.float32))], "t_small"
    )
    return builder.op("Add", [x, small], "with_t")


def end(builder: GraphBuilder, value: str, rank: int = 4) -> None:
    """Make ``value`` an output of unknown size."""
    builder.output(value, [f"{value}_{axis}" for axis in range(rank)])
