"""What rounding is written in: NumPy's arrays, or torch's tensors on the GPU that this process computes on.

``names_of`` gives NumPy for an array, and for a tensor what has NumPy's names on the tensor's
device. So an algorithm is written once, and gives on the CPU the bytes that NumPy gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array

# Of a GPU's free memory, rows that are rounded side by side take at most this share; each column of
# one takes so many bytes while scales are refined (counted from the arrays: its step, error and
# levels, and what they are made of). The rest is the Hessian's and the weight's.
GPU_SHARE, ROW_BYTES = 0.5, 32


class TorchNames:
    """torch by the names and arguments of NumPy that rounding uses, on one ``device``."""

    def __init__(self, device: Any) -> None:
        import torch

        self._torch, self.device = torch, device

    def __getattr__(self, name: str) -> Any:
        """Most names are the same."""
        return getattr(self._torch, name)

    def asarray(self, values: Any, dtype: Any = None) -> Any:
        """Return a tensor of its own on the device."""
        kind = None if dtype is None else self.dtype(dtype)
        if isinstance(values, self._torch.Tensor):
            return values.to(self.device, kind)
        return self._torch.tensor(np.ascontiguousarray(values), dtype=kind, device=self.device)

    def dtype(self, kind: Any) -> Any:
        """Return torch's type for NumPy's, or itself."""
        if isinstance(kind, self._torch.dtype):
            return kind
        return getattr(self._torch, np.dtype(kind).name)

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return a tensor that is not filled."""
        return self._torch.empty(shape, dtype=self.dtype(dtype), device=self.device)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> Any:
        """Return a tensor of zeros."""
        return self._torch.zeros(shape, dtype=self.dtype(dtype), device=self.device)

    def eye(self, size: int) -> Any:
        """Return the identity."""
        return self._torch.eye(size, device=self.device)

    def arange(self, *limits: int) -> Any:
        """Return whole numbers."""
        return self._torch.arange(*limits, device=self.device)

    def rint(self, x: Any, out: Any = None) -> Any:
        """Round to whole numbers, ties to even."""
        return self._torch.round(x, out=out)

    def maximum(self, x: Any, y: Any, out: Any = None) -> Any:
        """Return the larger of each; ``y`` may be one number."""
        if isinstance(y, self._torch.Tensor):
            return self._torch.maximum(x, y, out=out)
        return self._torch.clamp(x, min=y.item() if isinstance(y, np.generic) else y, out=out)

    def ldexp(self, x: Any, exponent: Any) -> Any:
        """Return x times 2^exponent, an exponent of normal numbers; torch's own takes a power, which may round."""
        if isinstance(exponent, int):
            return x * 2.0**exponent
        return x * ((exponent + 127) << 23).to(self._torch.int32).view(self._torch.float32)

    def argsort(self, x: Any, kind: str) -> Any:
        """Return where the sorted numbers lie."""
        return self._torch.argsort(x, stable=kind == "stable")

    def ascontiguousarray(self, x: Any, dtype: Any = None) -> Any:
        """Return ``x`` as it lies in memory row by row."""
        return (x if dtype is None else x.to(self.dtype(dtype))).contiguous()

    def repeat(self, x: Any, count: int, axis: int) -> Any:
        """Repeat each of what lies along ``axis``."""
        return self._torch.repeat_interleave(x, count, dim=axis)

    def flip(self, x: Any, axis: int | None = None) -> Any:
        """Reverse an axis, or every one."""
        return self._torch.flip(x, tuple(range(x.ndim)) if axis is None else (axis,))

    def fill_diagonal(self, matrix: Any, values: Any) -> None:
        """Write ``values`` onto the diagonal."""
        place = self._torch.diagonal(matrix)
        place[:] = values


def names_of(x: Any) -> Any:
    """Return what has NumPy's names for ``x``: NumPy for an array."""
    return np if isinstance(x, (np.ndarray, np.generic)) else TorchNames(x.device)


def cast(x: Any, dtype: Any) -> Any:
    """Return ``x`` of NumPy's ``dtype``, a copy."""
    if isinstance(x, (np.ndarray, np.generic)):
        return x.astype(dtype)
    return x.to(TorchNames(x.device).dtype(dtype), copy=True)


def placed(array: Array) -> Any:
    """Return ``array`` where rounding computes: itself on the CPU, a tensor on the GPU."""
    from mpq_deploy.system.compute import computing_on

    place = computing_on()
    if place.torch is None or not isinstance(array, np.ndarray):
        return array
    return TorchNames(place.torch_device()).asarray(array)


def fetched(x: Any) -> Array:
    """Return ``x`` as an array of NumPy."""
    return x if isinstance(x, np.ndarray) else np.asarray(x.cpu().numpy())


def rows_that_fit(device: Any, rows: int, columns: int) -> int:
    """Return how many rows of grids, each of ``columns``, fit the free memory of ``device`` side by side.

    At least the ``rows`` of one form.
    """
    from mpq_deploy.system.gpu_memory import free_bytes

    free = free_bytes(device)
    return rows if free is None else max(rows, int(GPU_SHARE * free) // (ROW_BYTES * columns))
