"""Weights in a file, each of which maps its own bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]


class MappedTensor(ir.ExternalTensor):
    """An external tensor that maps its own bytes of the file.

    onnx_ir's own maps the whole file, once for each tensor: 686 weights of 3.4 GB are 2.4 TB of
    address space, which a limit (``ulimit -v``, some containers) refuses. Nothing is kept either:
    an array's map ends with the array. Whoever makes one has checked where the file lies
    (``graph.load``).
    """

    @classmethod
    def of(cls, tensor: ir.ExternalTensor, dtype: ir.DataType | None = None) -> MappedTensor:
        """Return ``tensor`` with its own map, its bytes read as ``dtype`` (None: its own type)."""
        return cls(
            tensor.location,
            tensor.offset,
            tensor.length,
            dtype or tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=tensor.base_dir,
        )

    def numpy(self) -> Array:
        """Return the values, mapped; those of less than 8 bits, and none at all, as onnx_ir does."""
        if self.dtype.bitwidth < 8 or not self.size:
            return np.asarray(super().numpy())
        kind = np.dtype(self.dtype.numpy()).newbyteorder("<")
        sizes = tuple(int(size) for size in self.shape.numpy())
        return np.asarray(np.memmap(self.path, kind, "r", self.offset or 0, sizes))

    def __array__(self, dtype: Any = None) -> Array:
        return np.asarray(self.numpy(), dtype)

    def tobytes(self) -> bytes:
        """Return the bytes as they lie in the file."""
        if self.dtype.bitwidth < 8 or not self.size:
            return bytes(super().tobytes())
        return self.numpy().tobytes()


def map_apart(model: ir.Model) -> None:
    """Let each external initializer of ``model`` map its own bytes."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if type(value.const_value) is ir.ExternalTensor:
                value.const_value = MappedTensor.of(value.const_value)
