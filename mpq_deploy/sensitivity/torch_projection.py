"""Inner products <G, dY_s> of output gradients with the local errors of a layer's schemes.

With X the layer's float input, E = Qa(X) - X its rounding's error, W the float weight and D_s =
Qw_s(W) - W,

    dY_s = layer(X; D_s) + layer(E; W) + layer(E; D_s).

The last term, the product of two errors, is left out: on the bundled model it changes nine losses
of ten by less than 2 %, and their sum by 0.3 %. The other two terms are computed once per distinct
D_s and once per distinct E. For the second, <G, layer(E; W)> = <E, layer^T(G; W)>: the gradient of
the layer's input serves all roundings. The first is computed in the faster of two ways. *Forward*
applies the stacked D_s of all schemes to X and projects the results on the gradients of all probes.
*Weight gradient* uses <G, layer(X; D)> = <D, wgrad(X, G)>, with one wgrad per probe and sample.
Forward wins with many probes and at small resolutions; the cost of weight gradients hardly depends
on the number of schemes.

An inner product is a sum over output channels (groups of a grouped layer; for a rounded input its
channels, or rows of a product). The sum of the squares of these partial products is kept beside it:
it has the same expectation where the channels' errors are independent, and a far smaller variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional

from mpq_deploy.graph.layers import Layer
from mpq_deploy.onnx_torch.operators import convolve
from mpq_deploy.onnx_torch.pass_memory import piece_bytes
from mpq_deploy.onnx_torch.window_pads import window_pads
from mpq_deploy.sensitivity.layer_weights import FormsInTurn, FormStack, InputRounding, Promotion

Tensor = torch.Tensor
# The sizes below hold for the CPU (see ``piece_bytes``). Stacked output errors larger than
# PIECE_BYTES leave the caches: 64 -> 640 channels at 32x32 ran at 70 instead of 98 GFLOP/s.
PIECE_BYTES = 24 << 20
# Weight gradients, and patches of their inputs, held at once: larger ones leave the caches.
GRADIENT_BYTES = 16 << 20
PATCH_BYTES = 4 << 20
# Rounding errors of an input held at once.
ROUNDED_BYTES = 4 << 20
# Cost of a weight gradient beside its multiplications (measured), in output positions: writing and
# reading it takes as long as summing over GRADIENT_POSITIONS; gathering patches takes as long as
# summing over PATCH_POSITIONS of all positions.
GRADIENT_POSITIONS = 64
PATCH_POSITIONS = 0.5


def absmax(x: Any, axes: tuple[int, ...]) -> Any:
    """Return the largest magnitude of ``x`` over ``axes``, which stay as size 1."""
    return x.abs().amax(dim=axes, keepdim=True)


def lost_by_rounding(
    x: Any, rounding: InputRounding, layer: Layer, out: Any = None, largest: Any = None
) -> Any:
    """Return ``x`` minus its fake-quantized value (QuantizeLinear, DequantizeLinear); 0 where kept.

    ``out``: a tensor for the result. ``largest``: the result of ``largest_magnitudes`` where the
    caller has it.
    """
    if not rounding.grid.uniform:
        return torch.sub(x, rounding.grid.rounded(x.float(), torch).to(x.dtype), out=out)
    found, factors = rounding.by_channel(layer, x.ndim), x.new_ones(())
    if found is not None:
        factors = torch.from_numpy(found).to(x.device, x.dtype, non_blocking=True)
    step = x.new_full((), rounding.scale)
    if rounding.range.moves and not rounding.range.by_timestep:
        seen = (largest_magnitudes(layer, x) if largest is None else largest) * factors
        step = step * rounding.range.ratio(seen, rounding.grid, layer.op == "Conv", absmax)
    codes = x * (factors / step)
    if rounding.grid.zeros:
        zeros = torch.from_numpy(rounding.zeros_by_channel(layer, x.ndim))
        zeros = zeros.to(x.device, x.dtype, non_blocking=True)
        codes = codes.sub_(zeros).round_().clamp_(*rounding.limits).add_(zeros)
    else:
        codes = codes.round_().clamp_(*rounding.limits)
    lost = torch.addcmul(x, codes, step / factors, value=-1, out=out)
    if len(rounding.kept):
        channels = x.shape[1 if layer.op == "Conv" else -1]
        mask = torch.from_numpy(rounding.kept_mask(layer, x.ndim, channels))
        lost.masked_fill_(mask.to(x.device, non_blocking=True), 0)
    return lost


def largest_magnitudes(layer: Layer, x: Any) -> Any:
    """Return what a dynamic range needs of ``x``: a Conv's maxima by channel, else ``x`` itself."""
    return absmax(x, tuple(range(2, x.ndim))) if layer.op == "Conv" else x


