"""Write graphs that share one weights file, and count the bytes of a file's constants."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir

from mpq_deploy.graph.mapped_tensor import MappedTensor

# Constants below this stay inside the graph file: shapes must be readable by shape inference.
EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 64


def save_sharing(models: dict[str, ir.Model], folder: Path, data_name: str) -> None:
    """Write each model as ``folder/name``; all refer to the same constants in ``folder/data_name``.

    The models hold equal initializers under equal names (ValueError when not), so that the bytes
    exist once; one may read them as another type. Tensors are written one by one; those that are
    one object in memory are written once.
    """
    first = next(iter(models.values()))
    external = _write_data(first, folder / data_name)
    for name, model in models.items():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            written = external.get(value.name or "")
            if tensor is None or (written is None and tensor.nbytes < EXTERNAL_FROM_BYTES):
                continue
            if written is not None and written.dtype != tensor.dtype:
                written = _read_as(written, tensor)
            if written is None or written.shape != tensor.shape:
                raise ValueError(
                    f"The constant '{value.name}' of {name} is not in the shared weights file."
                )
            value.const_value = written
        path = folder / name
        path.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


def _read_as(written: ir.ExternalTensor, tensor: ir.TensorProtocol) -> ir.ExternalTensor | None:
    """Return ``written`` as of the type of ``tensor``, whose bytes are the same; None where they are not."""
    if written.tobytes() != tensor.tobytes():
        return None
    return MappedTensor.of(written, tensor.dtype)


def _write_data(model: ir.Model, path: Path) -> dict[str, ir.ExternalTensor]:
    written: dict[str, ir.ExternalTensor] = {}
    places: dict[int, tuple[int, int]] = {}
    copies = Counter(id(value.const_value) for value in model.graph.initializers.values())
    with path.open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            # Copies of one tensor are external whatever their size: only there can they be stored
            # once.
            if tensor is None or (tensor.nbytes < EXTERNAL_FROM_BYTES and copies[id(tensor)] == 1):
                continue
            if id(tensor) not in places:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                start = file.tell()
                file.write(tensor.tobytes())
                places[id(tensor)] = (start, file.tell() - start)
            shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
            written[name] = MappedTensor(
                path.name,
                *places[id(tensor)],
                tensor.dtype,
                shape=shape,
                name=name,
                base_dir=path.parent,
            )
        file.flush()
        os.fsync(file.fileno())
    return written


def constant_bytes(path: Path, skipped: Collection[str] = ()) -> int:
    """Bytes of a file's constants , 4-bit ones packed.

    Tensors that lie at the same place of the external data count once; initializers named in
    ``skipped`` not at all.
    """
    model = onnx.load(path, load_external_data=False)
    places: set[tuple[str, int]] = set()
    total = 0
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in skipped]
    for node in (one for one in model.graph.node if one.op_type == "Constant"):
        constants += [one.t for one in node.attribute if one.type == onnx.AttributeProto.TENSOR]
    for tensor in constants:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            key = (place["location"], int(place.get("offset", 0)))
            if key in places:
                continue
            places.add(key)
            total += int(place["length"])
        else:
            bits = ir.DataType(tensor.data_type).bitwidth
            total += (prod(tensor.dims) * bits + 7) // 8
    return total


def repeated_bytes(path: Path) -> int:
    """Bytes of the constants of ``constant_bytes`` that equal another one.

    Builders may store them once. Only constants in external data are compared: the others are
    small.
    """
    model = onnx.load(path, load_external_data=False)
    alike: dict[tuple[int, tuple[int, ...], int], set[tuple[str, int]]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            key = (tensor.data_type, tuple(tensor.dims), int(place["length"]))
            alike.setdefault(key, set()).add((place["location"], int(place.get("offset", 0))))
    repeated = 0
    for (_, _, length), places in alike.items():
        if len(places) > 1:
            distinct = {
                _digest(path.parent / location, offset, length) for location, offset in places
            }
            repeated += length * (len(places) - len(distinct))
    return repeated


def widened_bytes(path: Path) -> int:
    """Bytes that builders add where they hold in FP32 what the file has in FP16, for nodes that compute in FP32."""
    model = onnx.load(path, load_external_data=False)
    halves = {
        tensor.name: 2 * prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT16
    }
    cast = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    return sum(size for name, size in halves.items() if name in cast)


def _digest(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.sha256(file.read(length)).digest()
