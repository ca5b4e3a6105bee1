"""Checks of an untrusted ONNX file, made before anything is expanded or allocated.

In: a parsed file. Out: nothing, a ModelError, or what ``onnx.checker`` says of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from math import prod

import onnx
import onnx.checker
import onnx.shape_inference
import onnx_ir as ir
from onnx import TensorProto

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.system.names import checked_name, printable

# Nodes of a graph with all functions expanded (our choice: SDXL's UNet has some ten thousand).
LARGEST_GRAPH = 1_000_000
# Numbers that all Concats of constants make together (our choice: they join shapes and biases).
LARGEST_CONSTANTS = 10_000_000
# Subgraphs within subgraphs.
DEPTH = 16
# Constants up to this are handed to ONNX's shape inference, and integers up to the second size, for
# shapes and axes are integers.
SMALL_BYTES = 1024
SMALL_INTEGER_BYTES = 1 << 18
DATA_TYPES = frozenset(TensorProto.DataType.values())
# The domain of nodes that ``set_apart_unknown`` has set apart.
UNKNOWN = "unknown"
_NODE = re.compile(r"Name: (.*?) OpType: (\S+)")

Nodes = Iterable[onnx.NodeProto]
Function = tuple[str, str, str]


def check_bounds(proto: onnx.ModelProto, name: str) -> None:
    """Raise ModelError for what would hang, fill the memory or garble a terminal.

    That is: opsets that are no version, recursive functions, more than ``LARGEST_GRAPH`` nodes once
    functions are expanded, subgraphs nested beyond ``DEPTH``, tensors of negative size or unknown
    type, and names with control characters; in functions as well. ``name``: the file, for errors.
    """
    functions = list(proto.functions)
    for entry in (*proto.opset_import, *(e for one in functions for e in one.opset_import)):
        _check_name(entry.domain, "domain", name)
        _check_version(entry, name)
    _check_expansion(proto, name)
    for function in functions:
        for one in (function.name, function.domain, *function.input, *function.output):
            _check_name(one, "function", name)
    graphs = [proto.graph]
    for nodes in (proto.graph.node, *(function.node for function in functions)):
        for node in _nodes(nodes, name):
            for one in (node.name, node.op_type, node.domain, *node.input, *node.output):
                _check_name(one, "node", name)
            for attribute in node.attribute:
                graphs += (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ()))
                for tensor in (
                    *([attribute.t] if attribute.HasField("t") else ()),
                    *attribute.tensors,
                ):
                    _check_tensor(tensor, name)
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_name(value.name, "value", name)
        for tensor in graph.initializer:
            _check_name(tensor.name, "weight", name)
            _check_tensor(tensor, name)


def plain_domains(proto: onnx.ModelProto) -> None:
    """Give ONNX's own operators the shorter one of the two names of their domain."""
    for model in (proto, *proto.functions):
        nodes = proto.graph.node if model is proto else model.node
        for node in _nodes(nodes, "the graph"):
            if node.domain in STANDARD_DOMAINS:
                node.domain = ""
        for entry in model.opset_import:
            if entry.domain in STANDARD_DOMAINS:
                entry.domain = ""


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a small copy of ``proto`` in which larger constants are inputs of their type and shape.

    Before IR version 4 all constants had to be inputs, too; here they are not.
    """
    version = max(proto.ir_version, 4)
    light = onnx.ModelProto(ir_version=version, opset_import=proto.opset_import)
    light.functions.extend(proto.functions)
    light.metadata_props.extend(proto.metadata_props)
    graph, given = light.graph, {tensor.name for tensor in proto.graph.initializer}
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(v for v in proto.graph.input if v.name not in given)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    graph.sparse_initializer.extend(proto.graph.sparse_initializer)
    for tensor in proto.graph.initializer:
        integer = tensor.data_type in (TensorProto.INT32, TensorProto.INT64)
        most = SMALL_INTEGER_BYTES if integer else SMALL_BYTES
        if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= most:
            graph.initializer.append(tensor)
        else:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(value)
    return light


def checker_problem(proto: onnx.ModelProto, *, strict: bool) -> tuple[str, str, str] | None:
    """Return the first thing that onnx.checker finds: node, operator and message; None: nothing.

    ``strict``: infer types and shapes, too; else operators that ONNX does not have, and inputs and
    outputs without a shape pass, which runtimes take. Weights are checked one by one, so that none is
    copied with the whole. ``check_bounds`` must have passed.
    """
    light = without_weights(proto)
    if not strict:
        light.graph.name = light.graph.name or "graph"
        set_apart_unknown(light)
        for value in (*light.graph.input, *light.graph.output):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    try:
        _check_declared_weights(proto)
        _check_references(proto.graph)
        for tensor in proto.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                _check_content(tensor)
        if all(map(_has_shape, (*light.graph.input, *light.graph.output))):
            onnx.checker.check_model(light, full_check=strict)
        else:
            # What the full check does beside that of the structure, which needs all shapes.
            onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return _problem(str(error))
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        # onnx's own code raises these for protobufs that no exporter writes.
        return _problem(str(error))
    return None


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return not value.type.HasField("tensor_type") or tensor.HasField("shape")


def set_apart_unknown(proto: onnx.ModelProto) -> None:
    """Give nodes whose operator ONNX does not have, in this opset, a domain that nobody checks.

    ONNX Runtime's optimizer writes its operators into ONNX's domain (LayerNormalization before 17).
    """
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    version = versions.get("", versions.get("ai.onnx", 1))
    own = {function.name for function in proto.functions if function.domain in STANDARD_DOMAINS}
    for graph in _graphs(proto.graph.node, "the graph", proto.graph):
        for node in graph.node:
            standard = node.domain in STANDARD_DOMAINS and node.op_type not in own
            if standard and not known_operator(node.op_type, version):
                node.domain = UNKNOWN
    if UNKNOWN not in versions:
        proto.opset_import.append(onnx.helper.make_opsetid(UNKNOWN, 1))


def known_operator(op: str, version: int) -> bool:
    """Whether ONNX has the operator in this opset."""
    try:
        return not onnx.defs.get_schema(op, version, "").deprecated
    except onnx.defs.SchemaError:
        return False


def check_growth(model: ir.Model) -> None:
    """Raise ModelError where Concats of constants make more than ``LARGEST_CONSTANTS`` numbers.

    Sixty that each double their input make 2^60. ONNX's shape inference follows the numbers of
    one-dimensional constants, and ONNX Runtime folds them, both without a bound. Of the operators
    that are followed only Concat makes more numbers than it is given; a shape has at most eight.
    What depends on the values of an input of the graph is followed by neither.
    """
    counts: dict[ir.Value, int] = {}
    for value in model.graph.initializers.values():
        sizes = () if value.shape is None else value.shape.numpy()
        counts[value] = prod(sizes) if len(sizes) < 2 else 0
    total = 0
    for node in model.graph:
        if node.op_type == "Shape":
            made = 8
        elif any(value is not None and value not in counts for value in node.inputs):
            continue
        else:
            given = [counts[value] for value in node.inputs if value is not None]
            made = max(given, default=0)
            if node.op_type == "Concat":
                made = sum(given)
                total += made
        counts.update(dict.fromkeys(node.outputs, made))
        if total > LARGEST_CONSTANTS:
            raise ModelError(
                f"The graph makes more than {LARGEST_CONSTANTS:,} numbers from its constants by nested "
                f"Concats: '{node.outputs[0].name}' is one of them.",
                "Export the model again without nested Concats of constants.",
            )


def refuse_sparse(proto: onnx.ModelProto, name: str) -> None:
    """Raise ModelError for the first sparse tensor, of which ``onnx_ir`` would leave out the initializers."""
    found = [tensor.values.name for tensor in proto.graph.sparse_initializer]
    for node in _nodes(proto.graph.node, name):
        kinds = [one for one in node.attribute if one.HasField("sparse_tensor")]
        found += [node.output[0] if node.output else one.name for one in kinds]
    if found:
        raise ModelError(
            f"{name} holds the sparse tensor '{printable(found[0])}'.", "Save it as a dense one."
        )


def refuse_unsound(proto: onnx.ModelProto, name: str) -> None:
    """Raise ModelError with what onnx.checker says of the structure of ``proto``, if anything."""
    problem = checker_problem(proto, strict=False)
    if problem is not None:
        node, op, words = problem
        where = f" at the node '{node}' ({op})" if op else ""
        raise ModelError(
            f"{name} is not a valid ONNX graph{where}: {words}.",
            "Check it with onnx.checker, and export it again.",
        )


def tensor_bytes(tensor: TensorProto) -> int | None:
    """Bytes of a tensor's data by its shape and type; None for types without a fixed size."""
    bits = _BITS.get(tensor.data_type)
    return None if bits is None else (prod(tensor.dims) * bits + 7) // 8


