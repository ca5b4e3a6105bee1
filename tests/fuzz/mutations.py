"""Mutations of real files, drawn from a seeded generator: bytes, JSON, YAML, ONNX, arrays, weights."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import yaml

ESCAPE, TURN = "\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe"
ODD_TEXT = (
    *("", " ", "..", "../../escaped", "/etc/passwd", "~", "a\nb", "a\0b", ESCAPE, TURN, "nan"),
    *(
        "-1",
        "$(touch owned)",
        "`touch owned`",
        "'; touch owned #",
        "x" * 5000,
        "a.b",
        "{}",
        "\ud800",
    ),
    *(
        "<script>alert(1)</script>",
        "|a|b|",
        "%s%n",
        "C:\\x",
        "NUL",
        "pickle",
        "w4a16-b32",
        "[red]x",
    ),
)
ODD_NUMBERS = (0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.5, 1e308)
ODD_VALUES = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    float("nan"),
    float("inf"),
    1e-320,
)
TOKENS = (
    b"NaN",
    b"Infinity",
    b"[" * 300,
    b'{"a":' * 300,
    b"9" * 5000,
    b"\xff\xfe",
    b"\0",
    b"&a [*a]",
)


def mutated_bytes(content: bytes, draw: Random) -> bytes:
    """Flip, cut, repeat, insert or empty."""
    data = bytearray(content)
    kind = draw.randrange(6)
    if kind == 0:
        return b""
    if kind == 1:
        return bytes(data[: draw.randrange(len(data) + 1)])
    if kind == 2:
        place = draw.randrange(len(data) + 1)
        return bytes(data[:place]) + draw.choice(TOKENS) + bytes(data[place:])
    if kind == 3:
        start = draw.randrange(len(data) + 1)
        return bytes(data[:start] + data[start : start + 200] * 3 + data[start:])
    for _ in range(draw.choice((1, 1, 3, 30))):
        if data:
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def odd_value(draw: Random) -> Any:
    """Return a value that a field may not expect."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(ODD_TEXT)
    if kind == 1:
        return draw.choice(ODD_NUMBERS)
    if kind == 2:
        return json.loads("[" * 40 + "]" * 40) if draw.random() < 0.1 else draw.choice(ODD_VALUES)
    return [draw.choice(ODD_TEXT) for _ in range(draw.randrange(4))]


def mutated_values(values: Any, draw: Random) -> Any:
    """Return ``values`` of JSON or YAML with some of them replaced, removed, renamed or repeated."""
    values = json.loads(json.dumps(values))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        places = list(_places(values))
        if not places:
            return odd_value(draw)
        holder, key = draw.choice(places)
        kind = draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(ODD_TEXT)] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list):
            holder.insert(0, holder[key])
        elif kind == 3 and isinstance(holder[key], (int, float)):
            holder[key] = -holder[key] if draw.random() < 0.5 else str(holder[key])
        elif kind == 4:
            other, where = draw.choice(places)
            holder[key] = copy.deepcopy(other[where])
        else:
            holder[key] = odd_value(draw)
    return values


def _places(values: Any) -> Any:
    """Yield (holder, key) of every value below ``values``."""
    waiting = [values]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])


def mutated_json(content: bytes, draw: Random) -> bytes:
    """Mutate a JSON file by its values, or as bytes."""
    if draw.random() < 0.2:
        return mutated_bytes(content, draw)
    text = json.dumps(mutated_values(json.loads(content), draw), indent=1)
    if draw.random() < 0.1:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text.encode("utf-8", "surrogatepass" if draw.random() < 0.5 else "replace")


def mutated_yaml(content: bytes, draw: Random) -> bytes:
    """Mutate a YAML file by its values, or as bytes."""
    if draw.random() < 0.3:
        return mutated_bytes(content, draw)
    values = mutated_values(yaml.safe_load(content), draw)
    try:
        text = yaml.safe_dump(values, allow_unicode=draw.random() < 0.5)
    except (yaml.YAMLError, UnicodeError):
        text = json.dumps(values)
    if draw.random() < 0.1:
        text += draw.choice(("x: !!python/object:os.system x\n", "a: &b [*b]\n", "? [a]\n: 1\n"))
    return text.encode("utf-8", "replace")


