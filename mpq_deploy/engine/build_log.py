"""What a builder's verbose log says about the engine: its kernels, operands and memory totals.

In: a log written with DETAILED profiling verbosity. Out: an ``EngineLog``. Stands in for the engine
inspector, which needs a GPU: the builder prints a message that begins ``Layers:`` with one line per
kernel, and the totals before it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from math import prod

from mpq_deploy.errors import EngineError

# Kernel types that multiply: the rest moves, converts or generates.
COMPUTE_TYPES = ("correlation", "gemm", "deconv", "runtime_fusion")

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), "
    r"StreamId: -?\d+,(?: \w+: [-\w]+,)* Metadata: (?P<metadata>.*)$"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\], .*?Datatype: (\w+), Format: ")
ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_TOTAL = re.compile(r"Total (Weights|Activation|Scratch) Memory: (\d+)")


@dataclass(frozen=True)
class EngineTensor:
    """An operand of a kernel. Dimension -1 is dynamic; ``dtype`` is the builder's word (``Half``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements; a dynamic dimension counts as one."""
        return prod(max(size, 1) for size in self.shape)


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of the engine. ``nodes`` are the ONNX nodes that its metadata names (often none)."""

    name: str
    type: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    tactic: str
    nodes: tuple[str, ...]

    @property
    def compute(self) -> bool:
        """A kernel that multiplies matrices or convolves."""
        return self.type in COMPUTE_TYPES

    @property
    def operand_dtypes(self) -> tuple[str, ...]:
        """The types of inputs and constants."""
        return tuple(tensor.dtype for tensor in (*self.inputs, *self.constants))


@dataclass(frozen=True)
class EngineLog:
    """An engine's kernels in order, and its totals in bytes (None: not in the log)."""

    layers: tuple[EngineLayer, ...]
    weights_bytes: int | None
    activation_bytes: int | None

    def summary(self) -> dict[str, int]:
        """Count kernels by type and, for those that compute, by the type of their first operand."""
        counts: Counter[str] = Counter()
        for layer in self.layers:
            counts[f"{layer.type} {compute_dtype(layer)}" if layer.compute else layer.type] += 1
        return dict(sorted(counts.items()))


def compute_dtype(layer: EngineLayer) -> str:
    """Return a kernel's compute type: ``Int8``, ``Half``, ...; ``Int4`` for a fused 4-bit weight."""
    constants = {tensor.dtype for tensor in layer.constants}
    if layer.type == "runtime_fusion":
        for dtype in ("Int4", "Int8", "FP8"):
            if dtype in constants:
                return dtype
    return layer.inputs[0].dtype if layer.inputs else "?"


def parse_engine_log(text: str) -> EngineLog:
    """Read the kernels and the totals from a builder's log.

    Raises EngineError without a ``Layers:`` message, or for a line that cannot be parsed: a check
    that understands half of a log proves nothing.
    """
    memory = totals(text)
    layers = tuple(_layer(line) for line in _layer_lines(text))
    return EngineLog(layers, memory.get("Weights"), memory.get("Activation"))


def totals(text: str) -> dict[str, int]:
    """Return the bytes of ``Weights``, ``Activation`` and ``Scratch`` memory that the log states."""
    return {name: int(value) for name, value in _TOTAL.findall(text)}


def layers_text(text: str) -> str:
    """Return the builder's list of kernels from its log, one per line; it repeats exactly."""
    return "".join(f"{line}\n" for line in _layer_lines(text))


def _layer_lines(text: str) -> list[str]:
    lines = text.splitlines()
    heads = (line.endswith("Layers:") and "Name:" not in line for line in lines)
    starts = [index for index, head in enumerate(heads) if head]
    if not starts:
        raise EngineError(
            "The builder's log holds no 'Layers:' message, so the engine cannot be checked.",
            "Build with detailed profiling verbosity and a verbose logger.",
        )
    return list(takewhile(lambda line: line.startswith("Name: "), lines[starts[-1] + 1 :]))


def _layer(line: str) -> EngineLayer:
    match = _LAYER.match(line)
    if match is None:
        raise EngineError(
            f"A layer in the builder's log cannot be read: {line[:160]!r}.",
            "This version of the builder may write another format; please report it with the log.",
        )
    fields = match.groupdict()
    inputs, constants, outputs = (
        _tensors(fields[name]) for name in ("inputs", "constants", "outputs")
    )
    nodes = tuple(dict.fromkeys(ONNX_NODE.findall(fields["metadata"])))
    return EngineLayer(
        fields["name"], fields["type"], inputs, constants, outputs, fields["tactic"], nodes
    )


def _tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(name, tuple(int(size) for size in dims.split(",") if size), dtype)
        for name, dims, dtype in _TENSOR.findall(text)
    )
