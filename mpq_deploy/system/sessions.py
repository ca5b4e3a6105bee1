"""Open an ONNX Runtime session on a graph in memory without holding its weights twice.

In: an ``onnx_ir.Model`` whose large constants lie in memory-mapped files. Out: an InferenceSession.
The graph is handed over as bytes, in which constants name their files from the root of the file
system: ONNX Runtime maps those of the user where they lie, without a link or a copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array
from mpq_deploy.runtime.fused_attention import fuse_attention
from mpq_deploy.runtime.ort import (
    LARGE_WEIGHTS_BYTES,
    ORT_ERRORS,
    WEIGHTS_FOLDER,
    session_options,
    spare_memory,
)
from mpq_deploy.system.compute import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    Compute,
    compute_on,
    computing_on,
    out_of_memory,
    start_session,
)
from mpq_deploy.system.locks import scratch_folder
from mpq_deploy.system.progress import Talk

# Graphs whose constants are all in memory and below this are handed over as bytes, without any
# file.
IN_MEMORY_BYTES = 64 * 1024 * 1024
# Smaller constants stay inside the graph file, where shape inference can read them.
INLINE_BYTES = 1024
ALIGNMENT = 64
Made = TypeVar("Made")


@contextmanager
def open_session(
    model: ir.Model,
    talk: Talk,
    *,
    scratch: Path | None = None,
    threads: int = 0,
    optimize: bool = True,
) -> Iterator[ort.InferenceSession]:
    """Open a session on the compute device; ``model`` is consumed (constants may move to scratch files).

    ``scratch``: an existing folder, best on the disk of the weights (None: the system's). What is
    written there is removed at the end. ``optimize`` False makes a session that starts fast and
    runs slowly. Raises ModelError when ONNX Runtime refuses the graph.
    """
    options = _options(threads, optimize)
    if optimize and computing_on().providers == [CPU_PROVIDER]:
        fuse_attention(model)
    tensors = constants_of(model)
    external = any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    weights = sum(tensor.nbytes for tensor in tensors)
    if optimize and weights >= LARGE_WEIGHTS_BYTES:
        spare_memory(options)
    if not external and weights < IN_MEMORY_BYTES:
        yield _session(ir.to_proto(model).SerializeToString(), options)
        return
    with scratch_folder("session", scratch) as made:
        # From the root on: a relative one would seem to lie on another drive than the weights.
        folder = made.resolve()
        _write(model, folder, talk)
        options.add_session_config_entry(WEIGHTS_FOLDER, folder.anchor)
        yield _session(ir.to_proto(model).SerializeToString(), options)


def constants_of(model: ir.Model) -> list[ir.TensorProtocol]:
    """Return the constants of a model's graphs."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    return [value.const_value for value in values if value.const_value]


def shares_gpu(session: ort.InferenceSession) -> bool:
    """Whether a session runs on the GPU that torch computes on, so that torch may read its outputs there."""
    place = computing_on()
    one = place.runtime is not None and place.runtime == place.torch
    return one and CUDA_PROVIDER in session.get_providers()


def run_to_tensors(
    session: ort.InferenceSession, feed: Mapping[str, Array], shapes: Sequence[tuple[int, ...]]
) -> list[Any]:
    """Run a session; return its outputs, float32 of those ``shapes``, as tensors on torch's device."""
    import torch

    device, binding = computing_on().torch_device(), session.io_binding()
    place = {"device_type": device.type, "device_id": device.index or 0}
    given = {name: np.asarray(value, order="C") for name, value in feed.items()}
    for name, value in given.items():
        binding.bind_cpu_input(name, value)
    outputs = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    for output, tensor in zip(session.get_outputs(), outputs, strict=True):
        place |= {"shape": tuple(tensor.shape), "buffer_ptr": tensor.data_ptr()}
        binding.bind_output(output.name, element_type=np.float32, **place)
    if device.type == "cuda":
        # ONNX Runtime has a stream of its own: torch may still be reading what was in that memory.
        torch.cuda.current_stream(device).synchronize()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return outputs


def within_gpu_memory(work: Callable[[int], Made], size: int, what: str, talk: Talk) -> Made:
    """Return ``work(size)``, which opens sessions and runs ``size`` calls at once.

    Where the GPU's memory runs out it is done again with half as many, and at last on the CPU; both
    are said.
    """
    place, smaller = computing_on(), size
    while True:
        try:
            with compute_on(place):
                return work(smaller)
        except Exception as error:
            if place.runtime is None or not out_of_memory(error):
                raise
        # Outside of the handler: the error holds the session.
        smaller //= 2
        then = f"with {smaller} at once"
        if not smaller:
            place, smaller, then = Compute(), size, "on the CPU"
        talk.line(f"  {what}: the GPU's memory ran out; done again {then}")


def _options(threads: int, optimize: bool) -> ort.SessionOptions:
    """Return the options of calibration sessions.

    Nodes run in the order of the file where data allows: observers then run right after what they
    observe, while it is in the cache and before its memory is needed again. (The default order runs
    them last; on a 21 M parameter UNet that took twice the memory.)
    """
    options = session_options(threads)
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _session(source: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return start_session(source, options)
    except ORT_ERRORS as error:
        raise ModelError(
            f"ONNX Runtime cannot run the graph: {error}",
            "Check the model with onnx.checker, or export it again.",
        ) from error


def _write(model: ir.Model, folder: Path, talk: Talk) -> None:
    """Let constants name their files from the root; write large ones in memory into ``folder``."""
    copies: dict[Path, Path] = {}
    memory = folder / "memory.data"
    with memory.open("wb") as data:
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    source = Path(tensor.path).resolve()
                    if source not in copies:
                        copies[source] = _reachable(source, folder, len(copies), talk)
                    value.const_value = _external(
                        tensor, copies[source], tensor.offset, tensor.length
                    )
                elif tensor is not None and tensor.nbytes >= INLINE_BYTES:
                    data.write(b"\0" * (-data.tell() % ALIGNMENT))
                    offset = data.tell()
                    data.write(tensor.tobytes())
                    value.const_value = _external(tensor, memory, offset, tensor.nbytes)


def _external(
    tensor: ir.TensorProtocol, file: Path, offset: int | None, length: int | None
) -> ir.ExternalTensor:
    shape, root = ir.Shape(tensor.shape.numpy()), file.anchor
    location = file.relative_to(root).as_posix()
    return ir.ExternalTensor(
        location, offset, length, tensor.dtype, shape=shape, name=tensor.name or "", base_dir=root
    )


def _reachable(source: Path, folder: Path, number: int, talk: Talk) -> Path:
    """Return ``source``, or a copy in ``folder`` where another drive (Windows) has it."""
    if source.anchor == folder.anchor:
        return source
    talk.line(f"  copying {source.name} for ONNX Runtime: it lies on another drive")
    return Path(shutil.copyfile(source, folder / f"weights.{number}.data"))
