"""Operators with windows (convolution, pooling, resizing), norms, attention; the whole table."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from mpq_deploy.onnx_torch.basic_operators import (
    BASIC,
    Call,
    Inputs,
    Operator,
    Outputs,
    UnsupportedForm,
    axis_index,
    integers,
    optional,
)
from mpq_deploy.onnx_torch.window_pads import window_pads

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_AVERAGES = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_MAXIMA = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def convolve(x: Any, weight: Any, bias: Any, attributes: Any, kernel: tuple[int, ...]) -> Any:
    """Apply an ONNX Conv with ``attributes`` (strides, dilations, pads, auto_pad, group)."""
    rank = len(kernel)
    strides = tuple(attributes.get("strides", (1,) * rank))
    dilations = tuple(attributes.get("dilations", (1,) * rank))
    before, after = window_pads(attributes, tuple(x.shape[2:]), kernel)
    if before != after:
        x = functional.pad(x, _flat_pads(before, after))
        before = (0,) * rank
    return _CONVOLUTIONS[rank](
        x, weight, bias, strides, before, dilations, attributes.get("group", 1)
    )


def _flat_pads(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]


def _conv(call: Call, x: Inputs) -> Outputs:
    kernel = tuple(x[1].shape[2:])
    if len(kernel) not in _CONVOLUTIONS:
        raise UnsupportedForm(f"{len(kernel)} spatial dimensions")
    return convolve(x[0], x[1], optional(x, 2), call.attributes, kernel)


def _conv_transpose(call: Call, x: Inputs) -> Outputs:
    rank = x[1].ndim - 2
    if rank not in _TRANSPOSED:
        raise UnsupportedForm(f"{rank} spatial dimensions")
    if (
        call.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        or "output_shape" in call.attributes
    ):
        raise UnsupportedForm("auto_pad or output_shape")
    strides = tuple(call.get("strides", (1,) * rank))
    dilations = tuple(call.get("dilations", (1,) * rank))
    extra = tuple(call.get("output_padding", (0,) * rank))
    pads = tuple(call.get("pads", (0,) * 2 * rank))
    # torch takes one pad per axis and bounds output_padding: compute the full output, then crop.
    full = _TRANSPOSED[rank](x[0], x[1], None, strides, 0, 0, call.get("group", 1), dilations)
    crop = _flat_pads(
        tuple(-p for p in pads[:rank]), tuple(e - p for e, p in zip(extra, pads[rank:]))
    )
    full = functional.pad(full, crop)
    bias = optional(x, 2)
    return full if bias is None else full + bias.reshape(-1, *(1,) * rank)


def _max_pool(call: Call, x: Inputs) -> Outputs:
    if call.outputs > 1:
        raise UnsupportedForm("the indices output")
    kernel = tuple(call.attributes["kernel_shape"])
    rank = len(kernel)
    before, after = window_pads(call.attributes, tuple(x[0].shape[2:]), kernel)
    padded = (
        functional.pad(x[0], _flat_pads(before, after), value=-math.inf)
        if any(before + after)
        else x[0]
    )
    strides = tuple(call.get("strides", (1,) * rank))
    dilations = tuple(call.get("dilations", (1,) * rank))
    return _MAXIMA[rank](padded, kernel, strides, 0, dilations, bool(call.get("ceil_mode", 0)))


def _average_pool(call: Call, x: Inputs) -> Outputs:
    kernel = tuple(call.attributes["kernel_shape"])
    rank = len(kernel)
    if any(d != 1 for d in call.get("dilations", ())):
        raise UnsupportedForm("dilations")
    before, after = window_pads(call.attributes, tuple(x[0].shape[2:]), kernel)
    strides = tuple(call.get("strides", (1,) * rank))
    ceil = bool(call.get("ceil_mode", 0))
    pool = _AVERAGES[rank]
    if before == after and not ceil:
        return pool(x[0], kernel, strides, before, False, bool(call.get("count_include_pad", 0)))
    if ceil:
        raise UnsupportedForm("ceil_mode")
    pads = _flat_pads(before, after)
    mean = pool(functional.pad(x[0], pads), kernel, strides)
    if call.get("count_include_pad", 0):
        return mean
    return mean / pool(functional.pad(torch.ones_like(x[0]), pads), kernel, strides)


def _global(function: Any) -> Operator:
    return lambda call, x: function(x[0], dim=tuple(range(2, x[0].ndim)), keepdim=True)


def _depth_to_space(call: Call, x: Inputs) -> Outputs:
    block = call.attributes["blocksize"]
    n, c, h, w = x[0].shape
    if call.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x[0], block)
    blocks = x[0].reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call, x: Inputs) -> Outputs:
    block = call.attributes["blocksize"]
    n, c, h, w = x[0].shape
    blocks = x[0].reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * block**2, h // block, w // block)


# --- resize


def _resize(call: Call, x: Inputs) -> Outputs:
    mode = call.get("mode", "nearest")
    if mode not in ("nearest", "linear") or call.get("antialias", 0):
        raise UnsupportedForm(f"mode={mode}, antialias={call.get('antialias', 0)}")
    if call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise UnsupportedForm("keep_aspect_ratio_policy")
    source = x[0]
    axes = [axis_index(source, a) for a in call.get("axes", range(source.ndim))]
    scales, sizes = optional(x, 2), optional(x, 3)
    result = source
    for position, axis in enumerate(axes):
        size = source.shape[axis]
        if sizes is not None and sizes.numel():
            new = int(sizes[position])
            scale = new / size
        else:
            scale = float(scales[position])
            new = math.floor(size * scale)
        if new != size or scale != 1.0:
            result = _resize_axis(call, result, axis, new, scale, mode)
    return result


def _resize_axis(call: Call, x: Any, axis: int, new: int, scale: float, mode: str) -> Any:
    size = x.shape[axis]
    # On the CPU on any device: its places decide the way below, and they are few.
    where = _source_coordinates(
        call.get("coordinate_transformation_mode", "half_pixel"), new, size, scale
    )
    if mode == "linear":
        low = torch.floor(where)
        fraction = (where - low).to(x.dtype).reshape(-1, *(1,) * (x.ndim - axis - 1))
        first = low.clamp(0, size - 1).long()
        second = (low + 1).clamp(0, size - 1).long()
        fraction, first, second = (
            one.to(x.device, non_blocking=True) for one in (fraction, first, second)
        )
        return torch.lerp(x.index_select(axis, first), x.index_select(axis, second), fraction)
    index = (
        _nearest(call.get("nearest_mode", "round_prefer_floor"), where).clamp(0, size - 1).long()
    )
    factor = new // size
    if factor * size == new and torch.equal(index, torch.arange(new) // max(factor, 1)):
        # The gradient of a broadcast is a sum, many times faster than that of an index.
        shape = list(x.shape)
        wide = x.unsqueeze(axis + 1).expand(*shape[: axis + 1], factor, *shape[axis + 1 :])
        return wide.reshape(*shape[:axis], new, *shape[axis + 1 :])
    return x.index_select(axis, index.to(x.device, non_blocking=True))


def _source_coordinates(form: str, new: int, size: int, scale: float) -> Any:
    at = torch.arange(
        new, dtype=torch.float32
    )  # as runtimes do: 3 / 0.6 is 5 in float32, 4.9999998 in float64
    if form == "half_pixel" or (form == "pytorch_half_pixel" and new > 1):
        return (at + 0.5) / scale - 0.5
    if form == "pytorch_half_pixel":
        return torch.zeros_like(at)
    if form == "asymmetric":
        return at / scale
    if form == "align_corners":
        return at * (size - 1) / (new - 1) if new > 1 else torch.zeros_like(at)
    if form == "half_pixel_symmetric":
        length = scale * size
        return size / 2 * (1 - new / length) + (at + 0.5) / scale - 0.5
    raise UnsupportedForm(f"coordinate_transformation_mode={form}")


def _nearest(form: str, where: Any) -> Any:
    if form == "round_prefer_floor":
        return torch.ceil(where - 0.5)
    if form == "round_prefer_ceil":
        return torch.floor(where + 0.5)
    if form == "floor":
        return torch.floor(where)
    if form == "ceil":
        return torch.ceil(where)
    raise UnsupportedForm(f"nearest_mode={form}")


# --- norms and attention
# -------------------------------------------------------------------------------------


def _instance_norm(call: Call, x: Inputs) -> Outputs:
    # Torch's layer norm over the space takes under half the time of its instance norm.
    normed = functional.layer_norm(x[0], x[0].shape[2:], eps=call.get("epsilon", 1e-5))
    channels = (-1, *(1,) * (x[0].ndim - 2))
    if x[0].device.type != "cpu":  # to look at the factors would wait for all work before
        return torch.addcmul(x[2].reshape(channels), normed, x[1].reshape(channels))
    if not (
        x[1].requires_grad or x[2].requires_grad or bool((x[1] != 1).any()) or bool(x[2].any())
    ):
        return normed  # as exporters write a group norm, whose factors follow
    return normed * x[1].reshape(channels) + x[2].reshape(channels)


def _group_norm(call: Call, x: Inputs) -> Outputs:
    groups = call.attributes["num_groups"]
    weight, bias = x[1], x[2]
    if call.opset < 21:  # one value per group before opset 21, one per channel since
        weight, bias = (v.repeat_interleave(x[0].shape[1] // groups) for v in (weight, bias))
    return functional.group_norm(x[0], groups, weight, bias, call.get("epsilon", 1e-5))


def _layer_norm(call: Call, x: Inputs) -> Outputs:
    if call.outputs > 1:
        raise UnsupportedForm("the mean and deviation outputs")
    shape = x[0].shape[axis_index(x[0], call.get("axis", -1)) :]
    weight, bias = x[1].expand(shape), optional(x, 2)
    bias = None if bias is None else bias.expand(shape)
    return functional.layer_norm(x[0], shape, weight, bias, call.get("epsilon", 1e-5))


def _rms_norm(call: Call, x: Inputs) -> Outputs:
    shape = x[0].shape[axis_index(x[0], call.get("axis", -1)) :]
    return functional.rms_norm(x[0], shape, x[1].expand(shape), call.get("epsilon", 1e-5))


def _batch_norm(call: Call, x: Inputs) -> Outputs:
    if call.get("training_mode", 0):
        raise UnsupportedForm("training_mode")
    return functional.batch_norm(
        x[0], x[3], x[4], x[1], x[2], False, 0.0, call.get("epsilon", 1e-5)
    )


def _attention(call: Call, x: Inputs) -> Outputs:
    """Attention of opset 23, without past, softcap or its intermediate outputs."""
    mask = optional(x, 3)
    if len(x) > 4 and any(v is not None for v in x[4:]):
        raise UnsupportedForm("past keys and values")
    if (
        call.outputs > 1
        or call.get("softcap", 0.0)
        or (mask is not None and call.get("is_causal", 0))
    ):
        raise UnsupportedForm("softcap, several outputs, or a mask with is_causal")
    q, k, v = x[:3]
    flat = q.ndim == 3
    if flat:
        heads, kv_heads = call.attributes["q_num_heads"], call.attributes["kv_num_heads"]
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (kv_heads, -1)).transpose(1, 2) for t in (k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    causal, scale = bool(call.get("is_causal", 0)), call.get("scale", None)
    out = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)
    return out.transpose(1, 2).flatten(2) if flat else out


OPERATORS: dict[str, Operator] = {
    **BASIC,
    "Attention": _attention,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MaxPool": _max_pool,
    "RMSNormalization": _rms_norm,
    "Resize": _resize,
    "SpaceToDepth": _space_to_depth,
}

__all__ = ["OPERATORS", "convolve", "integers"]
