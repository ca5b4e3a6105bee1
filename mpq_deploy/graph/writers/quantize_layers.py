"""Pass: give each layer the Q/DQ nodes of its scheme, in forms that stay packed.

1. FP16: nothing.
2. Quantized activations: one QuantizeLinear/DequantizeLinear pair per activation tensor and form,
   shared by all its readers, directly on their inputs; factors of its channels before it (see
   ``prescale``). Where the range moves (``formats.ranges``), the input is divided by its ratio to
   the widest before the pair, and each product multiplied by it, before the bias is added. Where
   channels are shifted (``formats.shifts``), zeros are padded and the shift taken off before the
   pair, and what the weight makes of it is the product's own bias.
3. Weights and branches: what the scheme's format and branch write (see ``formats``). Branches stand
   on the activation side, where TensorRT keeps both parts packed: it rebuilds a weight that is the
   sum or concatenation of dequantized ones at each call, or fails to build.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.formats.interfaces import ActivationGrid, DeployedMatrix, Scheme
from mpq_deploy.formats.ranges import RangeNames
from mpq_deploy.formats.shifts import middle_of
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
    timestep: str = "",
    simulating: bool = False,
) -> tuple[ir.Model, bool]:
    """Rewrite ``model`` in place; return it and whether anything changed.

    ``activation_scales``: activation tensor (followed by the scheme's ``activation_form``) -> its
    quantizer, or the scale of one of INT8, for every input of a layer with quantized activations.
    ``timestep``: the graph's input that ranges by timestep follow; ``simulating``: as for
    ``NodeWriter``. Raises ModelError where such a range has no timestep.
    """
    nodes = {node.name: node for node in model.graph}
    pairs: dict[str, QuantizedInput] = {}
    changed = False
    folded = _fold_factors(model, rewrites)
    for rewrite in rewrites:
        if rewrite.matrix is None:
            continue
        layer, scheme = rewrite.layer, rewrite.scheme
        tensors: dict[str, ir.TensorProtocol] = {}
        for number, use in enumerate(layer.uses):
            node = nodes[use.node]
            x = node.inputs[0]
            assert x is not None
            given = QuantizedInput(x)
            if scheme.activation is not None:
                key = use.input + scheme.activation_form
                if key not in pairs:
                    factors = None if use.input in folded else rewrite.factors
                    to_input = NodeWriter(model, simulating=simulating)
                    writing = InputWriter(to_input, rewrite, activation_scales[key], timestep)
                    pairs[key] = writing.quantize(x, factors, _pads(node))
                given = pairs[key]
                node.replace_input_with(0, given.value)
            place = (node, x, number, tensors)
            to = LayerWriter(model, layer, scheme, *place, simulating=simulating)
            scheme.branch.write(to, scheme, rewrite.matrix)
            if given.shift is not None:
                to.unpad()
                to.finish_product(given.ratio, _product_of(rewrite, given.shift))
            elif given.ratio is not None:
                to.finish_product(given.ratio)
        _drop_if_unused(model, rewrite.layer.weight)
        changed = True
    return model, changed


def _pads(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("pads", ()) or ())


def _product_of(rewrite: LayerRewrite, shift: Array) -> Array:
    """Return what the rounded weight makes of ``shift`` [C], taken off its input, at each output [O]."""
    assert rewrite.matrix is not None
    weight, factors = rewrite.matrix.dequantize(), rewrite.factors
    undone = shift if factors is None else shift / factors.astype(np.float32)
    return np.asarray(weight @ np.repeat(undone, weight.shape[1] // len(undone)))


def bias_refusals(model: ir.Model, layers: Iterable[Layer]) -> dict[str, str]:
    """Say per layer why a branch cannot be written beside it because of its bias; empty when it can.

    Promoting rows splits the bias. One that other nodes read too would then lie in the file twice,
    and bytes would not be those of the plan.
    """
    nodes = {node.name: node for node in model.graph}
    return {
        layer.name: _bias_refusal(layer, [nodes[use.node] for use in layer.uses])
        for layer in layers
    }


def _bias_refusal(layer: Layer, own: list[ir.Node]) -> str:
    if len(own) > 1:
        return "several nodes share its weight"
    bias = own[0].inputs[2] if len(own[0].inputs) > 2 else None
    if bias is None:
        return ""
    if bias.const_value is None or list(bias.const_value.shape.numpy()) != [layer.out_channels]:
        return "its bias is not a constant with one number per output channel"
    if len(bias.uses()) > 1:
        return "its bias is shared with other nodes"
    if own[0].op_type == "Gemm" and own[0].attributes.get_float("beta", 1.0) != 1.0:
        return "its Gemm scales the bias (beta)"
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


@dataclass(frozen=True)
class QuantizedInput:
    """A rounded activation, and the ratio that its readers' products are multiplied by; None for 1.

    ``shift`` float32 [C]: what was taken off its channels, padding included; None for nothing.
    """

    value: ir.Value
    ratio: ir.Value | None = None
    shift: Array | None = None


@dataclass(frozen=True)
class InputWriter:
    """Writes the quantizer of an input of ``rewrite``'s layer: ``found``, or the scale of one of INT8."""

    to: NodeWriter
    rewrite: LayerRewrite
    found: float | ActivationGrid
    timestep: str

    def quantize(
        self, x: ir.Value, factors: Array | None, pads: tuple[int, ...] = ()
    ) -> QuantizedInput:
        """Insert the quantizer of ``x``, times ``factors`` if any, right after its producer.

        Where it shifts channels, what its readers pad by ``pads`` is padded before.
        """
        grid = self.found if isinstance(self.found, ActivationGrid) else ActivationGrid(self.found)
        scheme = self.rewrite.scheme
        assert scheme.activation is not None and x.name is not None
        if not np.isfinite(grid.scale) or grid.scale <= 0:
            raise ModelError(
                f"The scale of the activation '{x.name}' is {grid.scale}.", "Calibrate again."
            )
        form, to, value = scheme.activation_form, self.to, x
        if factors is not None:
            value = multiply_channels(to.model, x, self.rewrite.layer, factors, form)
        nodes, ratio = scheme.range.write(to, value, grid, self._names(x, form))
        divided = value
        if ratio is not None:
            label = f"{x.name}/divide{form}"
            nodes = [*nodes, to.make("Div", [value, ratio], {}, label, like=value)]
            divided = nodes[-1].outputs[0]
        shift = middle_of(np.array(grid.zeros), grid.scale) if grid.zeros else None
        if shift is not None:
            nodes += self._shifted(divided, shift, pads, f"{x.name}//shift{form}")
            divided = nodes[-1].outputs[0]
        nodes = [*nodes, *scheme.activation.write(to, divided, grid, (x.name, form))]
        return QuantizedInput(to.after(value, nodes), ratio, shift)

    def _shifted(
        self, x: ir.Value, shift: Array, pads: tuple[int, ...], base: str
    ) -> list[ir.Node]:
        """Return nodes, not yet inserted, that pad ``x`` by zeros and take ``shift`` [C] off its channels."""
        to, rank, nodes = self.to, len(self.rewrite.layer.kernel), []
        if any(pads):
            whole = np.array([0, 0, *pads[:rank], 0, 0, *pads[rank:]], np.int64)
            inputs = [x, to.named_constant(f"{base}/pads", whole)]
            nodes.append(to.make("Pad", inputs, {}, f"{base}/pad"))
            x = nodes[-1].outputs[0]
        middle = to.named_constant(base, shift.reshape(-1, *(1,) * rank))
        like = x if x.shape is not None else None
        return [*nodes, to.make("Sub", [x, middle], {}, f"{base}/center", like=like)]

    def _names(self, x: ir.Value, form: str) -> RangeNames:
        layer, inputs = self.rewrite.layer, {value.name for value in self.to.model.graph.inputs}
        if self.rewrite.scheme.range.by_timestep and self.timestep not in inputs:
            raise ModelError(
                f"'{layer.name}' has a range per timestep, but the graph has no timestep input.",
                "Leave 'timestep' out of allocate.ranges.",
            )
        convolved = layer.op == "Conv"
        rank = 2 + len(layer.kernel) if convolved else 0
        return RangeNames(f"{x.name}//range{form}", convolved, rank, self.timestep)


def _drop_if_unused(model: ir.Model, name: str) -> None:
    value = model.graph.initializers[name]
    if not value.uses():
        del model.graph.initializers[name]


def weight_array(model: ir.Model, layer: Layer) -> Array:
    """Return a layer's weight as it stands in ``model`` (a view of the mapped file where possible)."""
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    return tensor.numpy()
