"""The denoiser at a smaller sample, to measure on: a second graph over the weights of the first.

Convolutions cost by the sample's area and attention by its square, weights do not change: where one call of the model
is dear, the sensitivities of its layers may be taken at a part of the sample. Calls are the centres of what calibration
recorded: a crop keeps the noise as it is. Our choice. The losses are right for the smaller sample, but layers of low
resolution count more in it than in the whole one (docs/results/side.md), so that fewer calls at the full size are
better wherever one call is affordable.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.spec import DenoiserSpec

SMALLER = "smaller.onnx"


def smaller_spec(spec: DenoiserSpec, side: int) -> DenoiserSpec:
    """Return ``spec`` for samples of height and width ``side``. Raises UsageError where that is no smaller."""
    shape = spec.sample.shape
    if len(shape) < 3 or spec.timestep is None:
        raise UsageError(
            f"measure.side is for samples with a height and a width; here they have the shape {list(shape)}.",
            "Leave measure.side out.",
        )
    if side >= min(shape[-2:]):
        raise UsageError(
            f"measure.side is {side}, which is no smaller than the model's samples {list(shape)}.",
            f"Give less than {min(shape[-2:])}, or leave it out.",
        )
    return spec.model_copy(update={"sample": spec.sample.model_copy(update={"shape": (*shape[:-2], side, side)})})


def smaller_denoiser(denoiser: Denoiser, side: int) -> Denoiser:
    """Return ``denoiser`` for samples of height and width ``side``, over the same weights.

    Raises UsageError where the network's graph has one size.
    """
    spec = smaller_spec(denoiser.spec, side)
    return replace(denoiser, spec=spec, network=denoiser.network.resized(spec.sample))


def share_weights(model: ir.Model, whole: Path) -> None:
    """Let the constants of ``model`` that those of the file ``whole`` equal lie where they lie there.

    Raises ModelError when the layers are not those of ``whole``: the weights of some models depend on the size.
    """
    others = load_model(whole).graph.initializers
    for name, value in model.graph.initializers.items():
        own, other = value.const_value, others[name].const_value if name in others else None
        if own is None or not isinstance(other, ir.ExternalTensor):
            continue
        if own.dtype == other.dtype and own.shape == other.shape and np.array_equal(own.numpy(), other.numpy()):
            value.const_value = ir.ExternalTensor(
                other.location,
                other.offset,
                other.length,
                other.dtype,
                shape=other.shape,
                name=name,
                base_dir=whole.parent,
            )


def require_alike(smaller: LayerGraph, whole: LayerGraph) -> None:
    """Raise ModelError unless both graphs hold the same layers in the same order."""
    layers = [(layer.name, layer.weight_shape, len(layer.uses)) for layer in smaller.layers]
    if layers != [(layer.name, layer.weight_shape, len(layer.uses)) for layer in whole.layers]:
        raise ModelError(
            "At measure.side the model's layers are not those that it has at its own size.",
            "Leave measure.side out: this model cannot be measured at another size.",
        )
