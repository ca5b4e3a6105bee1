"""Inner products <G, dY_s> of output gradients with the local errors of every scheme of a layer, in torch.

With X the layer's float input, Qa its INT8 rounding, W the float weight and D_s = Qw_s(W) - W:

    dY_s = layer(X; D_s)                                 when the scheme leaves the activation in float,
    dY_s = layer(Qa(X); D_s) + layer(Qa(X) - X; W)       when it rounds it.

Both are sums of small terms, never a difference of two large ones, so float32 is enough. The products are taken
one of two ways, whichever needs fewer operations: *forward*, applying the stacked D_s of all schemes and projecting
the results on the gradients of all probes; or by *weight gradient*, <G, layer(X; D)> = <D, wgrad(X, G)>, one weight
gradient per probe and sample serving all schemes. Forward wins when there are fewer schemes than about twice the
probes; the weight gradient does not depend on the number of schemes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from mpq_deploy.graph.layers import Layer
from mpq_deploy.sensitivity.torch_windows import convolve
from mpq_deploy.sensitivity.weights import FormStack
from mpq_deploy.sensitivity.windows import window_pads

Tensor = torch.Tensor
INT8_MIN, INT8_MAX = -128, 127  # what ONNX QuantizeLinear saturates to


def fake_quantize(x: Any, scale: float) -> Any:
    """Round ``x`` to INT8 codes times ``scale``, as QuantizeLinear and DequantizeLinear do (half to even)."""
    return torch.round(x / scale).clamp_(INT8_MIN, INT8_MAX).mul_(scale)


@dataclass(frozen=True)
class TorchStack:
    """A FormStack as tensors of the type of evaluation."""

    source: FormStack
    weight: Any
    differences: Any

    @classmethod
    def of(cls, stack: FormStack, float_type: torch.dtype) -> TorchStack:
        """Convert; float32 shares memory."""
        weight, differences = torch.from_numpy(stack.weight), torch.from_numpy(stack.differences)
        return cls(stack, weight.to(float_type), differences.to(float_type))


def apply_matrix(layer: Layer, attributes: dict[str, Any], x: Any, matrices: Any) -> Any:
    """Apply the layer with each of the weights ``matrices`` [F, out_channels, reduction] to ``x``, without bias.

    Returns [rows, group, F, m]: rows of x's leading axis, m = output elements of one group. For products x is
    [rows, L, reduction] and m runs over (out_channels, L).
    """
    forms, out, _ = matrices.shape
    if layer.op != "Conv":
        flat = matrices.reshape(forms * out, -1)
        if x.shape[1] == 1:
            return (x[:, 0] @ flat.T).reshape(x.shape[0], 1, forms, out)
        return torch.matmul(flat, x.transpose(1, 2)).reshape(x.shape[0], 1, forms, -1)
    group = layer.group
    grouped = matrices.reshape(forms, group, out // group, -1).transpose(0, 1)
    kernel = grouped.reshape(group * forms * (out // group), layer.weight_shape[1], *layer.kernel)
    return convolve(x, kernel, None, attributes, layer.kernel).reshape(x.shape[0], group, forms, -1)


def canonical_input(layer: Layer, x: Any, samples: int) -> Any:
    """Return the input of a product as [samples, L, reduction]; that of a Conv as it is, [samples * k, ...]."""
    return x if layer.op == "Conv" else x.reshape(samples, -1, layer.reduction)


def canonical_gradients(layer: Layer, gradients: Any, samples: int) -> Any:
    """Return gradients [P, *output shape] as [rows, group, m, P], matching ``apply_matrix``."""
    probes = gradients.shape[0]
    if layer.op == "Conv":
        rows = gradients.shape[1]
        return gradients.reshape(probes, rows, layer.group, -1).permute(1, 2, 3, 0)
    tokens = gradients.reshape(probes, samples, -1, layer.out_channels)
    return tokens.transpose(2, 3).reshape(probes, samples, 1, -1).permute(1, 2, 3, 0)


def _project(errors: Any, gradients: Any, samples: int) -> Any:
    """Return <dY, G> as [F, P, samples] from [rows, group, F, m] and [rows, group, m, P]."""
    forms, probes = errors.shape[2], gradients.shape[3]
    products = torch.bmm(errors.flatten(0, 1), gradients.flatten(0, 1))
    return products.reshape(samples, -1, forms, probes).sum(1).permute(1, 2, 0)


def project_layer(
    layer: Layer,
    attributes: dict[str, Any],
    stack: TorchStack,
    x: Any,
    gradients: Any,
    scale: float | None,
    way: str = "",
) -> dict[str, Any]:
    """Return scheme -> <G, dY_s> as [P, samples], for one use of a layer.

    ``x``: the layer's float input, leading axis (samples * k); ``gradients`` [P, samples, *rest]: of the layer's
    output. ``scale``: of the INT8 activation, None when no scheme rounds it. ``way``: "forward" or "weights"
    forces one of the two ways.
    """
    samples = gradients.shape[1]
    x = canonical_input(layer, x, samples)
    gradients = gradients.reshape(gradients.shape[0], -1, *gradients.shape[3:]) if layer.op == "Conv" else gradients
    chosen = way or _cheaper_way(layer, stack.source, x, gradients, samples)
    by_weights = chosen == "weights" and _has_weight_way(layer)
    projected = _project_by_weights if by_weights else _project_forward
    g = canonical_gradients(layer, gradients, samples)
    source, found = stack.source, {}
    if source.weights_only:
        rows = projected(layer, attributes, x, stack.differences[: source.split_end], g, samples)
        found.update({name: rows[row] for name, row in source.weights_only.items()})
    if source.with_activation:
        if scale is None:
            raise ValueError("a scheme rounds the activation, but no scale was given")
        rounded = fake_quantize(x, scale)
        rows = projected(layer, attributes, rounded, stack.differences[source.split_start :], g, samples)
        shared = _project_forward(layer, attributes, rounded - x, stack.weight[None], g, samples)
        rows = rows + shared
        found.update({name: rows[row - source.split_start] for name, row in source.with_activation.items()})
    return found


def _project_forward(layer: Layer, attributes: dict[str, Any], x: Any, matrices: Any, g: Any, samples: int) -> Any:
    return _project(apply_matrix(layer, attributes, x, matrices), g, samples)


def _project_by_weights(layer: Layer, attributes: dict[str, Any], x: Any, matrices: Any, g: Any, samples: int) -> Any:
    """Take <D, wgrad(x, G)> sample by sample, so that only one sample's weight gradients are held."""
    patches = _patches(layer, attributes, x, samples)
    forms, out, reduction = matrices.shape
    probes = g.shape[3]
    flat = matrices.reshape(forms, out * reduction)
    rows = []
    for index in range(samples):
        # [m, P] of one sample -> [P, out, L] -> weight gradients [P, out * reduction]
        gradient = g[index, 0].T.reshape(probes, out, -1)
        weight_gradient = torch.matmul(gradient, patches[index])
        rows.append(flat @ weight_gradient.reshape(probes, -1).T)
    return torch.stack(rows, -1)


