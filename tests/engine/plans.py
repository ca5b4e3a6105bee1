"""Small plans written as files: a denoiser graph whose layers take given schemes, for the engine tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpq_deploy.engine.builder import BatchProfile
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.candidates import weight_matrix
from mpq_deploy.formats.int4 import RequantizedInt4
from mpq_deploy.formats.integers import IntegerWeight
from mpq_deploy.formats.scheme import FP16, SCHEMES, Scheme
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.writers.deployed_graphs import FloatGraph, write_quantized
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, weight_array
from mpq_deploy.rounding.quantizers import QuantizedMatrix
from tests.graphs import denoiser_graph

FAMILIES = ("fp16", "w8a8", "w8a16", "w4a16-b32", "w4a8-b32")
SIZE = 8


@dataclass(frozen=True)
class Written:
    model: Path
    expected: ExpectedLayers


def profile(minimum: int = 1, optimum: int = 2, maximum: int = 4) -> BatchProfile:
    return BatchProfile(minimum, optimum, maximum, {"sample": (3, SIZE, SIZE), "timestep": ()})


def write_plan(folder: Path, choose: Callable[[int, Layer], str]) -> Written:
    """Write the small denoiser where layer number i takes ``choose(i, layer)``, or FP16 where it may not."""
    exported = denoiser_graph(size=SIZE).save(folder / "exported.onnx")
    model = load_model(exported)
    layers = layer_graph(model).layers
    refusal = load_target("rtx").refusal
    schemes, rewrites = {}, []
    for number, layer in enumerate(layers):
        scheme = SCHEMES[choose(number, layer)]
        if refusal(layer, scheme) or scheme.weight.block(layer) is None:
            scheme = FP16
        schemes[layer.name] = scheme
        matrix = rounded(weight_matrix(layer, weight_array(model, layer)), layer, scheme)
        rewrites.append(LayerRewrite(layer, scheme, matrix))
    scales = {tensor: 0.05 for layer in layers for tensor in layer.inputs}
    total = write_quantized(FloatGraph(exported, "timestep", "sample"), rewrites, scales, folder)
    return Written(folder / "model.onnx", ExpectedLayers.of(layers, schemes, total))


def rounded(weight: np.ndarray, layer: Layer, scheme: Scheme) -> QuantizedMatrix | None:
    """Plain rounding to the nearest code: what matters here is the form, not the error."""
    if not isinstance(scheme.weight, IntegerWeight):
        return None
    blocks = layer.reduction // (scheme.weight.block(layer) or layer.reduction)
    width = layer.reduction // blocks
    amax = np.abs(weight.reshape(layer.out_channels, blocks, width)).max(axis=2)
    scale = np.maximum(amax / scheme.weight.precision.quant_max, 1e-5).astype(np.float16)
    channel = None
    if isinstance(scheme.weight, RequantizedInt4):
        channel = np.maximum(scale.max(axis=1) / 15, 1e-5).astype(np.float16)
        multiple = np.maximum(np.rint(scale / channel[:, None].astype(np.float32)), 1)
        scale = (multiple * channel[:, None]).astype(np.float16)
    codes = np.rint(weight / np.repeat(scale.astype(np.float32), width, axis=1))
    codes = np.clip(
        codes, scheme.weight.precision.quant_min, scheme.weight.precision.quant_max
    ).astype(np.int8)
    return QuantizedMatrix(codes, scale, channel)
