"""Open an ONNX Runtime session on a graph in memory without holding its weights twice.

In: an ``onnx_ir.Model`` whose large constants lie in memory-mapped files. Out: an InferenceSession.
ONNX Runtime reads external data only from below the graph file's own folder, so a scratch folder
gets the graph and a hard link to each data file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from mpq_deploy.errors import ModelError
from mpq_deploy.runtime.ort import LARGE_WEIGHTS_BYTES, ORT_ERRORS, session_options, spare_memory
from mpq_deploy.system.progress import Talk

# Graphs whose constants are all in memory and below this are handed over as bytes, without any
# file.
IN_MEMORY_BYTES = 64 * 1024 * 1024
# Smaller constants stay inside the graph file, where shape inference can read them.
INLINE_BYTES = 1024
ALIGNMENT = 64


@contextmanager
def open_session(
    model: ir.Model,
    talk: Talk,
    *,
    scratch: Path | None = None,
    threads: int = 0,
    optimize: bool = True,
) -> Iterator[ort.InferenceSession]:
    """Open a session on the CPU; ``model`` is consumed (constants may move to scratch files).

    ``scratch``: an existing folder, best on the disk of the weights (None: the system's). What is
    written there is removed at the end. ``optimize`` False makes a session that starts fast and
    runs slowly. Raises ModelError when ONNX Runtime refuses the graph.
    """
    options = _options(threads, optimize)
    tensors = [
        v.const_value for g in model.graphs() for v in g.initializers.values() if v.const_value
    ]
    external = any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    weights = sum(tensor.nbytes for tensor in tensors)
    if optimize and weights >= LARGE_WEIGHTS_BYTES:
        spare_memory(options)
    if not external and weights < IN_MEMORY_BYTES:
        yield _session(ir.to_proto(model).SerializeToString(), options)
        return
    # Windows removes no file that ONNX Runtime has mapped.
    windows = os.name == "nt"
    with tempfile.TemporaryDirectory(
        prefix="session-", dir=scratch, ignore_cleanup_errors=windows
    ) as folder:
        _write(model, Path(folder), talk)
        yield _session(str(Path(folder) / "model.onnx"), options)


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
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise ModelError(
            f"ONNX Runtime cannot run the graph: {error}",
            "Check the model with onnx.checker, or export it again.",
        ) from error


def _write(model: ir.Model, folder: Path, talk: Talk) -> None:
    """Write ``model`` into ``folder``: data files are linked, large constants in memory written to one file."""
    links: dict[Path, str] = {}
    with (folder / "memory.data").open("wb") as data:
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    source = Path(tensor.path)
                    if source not in links:
                        links[source] = f"weights.{len(links)}.data"
                        _link(source, folder / links[source], talk)
                    value.const_value = _external(
                        tensor, links[source], tensor.offset, tensor.length, folder
                    )
                elif tensor is not None and tensor.nbytes >= INLINE_BYTES:
                    data.write(b"\0" * (-data.tell() % ALIGNMENT))
                    offset = data.tell()
                    data.write(tensor.tobytes())
                    value.const_value = _external(
                        tensor, "memory.data", offset, tensor.nbytes, folder
                    )
    (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())


def _external(
    tensor: ir.TensorProtocol, location: str, offset: int | None, length: int | None, folder: Path
) -> ir.ExternalTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(
        location, offset, length, tensor.dtype, shape=shape, name=tensor.name or "", base_dir=folder
    )


def _link(source: Path, target: Path, talk: Talk) -> None:
    # A link to a symbolic link would dangle once it is moved: link what it points to.
    resolved = source.resolve()
    try:
        os.link(resolved, target)
    except OSError as error:
        talk.line(
            f"  copying {source.name} for ONNX Runtime: it cannot be linked ({error.strerror})"
        )
        shutil.copyfile(resolved, target)
