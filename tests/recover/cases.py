"""A tiny denoiser with every scheme's codes, as training starts from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.candidates import (
    LayerCandidates,
    choices_for,
    round_candidates,
    weight_matrix,
    with_promoted_rows,
)
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.ranges import RANGE_KINDS
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.formats.sizes import input_channels
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.writers.quantize_layers import bias_refusals, weight_array
from mpq_deploy.models.spec import DenoiserSpec, FloatModel, InputSpec
from mpq_deploy.recover.recover import RecoverTask
from mpq_deploy.recover.trained_weights import StartingWeight
from mpq_deploy.recover.training_trajectories import TrajectoryRecorder
from mpq_deploy.rounding.quantizers import Rounding
from tests.calls.sets import call_set
from tests.graphs import GraphBuilder, denoiser_graph
from tests.tiny_models import tiny_scheduler

STEPS = 4
# Few of the many.
SIMULATED_FORMS = (
    "w2a4-sim",
    "w3a6-sim+omq",
    "w3a6-sim",
    "w3a6-sim+zres",
    "w2a16-sim",
    "w2a16-sim+zres",
    "w8a8-sim",
)


@dataclass(frozen=True)
class Case:
    """An exported model with what ``recover`` takes."""

    task: RecoverTask
    candidates: dict[str, LayerCandidates]

    def recorder(self) -> TrajectoryRecorder:
        return TrajectoryRecorder(FloatModel(self.task.model, self.task.spec, {}), STEPS, "auto")

    def planned(self, wanted: str) -> RecoverTask:
        """Every layer takes ``wanted`` (family, or family+branch) where it can; FP16 where it cannot."""
        starts = []
        for layer in self.task.graph.layers:
            candidate = self.candidates[layer.name]
            scheme = next((s for s in candidate.schemes if _matches(s, wanted)), SCHEMES["fp16"])
            starts.append(
                StartingWeight(
                    layer, scheme, candidate.forms.get(scheme.weight_form), candidate.weight
                )
            )
        return replace(self.task, starts=starts)


def normed_denoiser() -> GraphBuilder:
    """A denoiser whose norm can take the factors of the three products that read it; no other layer's input can."""
    g = GraphBuilder()
    g.input("sample", ["N", 3, 8, 8])
    g.input("timestep", ["N"])
    x = g.conv("sample", "conv_in", 32, 3)
    column = g.op("Unsqueeze", ["timestep", g.weight("ax", np.array([1, 2, 3], np.int64))], "t4")
    x = g.op(
        "Add",
        [x, g.op("Mul", [column, g.weight("slow", np.asarray(1e-3, np.float32))], "t_scaled")],
        "timed",
    )
    tokens = g.op(
        "Transpose",
        [g.op("Reshape", [x, g.weight("flat", [0, 32, 64])], "flat_x")],
        "tokens",
        perm=[0, 2, 1],
    )
    rng = np.random.default_rng(3)
    gain, bias = (
        g.weight(f"norm.{n}", rng.uniform(0.5, 1.5, 32).astype(np.float32))
        for n in ("weight", "bias")
    )
    normed = g.op("LayerNormalization", [tokens, gain, bias], "norm", axis=-1)
    mixed = [g.matmul(normed, f"to_{n}", 32, 32) for n in "abc"]
    mixed = g.op("Add", [g.op("Mul", mixed[:2], "gate"), mixed[2]], "mix")
    back = g.op(
        "Reshape",
        [g.op("Transpose", [mixed], "back", perm=[0, 2, 1]), g.weight("map", [0, 32, 8, 8])],
        "image",
    )
    g.conv(back, "conv_out", 3, 32)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 3, 8, 8])
    return g


def _matches(scheme: Scheme, wanted: str) -> bool:
    body, _, branch = wanted.partition("+")
    kind = next((k for k in RANGE_KINDS if body.endswith(k)), "")
    family = body.removesuffix(f"-{kind}") if kind else body
    same = scheme.series == family and scheme.range.kind == kind
    return same and scheme.branch.suffix == (branch and f"+{branch}")


def make_case(folder: Path, graph: GraphBuilder | None = None, **spec: Any) -> Case:
    builder = graph or denoiser_graph(channels=32, size=8)
    path = builder.save(folder / "model.onnx")
    layers = layer_graph(load_model(path))
    refusals = bias_refusals(layers.model, layers.layers)

    def refusal(layer: Layer, scheme: Scheme) -> str:
        return refusals[layer.name] if scheme.branch or scheme.range.moves else ""

    candidates = {}
    wanted = tuple(s for s in SCHEMES.values() if not s.simulated or s.name in SIMULATED_FORMS)
    for number, layer in enumerate(layers.layers):
        rng = np.random.default_rng(number)
        x = rng.standard_normal((2 * layer.reduction, layer.reduction)).astype(np.float32)
        moments = np.stack([x.T @ x / len(x)] * layer.group)
        made = round_candidates(
            layer,
            choices_for(layer, wanted, refusal),
            weight_matrix(layer, weight_array(layers.model, layer)),
            InputMoments(
                moments,
                (layer.reduction,),
                outliers=outlier_order(layer),
                factors=np.tile(factors_of(layer), (len(TENTHS), 1)),
                amax=np.ones(layer.reduction),
            ),
            Rounding(gptq=True, damping=0.01, refinements=1),
        )
        candidates[layer.name] = with_promoted_rows(
            made, rng.permutation(layer.out_channels).astype(np.int32)
        )
    shape = (3, 8, 8)
    described: dict[str, Any] = {
        "prediction_type": "epsilon",
        "scheduler": tiny_scheduler(),
        **spec,
    }
    task = RecoverTask(
        path,
        layers,
        DenoiserSpec(
            name="tiny",
            source="test",
            sample=InputSpec(name="sample", shape=shape),
            timestep=InputSpec(name="timestep"),
            **described,
        ),
        [],
        call_set(
            np.random.default_rng(1).standard_normal((2, 2, *shape)).astype(np.float32),
            np.array([900.0, 100.0], np.float32),
            np.zeros(2, np.int64),
        ),
        CalibrationStats({t: _stats(layers.layers, t) for t in layers.activations}),
    )
    return Case(task, candidates)


def outlier_order(layer: Layer) -> Any:
    return (
        np.random.default_rng(input_channels(layer))
        .permutation(input_channels(layer))
        .astype(np.int32)
    )


def factors_of(layer: Layer) -> Any:
    rng = np.random.default_rng(input_channels(layer))
    return np.exp(0.3 * rng.standard_normal(input_channels(layer))).astype(np.float16)


def _stats(layers: tuple[Layer, ...], tensor: str) -> ActivationStats:
    layer = next(layer for layer in layers if tensor in layer.inputs)
    channels = np.ones(input_channels(layer) * layer.group)
    outliers = (
        outlier_order(layer) if layer.group == 1 else np.arange(len(channels), dtype=np.int32)
    )
    scale = float(np.float16(0.03))
    return ActivationStats(
        channels,
        channels,
        channels,
        np.ones(4, np.float32),
        127 * scale * np.array([[1.0], [0.5]], np.float32) * channels,
        scale,
        outliers,
        np.array([np.float16(0.025), np.float16(0.02)], np.float64),
        np.tile(factors_of(layer), (len(TENTHS), layer.group)),
        np.full(len(TENTHS), np.float16(0.035), np.float64),
        4,
        np.array([900.0, 100.0], np.float32),
        np.arange(len(TENTHS), dtype=np.int32),
    )
