"""The padding that an ONNX window operator (Conv, pooling) asks for, from its attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def window_pads(
    attributes: Mapping[str, Any], size: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding (before, after) per spatial axis of an input of spatial shape ``size``.

    ``attributes``: strides, dilations, pads (begins, then ends) and auto_pad, as in ONNX.
    """
    rank = len(kernel)
    strides = attributes.get("strides", (1,) * rank)
    dilations = attributes.get("dilations", (1,) * rank)
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = tuple(attributes.get("pads", (0,) * 2 * rank))
        return pads[:rank], pads[rank:]
    if mode == "VALID":
        return (0,) * rank, (0,) * rank
    before, after = [], []
    for n, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // stride) - 1) * stride + (k - 1) * dilation + 1 - n, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return tuple(before), tuple(after)
