"""The local errors of a layer's schemes in NumPy: layer(Qa(X); Qw(W)) - layer(X; W)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.onnx_torch.window_pads import window_pads
from mpq_deploy.sensitivity.layer_weights import FormStack, InputRounding


def absmax(x: Array, axes: tuple[int, ...]) -> Array:
    """Return the largest magnitude of ``x`` over ``axes``, which stay as size 1."""
    return np.asarray(np.abs(x).max(axis=axes, keepdims=True))


def fake_quantize(x: Array, rounding: InputRounding, layer: Layer) -> Array:
    """Round ``x`` as QuantizeLinear and DequantizeLinear do (half to even); same shape.

    The channels in ``rounding.kept`` stay float.
    """
    if not rounding.grid.uniform:
        return np.asarray(rounding.grid.rounded(np.asarray(x, np.float32), np), np.float32)
    factors = rounding.by_channel(layer, x.ndim)
    seen = x if factors is None else x * factors
    ratio = rounding.range.ratio(seen, rounding.grid, layer.op == "Conv", absmax)
    step = np.float32(rounding.scale) if ratio is None else np.float32(rounding.scale) * ratio
    zeros = rounding.zeros_by_channel(layer, x.ndim)
    codes = np.clip(np.rint(seen / step - zeros), *rounding.limits).astype(np.float32) + zeros
    rounded: Array = codes * step if factors is None else codes * step / factors
    if not len(rounding.kept):
        return rounded
    channels = x.shape[1 if layer.op == "Conv" else -1]
    return np.where(rounding.kept_mask(layer, x.ndim, channels), x, rounded)


class LayerInput:
    """A layer's input, laid out once (for a Conv: im2col) so that each weight costs one matmul."""

    def __init__(self, layer: Layer, attributes: Mapping[str, Any], x: Array) -> None:
        self._layer = layer
        self._x = x
        self._columns: Array | None = None
        self._spatial: tuple[int, ...] = ()
        if layer.op == "Conv":
            self._columns, self._spatial = _patches(layer, attributes, x)

    def times(self, matrix: Array) -> Array:
        """Return the output for the weight ``matrix`` [out_channels, reduction], without bias."""
        if self._columns is None:
            direct: Array = np.matmul(self._x, matrix.T)
            return direct
        layer = self._layer
        grouped = matrix.reshape(layer.group, layer.out_channels // layer.group, layer.reduction)
        product: Array = np.matmul(grouped[None], self._columns)
        return product.reshape(len(self._x), layer.out_channels, *self._spatial)


def _patches(
    layer: Layer, attributes: Mapping[str, Any], x: Array
) -> tuple[Array, tuple[int, ...]]:
    """Return a Conv's im2col columns, [N, group, reduction, L], and its output's spatial shape."""
    rank = len(layer.kernel)
    strides = attributes.get("strides", (1,) * rank)
    dilations = attributes.get("dilations", (1,) * rank)
    before, after = window_pads(attributes, x.shape[2:], layer.kernel)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    reach = tuple((k - 1) * d + 1 for k, d in zip(layer.kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, reach, axis=tuple(range(2, 2 + rank))
    )
    every = tuple(slice(None, None, step) for step in (1, 1, *strides, *dilations))
    windows = windows[every]
    spatial = windows.shape[2 : 2 + rank]
    # [N, C, *spatial, *kernel] -> [N, C, *kernel, *spatial]
    order = (0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    columns = np.ascontiguousarray(windows.transpose(order))
    return columns.reshape(len(x), layer.group, layer.reduction, -1), spatial


@dataclass(frozen=True)
class UseErrors:
    """One use of a layer: node ``attributes``, weight errors, input ``roundings`` by form."""

    layer: Layer
    attributes: Mapping[str, Any]
    stack: FormStack
    roundings: Mapping[str, InputRounding]

    def errors(
        self, x: Array, schemes: Collection[str] | None = None
    ) -> Iterator[tuple[str, Array]]:
        """Yield (scheme, dY) for every scheme, or only ``schemes``, one at a time.

        ``x``: the float input. Raises ValueError for an activation form without a rounding.
        """
        stack = self.stack
        by_form: dict[str | None, list[str]] = {}
        for scheme, form in stack.inputs.items():
            if schemes is None or scheme in schemes:
                by_form.setdefault(form, []).append(scheme)
        for form, names in by_form.items():
            if form is None:
                shared, columns = None, LayerInput(self.layer, self.attributes, x)
            elif form not in self.roundings:
                raise ValueError(f"a scheme rounds the activation{form}, but no scale was given")
            else:
                rounded = fake_quantize(x, self.roundings[form], self.layer)
                shared = LayerInput(self.layer, self.attributes, rounded - x).times(stack.weight)
                columns = LayerInput(self.layer, self.attributes, rounded)
            for scheme in names:
                error = columns.times(stack.difference(scheme))
                yield scheme, error if shared is None else error + shared
