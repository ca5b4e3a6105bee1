"""What the sensitivity tests share: candidates by plain rounding, and a measured setting around a tiny graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.graph.layers import Layer, LayerGraph, layer_graph
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from mpq_deploy.sensitivity.layer_weights import float_matrix
from tests.calls.sets import call_set, samples_of
from tests.graphs import GraphBuilder

NAMES = (
    "fp16",
    "w8a8",
    "w8a16",
    "w4a16-b32",
    "w4a8-b32",
    "w8a8+cols1",
    "w4a8-b32+cols1",
    "w8a8+scale5",
)
# Ranges that move, alone and with factors: the weights of w8a8 and of w8a8+scale5.
NAMES = (
    *NAMES,
    *(f"w8a8-{kind}{more}" for kind in ("timestep", "dynamic") for more in ("", "+scale5")),
)
# One weight form behind two activation forms, and two behind one.
NAMES = (*NAMES, "w5a16-sim", "w5a7-sim", "w6a7-sim")
ROWS = tuple(f"{body}+rows{tenths}" for body in ("w4a16-b32", "w4a8-b32") for tenths in (1, 2, 3))


@dataclass(frozen=True)
class Rounded:
    """Candidates by rounding to the nearest: per channel, INT4 in blocks of 32 (rows where they do not divide)."""

    layer: Layer
    schemes: tuple[Scheme, ...]
    weight: Any

    def weight_matrix(self, form: str) -> Any:
        if form == "fp16":
            return self.weight.astype(np.float16).astype(np.float32)
        if "+rows" in form:
            whole = self.weight_matrix(form.split("+")[0])
            whole[self.promoted(form)] = self.weight_matrix("int8")[self.promoted(form)]
            return whole
        bits = int(form[3:]) if form.startswith("sim") else 8 if form.startswith("int8") else 4
        width = self.weight.shape[1]
        block = width if bits != 4 or width % 32 else 32
        blocks = self.weight.reshape(len(self.weight), -1, block)
        top = 2 ** (bits - 1) - 1
        scale = np.maximum(np.abs(blocks).max(-1, keepdims=True) / top, 1e-12)
        return (np.rint(blocks / scale) * scale).reshape(self.weight.shape).astype(np.float32)

    def promoted(self, form: str) -> Any:
        """One, two or three channels (of three or more), from an order of their own."""
        tenths = int(form.split("+rows")[1])
        order = np.random.default_rng(len(self.weight)).permutation(len(self.weight))
        return np.sort(order[: min(tenths, len(order))])


@dataclass
class Setting:
    """Everything that a metric takes, before the options and the talk."""

    graph: LayerGraph
    candidates: dict[str, Rounded]
    stats: CalibrationStats
    calibration: CallSet
    spec: DenoiserSpec
    model: onnx.ModelProto = field(repr=False)

    def __iter__(self) -> Iterator[Any]:
        yield from (
            self.graph,
            self.candidates,
            self.stats,
            self.calibration,
            self.spec,
        )

    def feeds(self, step: int) -> dict[str, Any]:
        samples = samples_of(self.calibration)[step]
        feeds = {"sample": samples}
        if self.spec.timestep.batched:
            feeds["timestep"] = np.full(len(samples), self.calibration.timesteps[step], np.float32)
        else:
            feeds["timestep"] = np.array(self.calibration.timesteps[step], np.float32)
        return feeds

    def values(self, step: int, names: list[str]) -> dict[str, Any]:
        """Values of the float graph, by ONNX Runtime."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        known = {v.name for v in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        declared = {v.name for v in session.get_inputs()}
        feeds = {n: v for n, v in self.feeds(step).items() if n in declared}
        asked = [n for n in names if n not in feeds]
        return {**feeds, **dict(zip(asked, session.run(asked, feeds)))}


def setting(
    builder: GraphBuilder,
    shape: tuple[int, ...],
    steps: int = 2,
    calls: int = 3,
    batched_time: bool = True,
) -> Setting:
    model = builder.model()
    graph = layer_graph(ir.from_proto(model))
    schemes = tuple(SCHEMES[name] for name in NAMES)
    random = np.random.default_rng(7)
    spec = DenoiserSpec(
        name="tiny",
        source="test",
        sample=InputSpec(name="sample", shape=shape),
        timestep=InputSpec(name="timestep", batched=batched_time),
        scheduler={},
    )
    calibration = call_set(
        random.standard_normal((steps, calls, *shape)).astype(np.float32),
        np.linspace(800, 20, steps).astype(np.float32),
        np.zeros(calls, np.int64),
        spec,
    )
    rows = tuple(SCHEMES[name] for name in ROWS)
    candidates = {
        n.name: Rounded(
            n, schemes + rows * (n.out_channels > 2 and n.group == 1), float_matrix(graph, n)
        )
        for n in graph.layers
    }
    made = Setting(graph, candidates, CalibrationStats({}), calibration, spec, model)
    tensors = list(graph.activations)
    seen = [made.values(step, tensors) for step in range(steps)]
    reservoirs = {
        name: np.concatenate([np.ravel(values[name]) for values in seen]) for name in tensors
    }
    tops = {name: float(np.abs(values).max()) for name, values in reservoirs.items()}
    empty = np.zeros(1, np.float32)
    channels = {t: _channels(n) for n in graph.layers for t in n.inputs}
    # Each timestep is said to reach half as far as the one before: FP16 holds such ratios.
    by_step = np.float32(0.5) ** np.arange(steps)
    # Without its first channel a tensor is said to reach only two thirds as far: rounding then differs visibly.
    made.stats = CalibrationStats(
        {
            name: ActivationStats(
                np.array([top]),
                *[empty] * 2,
                reservoir=reservoirs[name],
                amax_by_timestep=top * by_step[:, None] * np.ones((1, channels[name])),
                scale=top / 127,
                outliers=np.roll(np.arange(channels[name], dtype=np.int32), 1),
                scales_without=np.array([top / 187, top / 200]),
                factors=np.tile(
                    np.linspace(0.5, 2, channels[name], dtype=np.float16), (len(TENTHS), 1)
                ),
                scales_rescaled=np.full(len(TENTHS), top / 170),
                count=float(len(reservoirs[name])),
                timesteps=calibration.timesteps,
                exponents=np.arange(len(TENTHS), dtype=np.int32),
            )
            for name, top in tops.items()
        }
    )
    return made


def moved_scale(kind: Scheme, scale: float, step: int, seen: Any, axes: tuple[int, ...]) -> Any:
    """What ``scale`` is at a timestep of ``setting``, or for the values ``seen``: 127 steps up to their largest.

    The inverse of the widest range is a constant in FP16, and at most 128 times as wide as any.
    """
    if "-timestep" in kind.name:
        return np.float32(scale * 0.5**step)
    if "-dynamic" in kind.name:
        inverse = np.float32(np.float16(1 / (127 * scale)))
        ratio = np.abs(seen).max(axis=axes, keepdims=True) * inverse
        return np.float32(scale) * np.maximum(ratio, 1 / 128)
    return np.float32(scale)


def _channels(layer: Layer) -> int:
    """Channels of the layer's input, of all groups together."""
    return layer.weight_shape[1 - layer.out_axis] * layer.group