def mutated_arrays(content: bytes, draw: Random) -> bytes:
    """Mutate a .npz: its zip, or arrays of other names, types, shapes and values."""
    if draw.random() < 0.3:
        return mutated_bytes(content, draw)
    with np.load(io.BytesIO(content)) as read:
        arrays = {name: read[name] for name in read.files}
    if not arrays:
        return mutated_bytes(content, draw)
    name = draw.choice(sorted(arrays))
    array = arrays[name]
    kind = draw.randrange(9)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[draw.choice(ODD_TEXT[:9]).replace("\0", "")] = array
    elif kind == 2:
        arrays[name] = array.reshape(-1)[: draw.randrange(3)]
    elif kind == 3:
        arrays[name] = array[..., None]
    elif kind == 4:
        arrays[name] = array.astype(draw.choice(("<U4", "i1", "f8", "c8", "?", "f2")))
    elif kind == 5 and array.dtype.kind == "f":
        arrays[name] = np.full_like(array, draw.choice((np.nan, np.inf, -1e30, 0)))
    elif kind == 6:
        arrays[name] = np.zeros((0, *array.shape[1:]), array.dtype)
    elif kind == 7:
        arrays[name] = np.asarray(draw.choice((-1, 10**9, 2**62)))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as file:
        for one, values in arrays.items():
            file.writestr(f"{one}.npy", _npy(values, draw))
    return out.getvalue()


def _npy(array: Any, draw: Random) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), allow_pickle=False)
    content = out.getvalue()
    if draw.random() < 0.1:
        place = content.find(b"'shape': (")
        content = content[: place + 10] + b"99999999999, " + content[place + 23 :]
    return content


def mutated_safetensors(content: bytes, draw: Random) -> bytes:
    """Mutate the header of a safetensors file by its values, or the file as bytes."""
    if draw.random() < 0.3:
        return mutated_bytes(content, draw)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(mutated_values(json.loads(content[8 : 8 + size]), draw)).encode()
    length = len(header) if draw.random() < 0.9 else draw.choice((0, 2**60, 5))
    return struct.pack("<Q", length) + header + content[8 + size :]


