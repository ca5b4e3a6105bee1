"""Plans of FP8 and FP4 written as files: any graph whose layers take given schemes, rounded as a run rounds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.candidates import choices_for, round_candidates, weight_matrix
from mpq_deploy.formats.fp8 import FloatGrid
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.nvfp4 import DynamicBlocks
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.writers.deployed_graphs import FloatGraph, write_quantized
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, weight_array
from mpq_deploy.rounding.quantizers import Rounding
from tests.engine.plans import Written

GRIDS: dict[str, ActivationGrid] = {
    "": ActivationGrid(0.05),
    "+e4m3": FloatGrid(0.02),
    "+nvfp4": DynamicBlocks(0.002),
}


def write_floats(
    exported: Path,
    folder: Path,
    choose: Callable[[int, Layer], str],
    target: str = "rtx-blackwell",
    names: tuple[str, str] = ("timestep", "sample"),
) -> Written:
    """Write the graph of ``exported`` where layer number i takes ``choose(i, layer)``, or FP16 where it may not."""
    model = load_model(exported)
    layers = layer_graph(model).layers
    schemes, rewrites, scales = {}, [], {}
    for number, layer in enumerate(layers):
        scheme = taken(layer, SCHEMES[choose(number, layer)], target)
        schemes[layer.name] = scheme
        matrix = rounded(weight_matrix(layer, weight_array(model, layer)), layer, scheme)
        rewrites.append(LayerRewrite(layer, scheme, matrix))
        for tensor in layer.inputs if scheme.activation else ():
            scales[tensor + scheme.activation_form] = GRIDS[scheme.activation_form]
    dialect = dialect_named(load_target(target).dialect)
    total = write_quantized(FloatGraph(exported, *names), rewrites, scales, folder, dialect)
    return Written(folder / "model.onnx", ExpectedLayers.of(layers, schemes, total))


def taken(layer: Layer, scheme: Scheme, target: str) -> Scheme:
    """The scheme, or FP16 where the layer may not take it."""
    return choices_for(layer, (scheme,), load_target(target).refusal).schemes[-1]


def rounded(weight: np.ndarray, layer: Layer, scheme: Scheme) -> object:
    """The deployed matrix, rounded to nearest; None for FP16."""
    inputs = InputMoments(np.ones((layer.group * layer.reduction, 1, 1)), (1,) * layer.reduction)
    choices = choices_for(layer, (scheme,), lambda *_: "")
    found = round_candidates(layer, choices, weight, inputs, Rounding(False, 0.05))
    return found.forms.get(scheme.weight_form)