def _problem(text: str) -> tuple[str, str, str]:
    found = _NODE.search(text)
    words = " ".join(text.partition("==> Context")[0].split())
    node, op = (printable(found[1]), printable(found[2])) if found else ("", "")
    return node, op, printable(words)[:300].rstrip(". ")


def _check_declared_weights(proto: onnx.ModelProto) -> None:
    """Raise ValidationError where an input or output is a weight of another shape than it declares."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    for what, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            declared = value.type.tensor_type
            if value.name not in weights or not value.type.HasField("tensor_type"):
                continue
            weight, sizes = weights[value.name], declared.shape.dim
            differ = declared.HasField("shape") and (
                len(sizes) != len(weight.dims)
                or any(
                    size.HasField("dim_value") and size.dim_value != actual
                    for size, actual in zip(sizes, weight.dims)
                )
            )
            if differ or declared.elem_type != weight.data_type:
                raise onnx.checker.ValidationError(
                    f"the {what} '{value.name}' is a weight of another type or shape than it declares"
                )


def _check_references(graph: onnx.GraphProto) -> None:
    """Raise ValidationError where an attribute outside of functions is a function's parameter."""
    for node in _nodes(graph.node, "the graph"):
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                raise onnx.checker.ValidationError(
                    f"the node '{node.name}' ({node.op_type}) takes its attribute '{attribute.name}' "
                    f"from '{attribute.ref_attr_name}', but is not in a function"
                )


