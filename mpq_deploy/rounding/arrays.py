"""One array interface for rounding: NumPy arrays on the CPU, torch tensors on a GPU.

``names_of(x)`` returns NumPy for an array, and for a tensor an object with NumPy's function names
that computes on the tensor's device. So each algorithm is written once, and its results on the CPU
are NumPy's, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array

# Rows that are rounded side by side take at most GPU_SHARE of a GPU's free memory; the rest is for
# the Hessian and the weight. ROW_BYTES: bytes per element of such a row while scales are refined
# (counted from the arrays: step, error, levels and their temporaries).
GPU_SHARE, ROW_BYTES = 0.5, 32


class TorchNames:
    """torch under those NumPy names and arguments that rounding uses, on one ``device``."""

    def __init__(self, device: Any) -> None:
        import torch

        self._torch, self.device = torch, device

    def __getattr__(self, name: str) -> Any:
        """Return torch's own function, for the names that torch and NumPy share."""
        return getattr(self._torch, name)

    def asarray(self, values: Any, dtype: Any = None) -> Any:
        """Return ``values`` as a tensor on the device; arrays are copied."""
        kind = None if dtype is None else self.dtype(dtype)
        if isinstance(values, self._torch.Tensor):
            return values.to(self.device, kind)
        return self._torch.tensor(np.ascontiguousarray(values), dtype=kind, device=self.device)

    def dtype(self, kind: Any) -> Any:
        """Return the torch dtype for a NumPy dtype; a torch dtype is returned unchanged."""
        if isinstance(kind, self._torch.dtype):
            return kind
        return getattr(self._torch, np.dtype(kind).name)

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return an uninitialized tensor."""
        return self._torch.empty(shape, dtype=self.dtype(dtype), device=self.device)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> Any:
        """Return a tensor of zeros."""
        return self._torch.zeros(shape, dtype=self.dtype(dtype), device=self.device)

    def eye(self, size: int) -> Any:
        """Return the identity matrix."""
        return self._torch.eye(size, device=self.device)

    def arange(self, *limits: int) -> Any:
        """Return a range of integers."""
        return self._torch.arange(*limits, device=self.device)

    def rint(self, x: Any, out: Any = None) -> Any:
        """Round to integers, ties to even."""
        return self._torch.round(x, out=out)

    def maximum(self, x: Any, y: Any, out: Any = None) -> Any:
        """Return the elementwise maximum; ``y`` may be one number."""
        if isinstance(y, self._torch.Tensor):
            return self._torch.maximum(x, y, out=out)
        return self._torch.clamp(x, min=y.item() if isinstance(y, np.generic) else y, out=out)

    def ldexp(self, x: Any, exponent: Any) -> Any:
        """Return x * 2^exponent, exactly for a normal 2^exponent; ``torch.ldexp`` may round."""
        if isinstance(exponent, int):
            return x * 2.0**exponent
        return x * ((exponent + 127) << 23).to(self._torch.int32).view(self._torch.float32)

    def argsort(self, x: Any, kind: str) -> Any:
        """Return the indices that sort ``x``."""
        return self._torch.argsort(x, stable=kind == "stable")

    def ascontiguousarray(self, x: Any, dtype: Any = None) -> Any:
        """Return ``x`` contiguous in memory, in row-major order."""
        return (x if dtype is None else x.to(self.dtype(dtype))).contiguous()

    def repeat(self, x: Any, count: int, axis: int) -> Any:
        """Repeat each element along ``axis``."""
        return self._torch.repeat_interleave(x, count, dim=axis)

    def flip(self, x: Any, axis: int | None = None) -> Any:
        """Reverse one axis, or all axes."""
        return self._torch.flip(x, tuple(range(x.ndim)) if axis is None else (axis,))

    def fill_diagonal(self, matrix: Any, values: Any) -> None:
        """Write ``values`` onto the diagonal."""
        place = self._torch.diagonal(matrix)
        place[:] = values


def names_of(x: Any) -> Any:
    """Return NumPy for an array, ``TorchNames`` on its device for a tensor."""
    return np if isinstance(x, (np.ndarray, np.generic)) else TorchNames(x.device)


def cast(x: Any, dtype: Any) -> Any:
    """Return a copy of ``x`` with the NumPy ``dtype``."""
    if isinstance(x, (np.ndarray, np.generic)):
        return x.astype(dtype)
    return x.to(TorchNames(x.device).dtype(dtype), copy=True)


def placed(array: Array) -> Any:
    """Return ``array`` where this process computes: itself on the CPU, a tensor on the GPU."""
    from mpq_deploy.system.compute import computing_on

    place = computing_on()
    if place.torch is None or not isinstance(array, np.ndarray):
        return array
    return TorchNames(place.torch_device()).asarray(array)


def fetched(x: Any) -> Array:
    """Return ``x`` as a NumPy array."""
    return x if isinstance(x, np.ndarray) else np.asarray(x.cpu().numpy())


def rows_that_fit(device: Any, rows: int, columns: int) -> int:
    """Return how many rows of ``columns`` elements fit the free memory of ``device`` together.

    At least ``rows``, the output channels of one form; on the CPU exactly these.
    """
    from mpq_deploy.system.gpu_memory import free_bytes

    free = free_bytes(device)
    return rows if free is None else max(rows, int(GPU_SHARE * free) // (ROW_BYTES * columns))
