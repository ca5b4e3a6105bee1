"""Find the nodes that crash a builder by building smaller graphs, each in a child process.

In: a graph that crashed the builder, and a trial (does this graph crash?). Out: ``Suspects``. It
asks two questions:

1. Does it still crash without any quantization? No: the smallest set of quantized layers that
   crashes together is looked for by delta debugging (Zeller, Hildebrandt 2002, "Simplifying and
   isolating failure-inducing input", ddmin); all other layers are given float weights.
2. Yes: the shortest prefix of the graph that crashes is found by bisection; its last node is the
suspect.

Weights that become float are zeros in one sparse file, so that a trial of a large model writes
nothing large.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto, helper

# Our choices: the maximum number of builds, and of seconds for all of them.
MAX_TRIALS, MAX_SECONDS = 40, 900.0
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MODEL, ZEROS = "trial.onnx", "zeros.bin"
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# What may stand between a weight's DequantizeLinear and its layer.
MOVES = ("Reshape", "Transpose", "Cast", "Identity", "Concat", "Gather", DEQUANTIZE, QUANTIZE)

Trial = Callable[[Path], bool]


@dataclass(frozen=True)
class Suspects:
    """``nodes`` crash the builder together; ``certain``: every smaller set was tried.

    ``quantized``: their quantization is to blame (they build in float). ``trials``: builds taken.
    """

    nodes: tuple[str, ...]
    quantized: bool
    certain: bool
    trials: int


class OutOfTrialsError(Exception):
    """The number of trials or the time is used up."""


class _Counted:
    def __init__(self, trial: Trial, folder: Path, max_trials: int, seconds: float) -> None:
        self.trial, self.folder, self.max_trials = trial, folder, max_trials
        self.end = time.monotonic() + seconds
        self.count = 0

    def crashes(self, graph: onnx.ModelProto) -> bool:
        """Write and try a graph. Raises OutOfTrialsError."""
        if self.count >= self.max_trials or time.monotonic() > self.end:
            raise OutOfTrialsError
        self.count += 1
        path = self.folder / MODEL
        onnx.save(graph, path)
        return self.trial(path)


def find_suspects(
    model: Path,
    folder: Path,
    trial: Trial,
    max_trials: int = MAX_TRIALS,
    seconds: float = MAX_SECONDS,
) -> Suspects | None:
    """Find what crashes; None if the graph does not crash when tried again.

    The trials go into the empty ``folder``: at most ``max_trials``, none started after ``seconds``.
    """
    proto = onnx.load(model, load_external_data=False)
    _link_weights(proto, model, folder)
    counted = _Counted(trial, folder, max_trials, seconds)
    layers = quantized_layers(proto)
    nodes: tuple[str, ...] = tuple(layers)
    quantized, certain = True, False
    try:
        if not counted.crashes(proto):
            return None
        quantized = not counted.crashes(_keeping(proto, (), folder))
        if quantized:
            tries = _minimized(layers, lambda some: counted.crashes(_keeping(proto, some, folder)))
            for smaller in tries:
                nodes = smaller
        else:
            for name in _shortest(_keeping(proto, (), folder), counted.crashes):
                nodes = (name,)
        certain = True
    except OutOfTrialsError:
        pass  # return what is known by now, as uncertain
    return Suspects(nodes, quantized, certain, counted.count)


def quantized_layers(proto: onnx.ModelProto) -> list[str]:
    """Names of the layers that read a DequantizeLinear, directly or through operators that move a weight."""
    producers = {output: node for node in proto.graph.node for output in node.output}
    layers = (node for node in proto.graph.node if node.op_type in LAYERS)
    return [
        node.name for node in layers if any(_dequantize(name, producers) for name in node.input)
    ]


def _dequantize(name: str, producers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The DequantizeLinear from which the tensor ``name`` comes through moves alone."""
    node = producers.get(name)
    while node is not None and node.op_type != DEQUANTIZE:
        node = producers.get(node.input[0]) if node.op_type in MOVES and node.input else None
    return node