def _check_content(tensor: TensorProto) -> None:
    """Raise ValidationError where a weight's data has not the size that its dimensions say."""
    needed = tensor_bytes(tensor)
    if tensor.HasField("raw_data") and needed is not None:
        if len(tensor.raw_data) != needed:
            raise onnx.checker.ValidationError(
                f"the weight '{tensor.name}' has {len(tensor.raw_data):,} bytes of data, and needs {needed:,}"
            )
    else:
        onnx.checker.check_tensor(tensor)


# Bits of an element by its type; text has no size.
_BITS = {
    TensorProto.DataType.Value(name): bits
    for bits, names in {
        128: ("COMPLEX128",),
        64: ("DOUBLE", "INT64", "UINT64", "COMPLEX64"),
        32: ("FLOAT", "INT32", "UINT32"),
        16: ("FLOAT16", "BFLOAT16", "INT16", "UINT16"),
        8: (
            *("INT8", "UINT8", "BOOL", "FLOAT8E8M0"),
            *("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
        ),
        4: ("INT4", "UINT4", "FLOAT4E2M1"),
        2: ("INT2", "UINT2"),
    }.items()
    for name in names
    if name in TensorProto.DataType.keys()  # noqa: SIM118 (no mapping)
}


def _check_expansion(proto: onnx.ModelProto, name: str) -> None:
    """Count the nodes that expanding all functions would make, each function once."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    sizes: dict[Function, int] = {}
    # Functions whose callees are counted first, without recursion of ours.
    for key in functions:
        waiting, active = [key], set()
        while waiting:
            key = waiting[-1]
            if key in sizes:
                waiting.pop()
                continue
            called = [c for c in _called(functions[key].node, name) if c in functions]
            missing = [one for one in called if one not in sizes]
            if missing:
                if key in active:
                    raise ModelError(
                        f"{name} holds the function '{printable(key[1])}', which calls itself.",
                        "ONNX has no recursion: export the model again.",
                    )
                active.add(key)
                waiting += missing
                continue
            active.discard(key)
            waiting.pop()
            sizes[key] = sum(sizes.get(one, 1) for one in _called(functions[key].node, name))
            _check_count(sizes[key], name)
    _check_count(sum(sizes.get(one, 1) for one in _called(proto.graph.node, name)), name)


def _called(nodes: Nodes, name: str) -> Iterator[Function]:
    """Yield the operator of every node, subgraphs included."""
    for node in _nodes(nodes, name):
        yield node.domain, node.op_type, node.overload


def _check_count(count: int, name: str) -> None:
    if count > LARGEST_GRAPH:
        raise ModelError(
            f"{name} expands to more than {LARGEST_GRAPH:,} nodes through its functions.",
            "Export the model again with fewer nested functions.",
        )


def _nodes(nodes: Nodes, name: str) -> Iterator[onnx.NodeProto]:
    waiting = [(nodes, 0)]
    while waiting:
        inner, depth = waiting.pop()
        if depth > DEPTH:
            raise ModelError(f"{name} nests subgraphs more than {DEPTH} deep.", "Export it again.")
        for node in inner:
            yield node
            for attribute in node.attribute:
                graphs = [*attribute.graphs]
                graphs += [attribute.g] if attribute.HasField("g") else []
                waiting += [(graph.node, depth + 1) for graph in graphs]


def _graphs(nodes: Nodes, name: str, *outer: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield ``outer``, then the subgraphs of ``nodes`` at any depth."""
    yield from outer
    for node in _nodes(nodes, name):
        for attribute in node.attribute:
            yield from attribute.graphs
            if attribute.HasField("g"):
                yield attribute.g


def _check_name(text: str, what: str, name: str) -> None:
    # Empty: a node without a name, an input that is left out.
    if text and not (text.isascii() and text.isprintable() and len(text) < 1000):
        checked_name(text, f"The name of a {what} in {name}", ModelError)


def _check_version(entry: onnx.OperatorSetIdProto, name: str) -> None:
    if not 0 < entry.version < 1 << 31:
        raise ModelError(
            f"{name} declares version {entry.version} of the operators '{entry.domain or 'ai.onnx'}'.",
            "Versions start at 1: export the model again.",
        )


def _check_tensor(tensor: TensorProto, name: str) -> None:
    if tensor.data_type not in DATA_TYPES:
        raise ModelError(
            f"The weight '{printable(tensor.name)}' of {name} has the type {tensor.data_type}, which "
            "the installed onnx does not know.",
            "Update onnx, or export the model again.",
        )
    if any(size < 0 for size in tensor.dims):
        raise ModelError(
            f"The weight '{printable(tensor.name)}' of {name} has the shape {list(tensor.dims)[:8]}.",
            "Dimensions cannot be negative: export the model again.",
        )
