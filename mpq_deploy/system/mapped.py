"""Constants that are mapped from files: how to keep what was read of them from piling up in memory."""

from __future__ import annotations

import mmap

import onnx_ir as ir

# Not on every system; where it lacks, pages go when the system wants them back.
DROP = getattr(mmap, "MADV_DONTNEED", None)


def drop_pages(tensor: ir.TensorProtocol | None) -> None:
    """Drop a mapped constant from this process's memory; it is read again when needed.

    Arrays that were taken from it stay valid. Constants in memory are left as they are.
    """
    mapped = getattr(tensor, "raw", None)
    if DROP is not None and isinstance(mapped, mmap.mmap):
        mapped.madvise(DROP)


def drop_all_pages(model: ir.Model) -> None:
    """Take all mapped constants of ``model`` out of this process's memory."""
    for value in model.graph.initializers.values():
        drop_pages(value.const_value)
