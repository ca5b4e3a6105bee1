"""Pass: give each layer the Q/DQ nodes of its scheme, in forms that stay packed.

1. FP16: nothing.
2. Quantized activations: one QuantizeLinear/DequantizeLinear pair per activation tensor and form,
   shared by all its readers, directly on their inputs; factors of its channels before it (see
   ``prescale``).
3. Weights and branches: what the scheme's format and branch write (see ``formats``). Branches stand
   on the activation side, where TensorRT keeps both parts packed: it rebuilds a weight that is the
   sum or concatenation of dequantized ones at each call, or fails to build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.formats.interfaces import ActivationGrid, DeployedMatrix, Scheme
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.graph.writers.node_writer import LayerWriter, NodeWriter
from mpq_deploy.graph.writers.prescale import fold_factors, foldable_inputs, multiply_channels
from mpq_deploy.models.spec import Array


@dataclass(frozen=True)
class LayerRewrite:
    """What a layer becomes: its scheme and its codes (None for FP16)."""

    layer: Layer
    scheme: Scheme
    matrix: DeployedMatrix | None

    @property
    def factors(self) -> Array | None:
        """By what the input's channels are multiplied, float16 [C]; None for none."""
        return None if self.matrix is None else self.scheme.branch.factors_in(self.matrix)


def quantize_layers(
    model: ir.Model,
    rewrites: list[LayerRewrite],
    activation_scales: Mapping[str, float | ActivationGrid],
    simulating: bool = False,
) -> tuple[ir.Model, bool]:
    """Rewrite ``model`` in place; return it and whether anything changed.

    ``activation_scales``: activation tensor (followed by the scheme's ``activation_form``) -> its
    quantizer, or the scale of one of INT8, for every input of a layer with quantized activations.
    ``simulating``: as for ``NodeWriter``.
    """
    nodes = {node.name: node for node in model.graph}
    pairs: dict[str, ir.Value] = {}
    changed = False
    folded = _fold_factors(model, rewrites)
    for rewrite in rewrites:
        if rewrite.matrix is None:
            continue
        tensors: dict[str, ir.TensorProtocol] = {}
        for number, use in enumerate(rewrite.layer.uses):
            node = nodes[use.node]
            x = node.inputs[0]
            assert x is not None
            if rewrite.scheme.activation is not None:
                key = use.input + rewrite.scheme.activation_form
                if key not in pairs:
                    factors = None if use.input in folded else rewrite.factors
                    writer = NodeWriter(model, simulating=simulating)
                    pairs[key] = _quantize_activation(
                        writer, x, rewrite, activation_scales[key], factors
                    )
                node.replace_input_with(0, pairs[key])
            to = LayerWriter(
                model,
                rewrite.layer,
                rewrite.scheme,
                node,
                x,
                number,
                tensors,
                simulating=simulating,
            )
            rewrite.scheme.branch.write(to, rewrite.scheme, rewrite.matrix)
        _drop_if_unused(model, rewrite.layer.weight)
        changed = True
    return model, changed


def bias_refusal(model: ir.Model, layer: Layer) -> str:
    """Say why a branch cannot be written beside ``layer`` because of its bias; empty when it can.

    Promoting rows splits the bias. One that other nodes read too would then lie in the file twice,
    and bytes would not be those of the plan.
    """
    nodes = {node.name: node for node in model.graph}
    own = [nodes[use.node] for use in layer.uses]
    if len(own) > 1:
        return "several nodes share its weight"
    bias = own[0].inputs[2] if len(own[0].inputs) > 2 else None
    if bias is None:
        return ""
    if bias.const_value is None or list(bias.const_value.shape.numpy()) != [layer.out_channels]:
        return "its bias is no constant with one number for each output channel"
    if len(bias.uses()) > 1:
        return "its bias is shared with other nodes"
    if own[0].op_type == "Gemm" and own[0].attributes.get_float("beta", 1.0) != 1.0:
        return "its Gemm scales the bias"
    return ""


def folded_activations(model: ir.Model, rewrites: list[LayerRewrite]) -> dict[str, LayerRewrite]:
    """Return the activations that can take their factors and whose readers all want them, each with one of these."""
    scaled = {r.layer.name: r for r in rewrites if r.factors is not None}
    if not scaled:
        return {}
    folded = {}
    for tensor, readers in foldable_inputs(
        LayerGraph(model, tuple(r.layer for r in rewrites), ())
    ).items():
        wanted = [scaled[name] for name in sorted(readers) if name in scaled]
        if len(wanted) == len(readers) and len({r.scheme.activation_form for r in wanted}) == 1:
            folded[tensor] = wanted[0]
    return folded


def _fold_factors(model: ir.Model, rewrites: list[LayerRewrite]) -> set[str]:
    """Fold the factors of all ``folded_activations``; return these tensors."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    folded = folded_activations(model, rewrites)
    for tensor, rewrite in folded.items():
        assert rewrite.factors is not None
        fold_factors(values[tensor], rewrite.layer, rewrite.factors)
    return set(folded)


def _quantize_activation(
    to: NodeWriter,
    x: ir.Value,
    rewrite: LayerRewrite,
    found: float | ActivationGrid,
    factors: Array | None,
) -> ir.Value:
    """Insert the quantizer of ``x``, times ``factors`` if any, right after its producer; return what it gives."""
    grid = found if isinstance(found, ActivationGrid) else ActivationGrid(found)
    scheme = rewrite.scheme
    assert scheme.activation is not None and x.name is not None
    if not np.isfinite(grid.scale) or grid.scale <= 0:
        raise ModelError(
            f"The scale of the activation '{x.name}' is {grid.scale}.", "Calibrate again."
        )
    form, value = scheme.activation_form, x
    if factors is not None:
        value = multiply_channels(to.model, x, rewrite.layer, factors, form)
    return to.after(value, scheme.activation.write(to, value, grid, (x.name, form)))


def _drop_if_unused(model: ir.Model, name: str) -> None:
    value = model.graph.initializers[name]
    if not value.uses():
        del model.graph.initializers[name]


def weight_array(model: ir.Model, layer: Layer) -> Array:
    """Return a layer's weight as it stands in ``model`` (a view of the mapped file where possible)."""
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    return tensor.numpy()