def _minimized(
    layers: Sequence[str], crashes: Callable[[Sequence[str]], bool]
) -> Iterator[tuple[str, ...]]:
    """ddmin: yield each smaller set that crashes; the last crashes only with all of its parts."""
    current, parts = list(layers), 2
    while len(current) > 1:
        size = -(-len(current) // parts)
        chunks = [current[i : i + size] for i in range(0, len(current), size)]
        tries = [(chunk, 2) for chunk in chunks]
        if len(chunks) > 2:
            rests = ([name for name in current if name not in chunk] for chunk in chunks)
            tries += [(rest, max(parts - 1, 2)) for rest in rests]
        hit = next((one for one in tries if crashes(one[0])), None)
        if hit is not None:
            current, parts = hit
            yield tuple(current)
        elif parts >= len(current):
            return
        else:
            parts = min(2 * parts, len(current))


def _keeping(proto: onnx.ModelProto, layers: Sequence[str], folder: Path) -> onnx.ModelProto:
    """Return the graph with only ``layers`` quantized; the others read zeros or floats."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    graph = changed.graph
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    shapes = _constant_shapes(proto, constants)
    floats: dict[str, TensorProto] = {}
    for node in graph.node:
        if node.op_type not in LAYERS or node.name in layers:
            continue
        for index, name in enumerate(node.input):
            source = _dequantize(name, producers)
            if source is None:
                continue
            if name in shapes:
                scale = constants.get(source.input[1])
                kind = TensorProto.FLOAT16 if scale is None else scale.data_type
                zeros = _zeros(f"{name}//float", shapes[name], kind, folder)
                floats[zeros.name] = zeros
                node.input[index] = zeros.name
            else:
                node.input[index] = _before(name, producers)
    graph.initializer.extend(floats.values())
    _prune(graph)
    return changed


def _before(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    """The activation that was quantized to give ``name``."""
    while name in producers and producers[name].op_type in (DEQUANTIZE, QUANTIZE):
        name = producers[name].input[0]
    return name


def _constant_shapes(
    proto: onnx.ModelProto, constants: dict[str, TensorProto]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that follow from constants alone through Q/DQ and moves of them."""
    shapes = {name: tuple(tensor.dims) for name, tensor in constants.items()}
    inferred = _inferred_shapes(proto)
    known = set(constants)
    for node in proto.graph.node:
        if node.op_type in MOVES and all(name in known or not name for name in node.input):
            known.update(node.output)
            shape = inferred.get(node.output[0])
            if node.op_type in (DEQUANTIZE, QUANTIZE):
                shape = shapes.get(node.input[0])
            if shape is not None:
                shapes[node.output[0]] = shape
    return shapes


def _inferred_shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.output)
        if all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }


def _zeros(name: str, shape: tuple[int, ...], kind: int, folder: Path) -> TensorProto:
    """A constant of zeros: all of them read the beginning of one sparse file."""
    length = prod(shape) * helper.tensor_dtype_to_np_dtype(kind).itemsize
    file = folder / ZEROS
    with file.open("ab"):
        if file.stat().st_size < length:
            os.truncate(file, length)
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", ZEROS), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _shortest(graph: onnx.ModelProto, crashes: Callable[[onnx.ModelProto], bool]) -> Iterator[str]:
    """Yield the last node of ever shorter prefixes of ``graph`` that crash."""
    low, high = 0, len(graph.graph.node)
    while high - low > 1:
        middle = (low + high) // 2
        if crashes(_beginning(graph, middle)):
            high = middle
        else:
            low = middle
        yield graph.graph.node[high - 1].name


def _beginning(proto: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """The first ``count`` nodes; values that none of them reads become outputs."""
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    graph = cut.graph
    known = onnx.shape_inference.infer_shapes(proto).graph
    typed = {value.name: value for value in (*known.value_info, *known.output)}
    del graph.node[count:]
    read = {name for node in graph.node for name in node.input}
    del graph.output[:]
    for node in graph.node:
        for name in node.output:
            if name and name not in read:
                untyped = helper.make_tensor_value_info(name, TensorProto.FLOAT16, None)
                graph.output.append(typed.get(name) or untyped)
    _prune(graph)
    return cut


def _prune(graph: onnx.GraphProto) -> None:
    """Drop nodes, constants and inputs that nothing reads."""
    read = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if read.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            read.update(node.input)
    for tensors in (graph.initializer, graph.input):
        for one in [one for one in tensors if one.name not in read]:
            tensors.remove(one)


def _link_weights(proto: onnx.ModelProto, model: Path, folder: Path) -> None:
    """Let the trials read the model's own weight files."""
    entries = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
    for name in sorted({entry.value for entry in entries if entry.key == "location"}):
        (folder / name).symlink_to((model.resolve().parent / name).resolve())