def mutated_onnx(content: bytes, draw: Random) -> bytes:
    """Mutate a model by its nodes, names, shapes, types, attributes and weights, or as bytes."""
    if draw.random() < 0.1:
        return mutated_bytes(content, draw)
    model = onnx.load_from_string(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        try:
            draw.choice(_ONNX)(model, draw)
        except (ValueError, IndexError, TypeError):
            continue
    return model.SerializeToString()


def _names(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    made = [name for node in graph.node for name in node.output]
    given = [one.name for one in (*graph.initializer, *graph.input)]
    return [*made, *given, "", "nothing", f"x{ESCAPE}"]


def _node_input(model: onnx.ModelProto, draw: Random) -> None:
    node = draw.choice(model.graph.node)
    node.input[draw.randrange(len(node.input))] = draw.choice(_names(model))


def _node_output(model: onnx.ModelProto, draw: Random) -> None:
    node = draw.choice(model.graph.node)
    node.output[draw.randrange(len(node.output))] = draw.choice(_names(model))


OPERATORS = (
    *("Conv", "MatMul", "Gemm", "Add", "DequantizeLinear", "QuantizeLinear", "Reshape", "Resize"),
    *("Concat", "Softmax", "LayerNormalization", "Nope", "If", "Loop", "Constant", "Attention"),
    *("Cast", "Gather", "GroupNormalization", "Transpose", "Slice", "Identity", "ConstantOfShape"),
    *("Expand", "Tile", "Range", "Squeeze", "Unsqueeze", "Flatten", "RandomNormal"),
)


def _operator(model: onnx.ModelProto, draw: Random) -> None:
    node = draw.choice(model.graph.node)
    if draw.random() < 0.7:
        node.op_type = draw.choice(OPERATORS)
    else:
        node.domain = draw.choice(("", "ai.onnx", "com.microsoft", "trt", "x", ESCAPE))


def _order(model: onnx.ModelProto, draw: Random) -> None:
    nodes, kind = list(model.graph.node), draw.randrange(3)
    if kind == 0:
        del nodes[draw.randrange(len(nodes))]
    elif kind == 1:
        nodes.append(draw.choice(nodes))
    else:
        draw.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _weight(model: onnx.ModelProto, draw: Random) -> None:
    weights = model.graph.initializer
    tensor, kind = draw.choice(weights), draw.randrange(6)
    if kind == 0 and tensor.dims:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice((0, -1, 1, 3, 2**40, 2**63 - 1))
    elif kind == 1:
        tensor.data_type = draw.choice([*range(24), 99])
    elif kind == 2:
        tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]
    elif kind == 3:
        weights.append(tensor)
    elif kind == 4:
        weights.remove(tensor)
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", draw.choice(("w.bin", "../w.bin", "/etc/passwd", "/dev/zero", ""))),
            ("offset", draw.choice(("0", "-4", "x", "9" * 25))),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value


def _attribute(model: onnx.ModelProto, draw: Random) -> None:
    node = draw.choice(model.graph.node)
    if node.attribute and draw.random() < 0.7:
        attribute = draw.choice(node.attribute)
        kind = draw.randrange(4)
        if kind == 0:
            attribute.i = draw.choice((0, -1, 7, 10**9, 2**62))
        elif kind == 1 and attribute.ints:
            attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice((0, -1, 3, 10**9))
        elif kind == 2:
            attribute.type = draw.randrange(1, 15)
        else:
            node.attribute.remove(attribute)
        return
    attribute = node.attribute.add()
    attribute.name = draw.choice(("axis", "block_size", "group", "pads", "to", "value", "perm", ""))
    attribute.type = draw.choice((1, 2, 3, 4, 7))
    attribute.i = draw.choice((-5, 0, 1, 64))
    attribute.ints.extend((1, -2, 3))


def _value(model: onnx.ModelProto, draw: Random) -> None:
    value = draw.choice([*model.graph.input, *model.graph.output])
    kind, tensor = draw.randrange(3), value.type.tensor_type
    if kind == 0:
        value.name = draw.choice(_names(model))
    elif kind == 1:
        tensor.elem_type = draw.randrange(25)
    else:
        sizes = tensor.shape.dim
        sizes[draw.randrange(len(sizes))].dim_value = draw.choice((-1, 0, 7, 2**50))


def _version(model: onnx.ModelProto, draw: Random) -> None:
    if draw.random() < 0.5:
        model.opset_import[0].version = draw.choice((-4, 0, 1, 9, 13, 18, 25, 30))
    else:
        model.ir_version = draw.choice((0, 1, 3, 4, 8, 99, -1))


def _functions(model: onnx.ModelProto, draw: Random) -> None:
    """Wrap a node's operator into functions that call each other twice, or themselves."""
    depth = draw.choice((1, 3, 24))
    node = draw.choice(model.graph.node)
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    opsets = list(model.opset_import)
    for level in range(depth):
        last = level == depth - 1
        op = ("f0" if draw.random() < 0.2 else "Relu") if last else f"f{level + 1}"
        domain = "own" if op[0] == "f" else ""
        nodes = [
            onnx.helper.make_node(op, ["a"], ["v"], domain=domain),
            onnx.helper.make_node(op, ["v"], ["b"], domain=domain),
        ]
        function = onnx.helper.make_function("own", f"f{level}", ["a"], ["b"], nodes, opsets)
        model.functions.append(function)
    node.op_type, node.domain = "f0", "own"


_ONNX = (
    *(_node_input, _node_output, _operator, _operator, _order, _weight, _weight),
    *(_attribute, _attribute, _value, _version, _functions),
)


def mutated_file(path: Path, draw: Random) -> None:
    """Mutate a file in place, by what its name says it is."""
    kinds = {
        ".json": mutated_json,
        ".yaml": mutated_yaml,
        ".npz": mutated_arrays,
        ".onnx": mutated_onnx,
        ".safetensors": mutated_safetensors,
    }
    content = path.read_bytes()
    try:
        made = kinds.get(path.suffix, mutated_bytes)(content, draw)
    except (ValueError, KeyError, yaml.YAMLError):
        made = mutated_bytes(content, draw)
    path.write_bytes(made)