@dataclass(frozen=True)
class TorchStack(FormStack):
    """A FormStack as torch tensors.

    ``promoted_differences`` and ``promoted_channels``: those of each of ``promotions``.
    """

    weight: Any
    differences: Any
    promoted_differences: tuple[Any, ...] = ()
    promoted_channels: tuple[Any, ...] = ()

    @classmethod
    def of(cls, stack: FormStack, device: Any = "cpu") -> TorchStack:
        """Return tensors on ``device``; on the CPU they share the arrays' memory."""
        values = {item.name: getattr(stack, item.name) for item in fields(stack)}
        values["weight"] = torch.from_numpy(stack.weight).to(device)
        if not isinstance(stack.differences, FormsInTurn):
            values["differences"] = torch.from_numpy(stack.differences).to(device)
        differences, channels = (
            tuple(torch.from_numpy(getattr(p, name)).to(device) for p in stack.promotions)
            for name in ("differences", "channels")
        )
        return cls(**values, promoted_differences=differences, promoted_channels=channels)

    def pieces(self) -> Iterator[Any]:
        """Yield the weight errors [F, out_channels, reduction] of all forms at once or in turn."""
        if not isinstance(self.differences, FormsInTurn):
            yield self.differences
            return
        for difference in self.differences:
            yield torch.from_numpy(difference)[None].to(self.weight.device)

    def promoted(self) -> Iterator[tuple[Promotion, Any, Any]]:
        """Yield each promotion with its differences and channels as tensors."""
        yield from zip(
            self.promotions, self.promoted_differences, self.promoted_channels, strict=True
        )

    @property
    def bytes(self) -> int:
        """Memory held by the tensors."""
        return int(
            self.weight.nbytes
            + self.differences.nbytes
            + sum(d.nbytes for d in self.promoted_differences)
        )


