"""Small floats as the ONNX types define them: E4M3 (FLOAT8E4M3FN) and E2M1 (FLOAT4E2M1).

The bits of a code are sign, exponent, mantissa, from the highest; neither type has infinities.
Rounding is to nearest, ties to even, and saturates, as in QuantizeLinear. Sources: ONNX, "Float
stored in 8 bits" (E4M3FN: bias 7, largest 448, 0x7F is NaN) and "4 bit floating point" (E2M1: bias
1, largest 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.rounding.arrays import TorchNames, cast, names_of

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array


@dataclass(frozen=True)
class Minifloat:
    """A float type of ``bits`` bits with ``mantissa_bits``; ``largest``: its largest value.

    ``smallest_exponent``: that of the smallest normal number; ``onnx``: name and number in ONNX.
    """

    name: str
    bits: int
    mantissa_bits: int
    smallest_exponent: int
    largest: float
    onnx: tuple[str, int]

    def nearest(self, x: Any, xp: Any) -> Any:
        """Return the nearest value to each of ``x``; ``xp``: NumPy or torch, as ``x``."""
        _, exponent = xp.frexp(x)
        step = xp.clip(exponent - 1, self.smallest_exponent, None) - self.mantissa_bits
        rounded = xp.ldexp(xp.round(xp.ldexp(x, -step)), step)
        return xp.clip(rounded, -self.largest, self.largest)

    def encode(self, x: Array) -> Array:
        """Return the codes uint8 of the values nearest to ``x``; zeros are positive."""
        if not isinstance(x, (np.ndarray, np.generic)):
            return self._encoded(x)
        size = np.minimum(np.abs(np.asarray(x, np.float32)), np.float32(self.largest))
        _, exponent = np.frexp(size)
        exponent = np.maximum(
            np.where(size > 0, exponent - 1, self.smallest_exponent), self.smallest_exponent
        )
        mantissa = np.rint(np.ldexp(size, self.mantissa_bits - exponent)).astype(np.int32)
        # A mantissa that rounds up to the next power of two carries into the exponent.
        codes = ((exponent - self.smallest_exponent) << self.mantissa_bits) + mantissa
        sign = (np.signbit(x) & (codes > 0)).astype(np.int32) << (self.bits - 1)
        return np.asarray((codes + sign).astype(np.uint8))

    def multiples(self, wanted: Any, step: Any) -> tuple[Any, Any]:
        """Return the codes nearest to ``wanted`` / ``step``, and their values times ``step``."""
        codes = self.encode(wanted / step)
        return codes, self.decode(codes) * step

    def _encoded(self, x: Any) -> Any:
        """Return ``encode`` of a torch tensor, by binary search in the rounding boundaries."""
        xp = names_of(x)
        _, ends = _tables(self, x.device)
        codes = xp.bucketize(xp.abs(x), ends)
        return cast(codes + (x < 0) * (codes > 0) * 2 ** (self.bits - 1), np.uint8)

    @cached_property
    def _ends(self) -> Array:
        """The largest magnitude that rounds to each code but the last, float32; ties to even."""
        sizes = self.values[: 2 ** (self.bits - 1)]
        sizes = sizes[np.isfinite(sizes)]
        halfway = (sizes[1:] + sizes[:-1]) / 2
        halfway[1::2] = np.nextafter(halfway[1::2], np.float32(0))
        return halfway

    def decode(self, codes: Array) -> Array:
        """Return the values float32 of ``codes``."""
        if isinstance(codes, (np.ndarray, np.generic)):
            return np.asarray(self.values[codes])
        values, _ = _tables(self, codes.device)
        # torch takes a uint8 index as a mask.
        return values[cast(codes, np.int64)]

    @cached_property
    def values(self) -> Array:
        """The value of every code, float32 [2^bits]; NaN above ``largest``."""
        half = np.arange(2 ** (self.bits - 1))
        exponent, mantissa = half >> self.mantissa_bits, half & (2**self.mantissa_bits - 1)
        normal = exponent > 0
        significand = mantissa + np.where(normal, 2**self.mantissa_bits, 0)
        power = np.maximum(exponent - 1, 0) + self.smallest_exponent - self.mantissa_bits
        sizes = np.ldexp(significand.astype(np.float32), power)
        sizes = np.where(sizes > self.largest, np.nan, sizes)
        return np.asarray(np.concatenate([sizes, -sizes]), np.float32)


@cache
def _tables(kind: Minifloat, device: Any) -> tuple[Any, Any]:
    """Return the values of codes and the rounding boundaries as tensors on ``device``."""
    xp = TorchNames(device)
    return xp.asarray(kind.values), xp.asarray(kind._ends)


E4M3 = Minifloat("e4m3", 8, 3, -6, 448.0, ("FLOAT8E4M3FN", 17))
E2M1 = Minifloat("e2m1", 4, 1, 0, 6.0, ("FLOAT4E2M1", 23))
