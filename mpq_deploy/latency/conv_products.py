"""Which convolutions become matrix products where their weights alone are quantized.

In: the graph, the target, the shapes of its tensors. Out: the same layers, those that become
products with their ``window``, the others with the reason.

TensorRT documents INT4 blocks for products and no INT4 convolution. So a Conv is written as its
windows (im2col) times a matrix, which every TensorRT takes. TensorRT-RTX also takes a convolution
whose weight it unpacks at every call (docs/engine-forms.md): there a layer becomes what is
estimated to take less time. The product moves its input as often as the kernel has positions, the
other form three times the FP16 weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from mpq_deploy.device.generate.residency import RUNTIME_BYTES
from mpq_deploy.engine.engine_memory import COPIES, WORKSPACE_BYTES
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.layers import Layer, LayerGraph, Window
from mpq_deploy.latency.roofline import Rates, Traffic, column_count, layer_seconds

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.engine.target import Target

Shapes = Mapping[str, tuple[int, ...]]
# The scheme by which both forms are compared (our choice: blocks change little of the time).
COMPARED = "w4a16-b128"


def wants_products(graph: LayerGraph, target: Target) -> bool:
    """Whether any layer of ``graph`` may become a product for ``target``."""
    products = SCHEMES[COMPARED].family in target.schemes["MatMul"]
    convs = any(layer.op == "Conv" for layer in graph.layers)
    return target.conv_products and target.forms.tensorrt and products and convs


def with_products(graph: LayerGraph, target: Target, usual: Shapes, largest: Shapes) -> LayerGraph:
    """Return ``graph`` with the layers that become products on ``target``.

    ``usual`` and ``largest``: shapes of tensors at the engine's usual and largest batch, as far as
    they are known. Where they are not, layers become products on a TensorRT that has no other form.
    """
    if not wants_products(graph, target):
        return graph
    nodes = {node.name: node for node in graph.model.graph}
    either = target.forms.int4_conv
    rates = Rates.of(target)

    def decided(layer: Layer) -> Layer:
        if layer.op != "Conv":
            return layer
        window, reason = conv_window(layer, [nodes[use.node] for use in layer.uses])
        if window is not None:
            reason = _too_large(layer, target, largest)
        if reason:
            return replace(layer, no_product=reason)
        product = replace(layer, window=window)
        if not either:
            return product
        traffic = _traffic(layer, usual)
        if traffic is None or rates is None:
            return replace(layer, no_product="the shapes or the target's figures are unknown")
        scheme = SCHEMES[COMPARED]
        seconds = [
            sum(layer_seconds(one, scheme, moved, rates) for moved in traffic)
            for one in (product, layer)
        ]
        if seconds[0] < seconds[1]:
            return product
        return replace(layer, no_product="unpacking its weight at each call is estimated as faster")

    return replace(graph, layers=tuple(map(decided, graph.layers)))


def conv_window(layer: Layer, nodes: list[ir.Node]) -> tuple[Window | None, str]:
    """Return where the windows of ``layer`` lie, or None and why it cannot be a product."""
    if layer.group > 1:
        return None, f"it has {layer.group} groups; a product has only one"
    rank = len(layer.kernel)
    found = set()
    for node in nodes:
        padding = node.attributes.get_string("auto_pad", "NOTSET")
        if padding not in ("NOTSET", "VALID"):
            return None, f"its padding follows from its input's size (auto_pad {padding})"
        given = () if padding == "VALID" else node.attributes.get_ints("pads", ())
        found.add(
            Window(
                tuple(node.attributes.get_ints("strides", ()) or (1,) * rank),
                tuple(node.attributes.get_ints("dilations", ()) or (1,) * rank),
                tuple(given or (0,) * (2 * rank)),
            )
        )
    if len(found) > 1:
        return None, "nodes with other strides, dilations or paddings share its weight"
    return found.pop(), ""


def _traffic(layer: Layer, shapes: Shapes) -> list[Traffic] | None:
    """What each use reads and writes; None where a shape is not known."""
    known = [
        Traffic(prod(shapes[use.input]), prod(shapes[use.output]))
        for use in layer.uses
        if use.input in shapes and use.output in shapes
    ]
    return known if len(known) == len(layer.uses) else None


def _too_large(layer: Layer, target: Target, shapes: Shapes) -> str:
    """Say that the windows do not fit the target's memory; empty where they do, or nothing is known."""
    traffic = _traffic(layer, shapes)
    if target.memory_bytes is None or traffic is None:
        return ""
    columns = max(column_count(layer, moved) for moved in traffic)
    needed = RUNTIME_BYTES + WORKSPACE_BYTES + COPIES * FP16_BYTES * columns
    if needed <= target.memory_bytes.value:
        return ""
    return (
        f"its windows take {FP16_BYTES * columns / 1e9:.2f} GB at the largest batch, and {target.name} has "
        f"{target.memory_bytes.value / 1e9:.2f} GB"
    )
