"""Read an ONNX file safely, and bring it to the form that the rest of the package expects.

In: a path. Out: an ``onnx_ir.Model`` whose weights stay on disk (memory-mapped) until they are
used.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mpq_deploy.errors import ModelError, MpqError
from mpq_deploy.graph.known_values import Sizes
from mpq_deploy.graph.mapped_tensor import map_apart
from mpq_deploy.graph.passes.attention_products import AttentionProductsPass
from mpq_deploy.graph.passes.base import run_passes
from mpq_deploy.graph.passes.finite_masks import FiniteMasksPass
from mpq_deploy.graph.passes.fold_branches import FoldBranchesPass
from mpq_deploy.graph.passes.fold_constants import FoldConstantsPass
from mpq_deploy.graph.passes.fold_positions import FoldPositionsPass
from mpq_deploy.graph.passes.fold_weights import FoldWeightsPass
from mpq_deploy.graph.passes.group_norm import GroupNormPass
from mpq_deploy.graph.passes.infer_types import InferTypesPass
from mpq_deploy.graph.passes.name_nodes import NameNodesPass
from mpq_deploy.graph.passes.open_batch import OpenBatchPass
from mpq_deploy.graph.passes.raise_opset import RaiseOpsetPass
from mpq_deploy.graph.passes.unroll_sequences import UnrollSequencesPass
from mpq_deploy.graph.passes.widen import WidenPass
from mpq_deploy.graph.sound import (
    check_bounds,
    plain_domains,
    refuse_sparse,
    refuse_unsound,
    tensor_bytes,
)
from mpq_deploy.system.hub_cache import hub_blobs
from mpq_deploy.system.inputs import open_input
from mpq_deploy.system.names import printable

# A protobuf file cannot be larger; such models keep their weights in a second file.
PROTOBUF_LIMIT = 2**31
# Lists of numbers up to this are shapes and axes, or a Resize's scales; larger ones are tables.
SIZES_BYTES = {
    onnx.TensorProto.INT32: 1024,
    onnx.TensorProto.INT64: 1024,
    onnx.TensorProto.FLOAT: 32,
}


def load_model(path: Path) -> ir.Model:
    """Return the model at ``path``; its external weights are memory-mapped, not read.

    Shapes, axes and limits that lie in a file are read: ONNX's inference follows no others.

    Raises ModelError when the file is missing, truncated or not ONNX, or when its external data is
    missing, too short or outside the model's folder.
    """
    proto = read_proto(path)
    refuse_sparse(proto, str(path))
    refuse_unsound(proto, str(path))
    inline_sizes(proto, path)
    try:
        model: ir.Model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} holds a graph that cannot be read: {_root_cause(error)}",
            "Check it with onnx.checker, and export it again.",
        ) from error
    ir.external_data.set_base_dir(model.graph, path.resolve().parent)
    map_apart(model)
    return model


def _root_cause(error: BaseException) -> str:
    """Return the first line of the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_proto(path: Path) -> onnx.ModelProto:
    """Return the file at ``path`` without external weights. Raises ModelError as ``load_model``."""
    with open_input(path, error=ModelError, hint="Give an ONNX file.") as file:
        size = os.fstat(file.fileno()).st_size
        if size >= PROTOBUF_LIMIT:
            raise ModelError(
                f"{path} has {size:,} bytes; protobuf files are limited to 2 GB.",
                "Save it with its weights as external data.",
            )
        proto = parse_proto(file.read(), str(path))
    check_external_data(proto, path)
    return proto


def parse_proto(content: bytes, name: str) -> onnx.ModelProto:
    """Parse ``content`` (``name`` in errors). Raises ModelError for no complete ONNX model."""
    hint = "The file is truncated or not an ONNX model: export or copy it again."
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(
            f"{name} ({len(content):,} bytes) cannot be read as ONNX: {error}.", hint
        ) from error
    if not proto.graph.node or not proto.graph.output or not proto.opset_import:
        raise ModelError(f"{name} ({len(content):,} bytes) holds no ONNX graph.", hint)
    check_bounds(proto, name)
    plain_domains(proto)
    return proto


