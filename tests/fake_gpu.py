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
        self._made = dict[Any, tuple[Any, ...]]()

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
        return self._shaped(func, args, kwargs) if places == {"meta"} else func(*args, **kwargs)

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call ``func`` once per form of its arguments: torch takes 0.5 ms to find a shape in Python."""
        schema = func._schema
        in_place = torch.Tag.pointwise in func.tags and func.overloadpacket.__name__.endswith("_")
        if not in_place and (schema.is_mutable or any(one.alias_info for one in schema.returns)):
            return func(*args, **kwargs)
        key = func, _form(args), _form(tuple(kwargs.items()))
        made = self._made.get(key)
        if made is None:
            result = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and result.device == GPU:
                self._made[key] = _form(result)
            return result
        if in_place:
            return args[0]
        return torch.empty_strided(made[0], made[1], dtype=made[2], device=GPU)


def _form(value: Any) -> Any:
    """What the shape of a result depends on: of tensors theirs, their strides and types; all else as it is."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    return type(value), value


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