def _patches(layer: Layer, attributes: dict[str, Any], x: Any, samples: int) -> Any:
    """Return the rows that the weight multiplies, [samples, L, reduction]."""
    if layer.op != "Conv":
        return x
    before, after = window_pads(attributes, tuple(x.shape[2:]), layer.kernel)
    x = functional.pad(x, (before[1], after[1], before[0], after[0]))
    strides, dilations = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
    return functional.unfold(x, layer.kernel, tuple(dilations), 0, tuple(strides)).transpose(1, 2)


def _has_weight_way(layer: Layer) -> bool:
    return layer.op != "Conv" or (layer.group == 1 and len(layer.kernel) == 2)


def _cheaper_way(layer: Layer, stack: FormStack, x: Any, gradients: Any, samples: int) -> str:
    """Compare multiplications per weight element: F per position forward, P per position by weight gradients."""
    if not _has_weight_way(layer) or (layer.op == "Conv" and x.shape[0] != samples):
        return "forward"
    probes = gradients.shape[0]
    positions = gradients[0].numel() / (samples * layer.out_channels)
    forms = stack.split_end + len(stack.differences) - stack.split_start
    inputs = int(bool(stack.weights_only)) + int(bool(stack.with_activation))
    # Unfolding and the short products of single samples run at about half the speed of a convolution.
    by_weights = 2 * inputs * probes * positions + forms * probes
    return "weights" if by_weights < forms * positions else "forward"