def apply_matrix(layer: Layer, attributes: dict[str, Any], x: Any, matrices: Any) -> Any:
    """Apply the layer with each of ``matrices`` [F, out_channels, reduction], without bias.

    Returns [rows, group, F, m]: rows of x's leading axis, m = output elements of one group. For
    products x is [rows, L, reduction] and m runs over (out_channels, L).
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
    """Return the input of a product as [samples, L, reduction]; that of a Conv as it is."""
    return x if layer.op == "Conv" else x.reshape(samples, -1, layer.reduction)


def canonical_gradients(layer: Layer, gradients: Any, samples: int) -> Any:
    """Return gradients [rows, P, *rest] as [rows, group, P, m], matching ``apply_matrix``."""
    probes = gradients.shape[1]
    if layer.op == "Conv":
        return gradients.reshape(gradients.shape[0], probes, layer.group, -1).transpose(1, 2)
    rows_per_sample = gradients.shape[0] // samples
    tokens = gradients.reshape(samples, rows_per_sample, probes, -1, layer.out_channels)
    return tokens.permute(0, 2, 4, 1, 3).reshape(samples, 1, probes, -1)


def partial_products(errors: Any, gradients: Any, samples: int, parts: int) -> Any:
    """Return <dY_c, G_c> [samples, parts, F, P] for parts c of the axis m of each group.

    dY: [rows, group, F, m], G: [rows, group, P, m]; of several groups each is one part.
    """
    rows, group = errors.shape[:2]
    if group > 1 or parts == 1:
        products = torch.bmm(errors.flatten(0, 1), gradients.flatten(0, 1).transpose(1, 2))
        products = products.unflatten(0, (rows, group))
    else:
        products = torch.stack(
            [
                torch.bmm(
                    error[0].unflatten(-1, (parts, -1)).transpose(0, 1),
                    gradient[0].unflatten(-1, (parts, -1)).permute(1, 2, 0),
                )
                for error, gradient in zip(errors, gradients, strict=True)
            ]
        )
    return products.float().unflatten(0, (samples, -1)).sum(1)


def added_up(partial: Any) -> Any:
    """Return the sums and the sums of squares of partial products: [S, parts, F, P] -> [F, 2, P, S]."""
    return torch.stack([partial.sum(1), partial.square().sum(1)]).permute(2, 0, 3, 1)


@dataclass(frozen=True)
class ProjectedUse:
    """One use of a layer: weight errors of its schemes, input ``roundings`` by activation form."""

    layer: Layer
    attributes: dict[str, Any]
    stack: TorchStack
    roundings: Mapping[str, InputRounding]

    def rounding(self, form: str) -> InputRounding:
        """Return the rounding of an activation form. Raises ValueError where there is none."""
        if form not in self.roundings:
            raise ValueError(f"a scheme rounds the activation{form}, but no scale was given")
        return self.roundings[form]

    def forward(self, x: Any, matrices: Any, g: Any, samples: int) -> Any:
        """Return the partial products of layer(X; D) [samples, parts, F, P] for D in ``matrices``.

        Works on some samples at a time so that results stay in the CPU's caches.
        """
        rows_per_sample = x.shape[0] // samples
        outputs = matrices.shape[0] * g[0, :, 0].numel() * rows_per_sample
        most = piece_bytes(x.device, PIECE_BYTES)
        piece = max(1, most // (outputs * matrices.element_size()))
        products = []
        for start in range(0, samples, piece):
            count = min(piece, samples - start)
            rows = slice(start * rows_per_sample, (start + count) * rows_per_sample)
            errors = apply_matrix(self.layer, self.attributes, x[rows], matrices)
            products.append(partial_products(errors, g[rows], count, self.layer.out_channels))
        return torch.cat(products) if len(products) > 1 else products[0]

    def channels(self, x: Any, matrix: Any, channels: Any, g: Any, samples: int) -> Any:
        """Return <G_c, dY_c> [samples, m, P] of m ``channels`` whose weight error is ``matrix``.

        ``matrix`` [m, reduction]. Layers whose channels are promoted have one group.
        """
        rows, _, probes, _ = g.shape
        errors = apply_matrix(self.layer, self.attributes, x, matrix[None])
        outputs = g.reshape(rows, probes, self.layer.out_channels, -1)
        chosen = outputs[:, :, channels].reshape(rows, 1, probes, -1)
        return partial_products(errors, chosen, samples, len(channels))[:, :, 0]


def project_layer(
    use: ProjectedUse, x: Any, gradients: Any, through: Any, samples: int, way: str = ""
) -> dict[str, Any]:
    """Return scheme -> <G, dY_s> and the sum of its parts' squares, [2, P, samples], for one use.

    ``x``: the layer's float input, whose leading axis is a multiple of the samples. ``gradients``
    [rows, P, *rest]: gradients of the layer's output, P probes. ``through`` [rows, P, ...]:
    gradients of its input, read only when a scheme rounds the input. ``way``: "forward" or
    "weights" forces one of the two ways.
    """
    x, stack = canonical_input(use.layer, x, samples), use.stack
    g = canonical_gradients(use.layer, gradients, samples)
    rounded = _project_roundings(use, x, through, samples)
    chosen = way or _cheaper_way(use.layer, stack, x, g, samples)
    project = (
        _project_by_weights
        if chosen == "weights" and _has_weight_way(use.layer)
        else _project_forward
    )
    partial, more = project(use, x, g, samples)
    rows, products = added_up(partial), {}
    promoted = _promoted(stack, partial, more)
    bodies = {name: one.body for one in stack.promotions for name in one.counts}
    for scheme, form in stack.inputs.items():
        product = rows[stack.rows[bodies.get(scheme, scheme)]]
        if scheme in bodies:
            product = product + promoted[scheme]
        products[scheme] = product if form is None else product + rounded[form]
    return products


def _promoted(stack: TorchStack, partial: Any, more: list[Any]) -> dict[str, Any]:
    """Return scheme -> what its promoted channels add to its body's products, [2, P, samples].

    ``partial`` [samples, parts, F, P]; ``more``: of each promotion [samples, m, P], what its
    channels' partial products change by.
    """
    found = {}
    for (promotion, _, channels), change in zip(stack.promoted(), more, strict=True):
        before = partial[:, channels, stack.rows[promotion.body]]
        squares = change * (2 * before + change)
        for name, count in promotion.counts.items():
            added = torch.stack([change[:, :count].sum(1), squares[:, :count].sum(1)])
            found[name] = added.transpose(1, 2)
    return found


def _project_roundings(use: ProjectedUse, x: Any, through: Any, samples: int) -> dict[str, Any]:
    """Return activation form -> the products of layer(Qa(X) - X; W), [2, P, samples]."""
    forms = use.stack.forms
    if not forms:
        return {}
    roundings = [use.rounding(form) for form in forms]
    probes = through.shape[1]
    through = through.reshape(len(x), probes, -1)
    most = piece_bytes(x.device, ROUNDED_BYTES)
    piece = max(1, most // (x[:1].nbytes * (len(forms) + probes)))
    parts = []
    for start in range(0, len(x), piece):
        own = x[start : start + piece]
        largest = largest_magnitudes(use.layer, own)
        lost = own.new_empty((len(own), len(forms), *x.shape[1:]))
        for number, rounding in enumerate(roundings):
            lost_by_rounding(own, rounding, use.layer, lost[:, number], largest)
        back = through[start : start + piece, None]
        parts.append(partial_products(lost.flatten(2)[:, None], back, len(own), x.shape[1]))
    # The error is Qa(X) - X, and ``lost`` is its negative.
    partial = torch.cat(parts).neg_().unflatten(0, (samples, -1)).sum(1)
    return dict(zip(forms, added_up(partial), strict=True))


def _project_forward(use: ProjectedUse, x: Any, g: Any, samples: int) -> tuple[Any, list[Any]]:
    """Apply all weight errors to the input and project the results on the gradients.

    Returns partial products [samples, parts, F, P], and for each promotion [samples, m, P]: what
    its channels' products change by.
    """
    more = [use.channels(x, found, c, g, samples) for _, found, c in use.stack.promoted()]
    rows = [use.forward(x, piece, g, samples) for piece in use.stack.pieces()]
    return torch.cat(rows, 2), more


def _project_by_weights(use: ProjectedUse, x: Any, g: Any, samples: int) -> tuple[Any, list[Any]]:
    """Project all weight errors on the weight gradients; returns the same as ``_project_forward``.

    Works on some samples at a time, so that few weight gradients are in memory.
    """
    stack, probes = use.stack, g.shape[2]
    piece = max(1, piece_bytes(g.device, GRADIENT_BYTES) // (probes * stack.weight.nbytes))
    found: list[list[Any]] = []
    for start in range(0, samples, piece):
        chunk = slice(start, min(start + piece, samples))
        gradients = _weight_gradients(use.layer, use.attributes, x[chunk], g[chunk])
        # [out_channels, n P, reduction]
        by_channel = gradients.unflatten(1, (use.layer.out_channels, -1)).transpose(0, 1)
        rows = [torch.bmm(by_channel, one.permute(1, 2, 0)).float() for one in stack.pieces()]
        more = [
            torch.einsum("mnr,mr->nm", by_channel[channels], differences).float()
            for _, differences, channels in stack.promoted()
        ]
        partial = torch.cat(rows, -1).unflatten(1, (-1, probes)).permute(1, 0, 3, 2)
        by_sample = [one.unflatten(0, (-1, probes)).transpose(1, 2) for one in more]
        found.append([partial, *by_sample])
    whole, *more = (torch.cat(parts) for parts in zip(*found, strict=True))
    return whole, more


def _weight_gradients(layer: Layer, attributes: dict[str, Any], x: Any, g: Any) -> Any:
    """Return the weight gradients of n samples and P probes, [n P, out_channels * reduction]."""
    samples, probes = g.shape[0], g.shape[2]
    # [n, 1, P, out * L] -> [n, P * out, L]
    gradients = g.reshape(samples, probes * layer.out_channels, -1)
    found = gradients.new_empty(samples, gradients.shape[1], layer.reduction)
    per_sample = gradients.shape[2] * layer.reduction * g.element_size()
    piece = max(1, piece_bytes(g.device, PATCH_BYTES) // per_sample)
    for start in range(0, samples, piece):
        chunk = slice(start, min(start + piece, samples))
        torch.bmm(
            gradients[chunk], _patches(layer, attributes, x[chunk].to(g.dtype)), out=found[chunk]
        )
    return found.reshape(samples * probes, -1)


def _patches(layer: Layer, attributes: dict[str, Any], x: Any) -> Any:
    """Return the rows that the weight multiplies (for a Conv: im2col), [samples, L, reduction]."""
    if layer.op != "Conv":
        return x
    before, after = window_pads(attributes, tuple(x.shape[2:]), layer.kernel)
    x = (
        functional.pad(x, (before[1], after[1], before[0], after[0]))
        if any((*before, *after))
        else x.contiguous()
    )
    strides, dilations = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], layer.kernel, strides, dilations)
    ]
    # A view [n, C, kh, kw, H, W] copied once: two to three times as fast as unfold.
    n, c, h, w = x.stride()
    steps = (n, c, h * dilations[0], w * dilations[1], h * strides[0], w * strides[1])
    windows = x.as_strided((*x.shape[:2], *layer.kernel, *sizes), steps)
    return windows.reshape(x.shape[0], layer.reduction, -1).transpose(1, 2)


def _has_weight_way(layer: Layer) -> bool:
    return layer.op != "Conv" or (layer.group == 1 and len(layer.kernel) == 2)


def _cheaper_way(layer: Layer, stack: TorchStack, x: Any, g: Any, samples: int) -> str:
    """Return the way with fewer multiplications per weight and sample.

    Forward takes F per output position. Weight gradients take P per position, and F P to project.
    """
    if not _has_weight_way(layer) or x.shape[0] != samples:
        return "forward"
    probes, positions = g.shape[2], g.shape[3] / layer.out_channels
    forms = len(stack.differences)
    promoted = sum(len(p.channels) for p in stack.promotions) / layer.out_channels
    forward = (forms + promoted) * positions
    by_weights = probes * (positions + GRADIENT_POSITIONS) + PATCH_POSITIONS * positions
    return "weights" if by_weights + forms * probes < forward else "forward"