def check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Raise ModelError unless every external tensor lies complete in the folder of ``path``.

    A model that is a link has its data beside the file that it links to. In a cache of the hub both
    are links into ``blobs/``: there the locations become the names of those files.
    """
    folder, blobs = path.resolve().parent, hub_blobs(path)
    sizes: dict[str, int] = {}
    for tensor in external_tensors(proto):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = (folder if blobs is None else path.parent) / location
        if location not in sizes:
            inside = not Path(location).is_absolute() and ".." not in Path(location).parts
            if not location or not inside or not file.resolve().is_relative_to(folder):
                raise ModelError(
                    f"The weight '{tensor.name}' of {path} is stored outside the model's folder, in '{location}'.",
                    "Put the data file beside the model and save the model with a plain file name as location.",
                )
            if not file.is_file():
                raise ModelError(
                    f"The weights of {path} are missing: there is no file '{location}' beside it.",
                    "Copy the data file together with the model.",
                )
            sizes[location] = file.stat().st_size
        needed = _end(tensor, entries, path)
        if sizes[location] < needed:
            open_input(file, error=ModelError).close()
            raise ModelError(
                f"'{location}' beside {path} has {sizes[location]:,} bytes, but '{tensor.name}' "
                f"ends at {needed:,}.",
                "The data file is truncated: export or copy it again.",
            )
        if blobs is not None:
            _locate_in(blobs, tensor, file)


def inline_sizes(proto: onnx.ModelProto, path: Path) -> bool:
    """Read external shapes, axes and limits into ``proto``, which ``read_proto`` gave for ``path``.

    Neither ONNX's shape inference nor ONNX Runtime's reads any from files. Returns whether there were any.
    """
    folder, read = path.resolve().parent, 0
    for tensor in external_tensors(proto):
        size, most = tensor_bytes(tensor), SIZES_BYTES.get(tensor.data_type, -1)
        if size is not None and len(tensor.dims) <= 1 and size <= most:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            with open_input(folder / entries["location"], error=ModelError) as file:
                file.seek(int(entries.get("offset", "0")))
                tensor.raw_data = file.read(size)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
            read += 1
    return read > 0


def _locate_in(blobs: Path, tensor: onnx.TensorProto, file: Path) -> None:
    """Make ``tensor`` refer to the file that the link ``file`` points to."""
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = file.resolve().relative_to(blobs).as_posix()


def _end(tensor: onnx.TensorProto, entries: dict[str, str], path: Path) -> int:
    """Return where a tensor's data ends in its file. Raises ModelError for an invalid offset or length."""
    numbers = [entries.get(key, "0") for key in ("offset", "length")]
    if not all(text.isascii() and text.isdecimal() and len(text) < 19 for text in numbers):
        raise ModelError(
            f"The weight '{tensor.name}' of {path} has the offset and length {numbers}.",
            "Export the model again.",
        )
    offset, length = map(int, numbers)
    size = tensor_bytes(tensor)
    if "length" in entries and size is not None and length != size:
        raise ModelError(
            f"The weight '{tensor.name}' of {path} has {length:,} bytes of data, and its shape "
            f"{list(tensor.dims)} needs {size:,}.",
            "Export the model again.",
        )
    return offset + (length if "length" in entries else size or 0)


def external_files(proto: onnx.ModelProto, path: Path) -> list[Path]:
    """Return the files in which the model at ``path``, as ``read_proto`` gave it, keeps its weights."""
    entries = [entry for tensor in external_tensors(proto) for entry in tensor.external_data]
    names = sorted({entry.value for entry in entries if entry.key == "location"})
    return [path.resolve().parent / name for name in names]


def external_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return the tensors with external data, also those of attributes, subgraphs and functions."""
    tensors = list(proto.graph.initializer)
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while nodes:
        for attribute in nodes.pop().attribute:
            tensors += [attribute.t, *attribute.tensors]
            for graph in [attribute.g, *attribute.graphs]:
                tensors += graph.initializer
                nodes += graph.node
    return [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]


def normalise(
    model: ir.Model, inputs: Sizes | None = None, fixed: Collection[str] = ()
) -> ir.Model:
    """Return ``model`` in its normal form; doing it twice changes nothing.

    ``inputs``: sizes of the graph's inputs by name, None for one that varies; they decide branches.
    ``fixed``: inputs of a fixed batch, which becomes any (``OpenBatchPass``).

    Then functions are inlined, branches folded, sequences tensors, Constant nodes are initializers, types known,
    floats FP32, masks finite, norms InstanceNormalization, shape operators folded into weights,
    node names unique, and the opset is 21 or later. Raises ModelError for other control flow, when
    the opset or a norm cannot be converted, or a type cannot be inferred.
    """
    opened = (*_FOLLOWED, OpenBatchPass(fixed)) if fixed else ()
    return _passed(model, (*_OPENED, FoldBranchesPass(inputs), *opened, *_WIDENED, *_REST))


def widened(model: ir.Model, inputs: Sizes | None = None) -> ir.Model:
    """Return ``model`` in FP32 with a name for each node: how ONNX Runtime runs a bfloat16 model.

    Raises ModelError as ``normalise`` does.
    """
    return _passed(model, (*_OPENED, FoldBranchesPass(inputs), *_WIDENED, NameNodesPass()))


def _passed(model: ir.Model, passes: Iterable[ir.passes.PassBase]) -> ir.Model:
    try:
        return run_passes(model, passes).model
    except MpqError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # Operators that onnx.checker lets pass, with attributes or weights that they cannot have.
        said = printable(" ".join(str(error).split())[:300])
        raise ModelError(
            f"The graph cannot be brought to its normal form: {said}.",
            "Run the model in ONNX Runtime, or export it again.",
        ) from error


_LIFT = common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
_OPENED: tuple[ir.passes.PassBase, ...] = (
    common_passes.InlinePass(),
    common_passes.RemoveInitializersFromInputsPass(),
    _LIFT,
)
_WIDENED: tuple[ir.passes.PassBase, ...] = (
    UnrollSequencesPass(),
    common_passes.IdentityEliminationPass(),
    InferTypesPass(),
    WidenPass(),
)
_FOLLOWED: tuple[ir.passes.PassBase, ...] = (
    UnrollSequencesPass(),
    common_passes.IdentityEliminationPass(),
    NameNodesPass(),
)
_REST: tuple[ir.passes.PassBase, ...] = (
    AttentionProductsPass(),
    FiniteMasksPass(),
    GroupNormPass(),
    FoldPositionsPass(),
    FoldWeightsPass(),
    FoldConstantsPass(),
    common_passes.RemoveUnusedNodesPass(),
    NameNodesPass(),
    RaiseOpsetPass(),
    # ONNX's converter writes what were attributes (axes, limits) as Constant nodes without names.
    _LIFT,
    NameNodesPass(),
    InferTypesPass(),
)
