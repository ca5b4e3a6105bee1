"""A GPU that computes shapes alone: what torch code must not do on one fails in it, on any machine.

Its tensors are torch's meta tensors. torch's own FakeTensorMode cannot stand for CUDA here: builds
for the CPU end the process where autograd meets such a tensor. A tensor that is read as a number, or
an operation on tensors of two devices, is an error; what is fetched as a whole is counted, and
comes as ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpq_deploy.onnx_torch import pass_memory, torch_graph
from mpq_deploy.system.compute import Compute, compute_on

GPU = torch.device("meta")
CPU = torch.device("cpu")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class FakeGpu(TorchDispatchMode):  # type: ignore[misc]
    """Checks devices; ``fetched`` counts the tensors that went from the GPU to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        places = {one.device.type for one in tensors}
        if func in COPIES:
            to_cpu = kwargs.get("device", None) == CPU or (
                func is COPIES[1] and args[0].device == CPU
            )
            if to_cpu and places - {"cpu"}:
                self.fetched += 1
                if func is COPIES[1]:
                    return args[0].fill_(1)
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.ones(args[0].shape, dtype=dtype)
        elif len(places) > 1:
            shapes = [(one.device.type, tuple(one.shape)) for one in tensors]
            raise AssertionError(f"{func} mixes devices: {shapes}")
        return func(*args, **kwargs)


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, free: int = 64 << 30) -> Iterator[FakeGpu]:
    """Compute on a fake GPU with ``free`` bytes in the block."""
    with monkeypatch.context() as patch:
        patch.setattr(Compute, "torch_device", lambda one: CPU if one.torch is None else GPU)
        patch.setattr(pass_memory, "free_bytes", lambda at: None if at == CPU else free)
        patch.setattr(torch_graph, "_storages", _storages)
        with compute_on(Compute(None, 0)), FakeGpu() as gpu:
            yield gpu


def _storages(values: Any) -> dict[int, int]:
    """As the graph's own, for tensors that have no place in memory."""
    pieces = [value.untyped_storage() for value in values.values()]
    return {piece._cdata: piece.nbytes() for piece in pieces}
