"""The interfaces of number formats and branches, and the scheme that combines them.

A number format is a frozen instance of a subclass of ``WeightFormat`` or ``ActivationFormat``; a
branch is one of ``Branch``. Each class has a file of its own, which defines everything that depends
on the format: bytes, refusals, rounding, nodes, the twin in torch, traffic, and what an engine's
log must show. ``formats.scheme`` lists all of them. Devices import these files, too, so they need
only NumPy and the standard library: the writer and the kit that methods receive make ONNX nodes and
torch modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from mpq_deploy.formats.ranges import STATIC, ActivationRange, RangeTable
from mpq_deploy.formats.sizes import (
    ACTIVATION_SCALE_BYTES,
    FP16_BYTES,
    matrix_shape,
    shift_bytes,
    window_bytes,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.calibrate.stats import ActivationStats
    from mpq_deploy.engine.expected import ExpectedLayer
    from mpq_deploy.formats.layer_rounding import LayerRounding
    from mpq_deploy.graph.dialects import Dialect
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter, NodeWriter
    from mpq_deploy.latency.roofline import Rates, Traffic
    from mpq_deploy.models.spec import Array
    from mpq_deploy.recover.trained_weights import LayerTwin, StartingWeight, TwinKit


@dataclass(frozen=True)
class Precision:
    """Integer codes of ``bits`` bits in [quant_min, quant_max]."""

    name: str
    bits: int
    quant_min: int
    quant_max: int


INT4 = Precision("int4", 4, -8, 7)
# Without -128, so that the range is symmetric, as in TensorRT's own calibrators.
INT8 = Precision("int8", 8, -127, 127)


@dataclass(frozen=True)
class ActivationGrid:
    """An activation's quantizer: integer codes ``quant_min`` to ``quant_max``, and a scale.

    The default limits are those of QuantizeLinear in INT8. ``table``: the ratios of a range by
    timestep; ``scale`` is that of the widest range. ``zeros``: each channel's shift in codes
    (``formats.shifts``). ``reach``: the largest magnitude over that of the largest code.
    """

    scale: float
    quant_min: int = -128
    quant_max: int = 127
    table: RangeTable | None = None
    zeros: tuple[int, ...] = ()
    reach: float = 1.0

    # Whether every integer between the limits is a level.
    uniform: ClassVar[bool] = True
    # Whether scales are computed at run time.
    dynamic: ClassVar[bool] = False

    def levels(self, x: Any, xp: Any) -> Any:
        """Return the level nearest to each ``x``, in units of the scale; ``xp``: NumPy or torch."""
        return xp.clip(xp.round(x), self.quant_min, self.quant_max)

    def rounded(self, x: Any, xp: Any) -> Any:
        """Return ``x`` fake-quantized; ``xp``: NumPy or torch."""
        return self.levels(x / self.scale, xp) * self.scale


class DeployedMatrix(Protocol):
    """The weight of a layer as it is deployed: codes, scales, and parts of a branch."""

    def dequantize(self) -> Array:
        """Return the dequantized weight, float32 [out_channels, reduction]."""

    def arrays(self) -> dict[str, Array]:
        """Return the arrays to store, by name; none where other forms contain them."""


@dataclass(frozen=True)
class StoredMatrix:
    """What a matrix is read from: stored ``arrays``, the layer's float weight [O, K], the body."""

    arrays: Mapping[str, Array]
    layer: Layer
    weight: Array
    body: DeployedMatrix | None


Forms = Mapping[str, DeployedMatrix]
Rounder = Callable[[Sequence["Scheme"], "LayerRounding"], dict[str, DeployedMatrix]]


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored.

    ``block_size``: nominal number of elements of the reduction that share a scale; None: one scale
    per output channel.
    """

    block_size: int | None = None

    bits: ClassVar[int]
    quantized: ClassVar[bool] = True
    # Whether no engine supports it: it runs only in ONNX Runtime, and its bytes are nominal.
    simulated: ClassVar[bool] = False
    # Names that an engine's log may use for the type of the stored weight.
    engine_types: ClassVar[tuple[str, ...]] = ()
    # Whether it may have branches (those that suit it).
    takes_branches: ClassVar[bool] = True
    # The first ONNX opset that supports it: blocks and INT4 need 21.
    opset: ClassVar[int] = 21
    # A text that says which GPUs support the format; "" where all do.
    generation: ClassVar[str] = ""

    @property
    def form(self) -> str:
        """Name of the codes and scales: schemes with equal forms have equal weights of a layer."""
        raise NotImplementedError

    def block(self, layer: Layer) -> int | None:
        """Return how many elements of the reduction share a scale; None if no block size fits."""
        return layer.reduction

    def refusal(self, layer: Layer) -> str:
        """Return why ``layer`` cannot be stored in this format; "" when it can."""
        return ""

    def multiplies(self, layer: Layer, alone: bool) -> bool:
        """Whether a Conv becomes a matrix product over windows; ``alone``: the input is FP16."""
        return layer.window is not None and alone and self.quantized and not self.simulated

    def stored_shape(self, layer: Layer) -> tuple[int, int]:
        """Return the rows and columns of the weight as a matrix in the file."""
        return matrix_shape(layer)

    def dialect_refusal(self, layer: Layer, dialect: Dialect) -> str:
        """Return why a builder is documented to refuse the weight ("size is odd"); else ""."""
        return ""

    def bytes_of(self, layer: Layer) -> int:
        """Return the bytes of all constants written for the weight: codes, scales and shapes."""
        raise NotImplementedError

    def unpacked_bytes(self, layer: Layer, alone: bool) -> int:
        """Return the bytes that a call unpacks to memory; 0 where kernels read the stored weight.

        ``alone``: the activation stays in FP16.
        """
        return 0

    def fuses(self, layer: ExpectedLayer) -> bool:
        """Whether TensorRT-RTX can multiply by the packed weight (docs/engine-forms.md)."""
        return False

    def joins(self, alone: bool) -> bool:
        """Whether TensorRT-RTX joins several such weights of one input into one product."""
        return False

    @property
    def rounder(self) -> Rounder:
        """The function that rounds all of a layer's schemes of this kind at once."""
        raise NotImplementedError

    def read(self, arrays: Mapping[str, Array]) -> DeployedMatrix:
        """Make the matrix from the result of ``DeployedMatrix.arrays``."""
        raise NotImplementedError

    def write(self, to: LayerWriter, matrix: Any) -> ir.Value:
        """Write constants and nodes before the layer's node; return the dequantized weight."""
        raise NotImplementedError

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        """Make the weight's quantizer in torch, which recovery trains."""
        raise NotImplementedError


@dataclass(frozen=True)
class ActivationFormat:
    """How the input of a layer is rounded.

    ``takes_ranges``: the range may depend on the timestep or the values (``formats.ranges``).
    """

    bits: ClassVar[int]
    takes_ranges: ClassVar[bool] = False
    simulated: ClassVar[bool] = False
    # The name of the operands' type in an engine's log, and the bytes of one element.
    operand: ClassVar[str] = ""
    value_bytes: ClassVar[float] = 1
    # The ranks of inputs that can be rounded; empty: all.
    ranks: ClassVar[tuple[int, ...]] = ()
    # Where ONNX Runtime lacks the format: how its graph simulates it, for the report.
    twin_only: ClassVar[str] = ""
    # The target's field with the rate of products in this format.
    rate: ClassVar[str] = "int8_ops_per_s"

    @property
    def form(self) -> str:
        """The suffix to a tensor's name that names its quantizer; "" for static INT8."""
        return ""

    def grid(self, stats: ActivationStats, scale: float) -> ActivationGrid:
        """Return the quantizer for calibration's ``stats``; ``scale``: the scale of INT8."""
        raise NotImplementedError

    def reader_bytes(self, layer: Layer) -> int:
        """Return the bytes that each layer that reads the quantized input adds."""
        return 0

    def engine_bytes(self, layer: ExpectedLayer) -> int:
        """Return the bytes that the builder adds for the scales of the product."""
        return 0

    def operations_per_s(self, rates: Rates) -> float:
        """Return the peak rate of products in this format."""
        raise NotImplementedError

    def write(
        self, to: NodeWriter, value: ir.Value, grid: ActivationGrid, key: tuple[str, str]
    ) -> list[ir.Node]:
        """Return nodes, not yet inserted, that round ``value``; the last outputs the rounded value.

        ``key``: tensor name and the scheme's ``activation_form``, for the nodes' names.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Branch:
    """A part of a layer with more precision, beside the body (the plain quantized layer).

    ``amount``: how large the part is. This class itself means no branch and is false: its methods
    do what the weight's format does.
    """

    amount: int = 0

    kind: ClassVar[str] = ""
    # For the report: "w4a16-b128; <meaning>".
    meaning: ClassVar[str] = ""
    # Kernels launched in addition to the body's, and how many of them only process the input.
    kernels: ClassVar[int] = 0
    input_kernels: ClassVar[int] = 0
    # Whether the most salient output channels get INT8 weights: ``assemble`` makes the matrix.
    promotes: ClassVar[bool] = False
    # Whether the input's channels are multiplied by factors, which its producer may take.
    rescales: ClassVar[bool] = False

    def __bool__(self) -> bool:
        return bool(self.kind)

    @property
    def suffix(self) -> str:
        """The suffix of a scheme's name with this branch."""
        return f"+{self.kind}{self.amount or ''}" if self.kind else ""

    @property
    def activation_form(self) -> str:
        """The branch's part of an activation form; "" unless it changes the input's quantizer."""
        return ""

    def suits(self, body: Scheme) -> bool:
        """Whether the branch can be combined with ``body`` for any layer."""
        raise NotImplementedError

    def refusal(self, layer: Layer) -> str:
        """Return why ``layer`` cannot have the branch; "" when it can."""
        return ""

    def parts(self, layer: Layer, scheme: Scheme) -> tuple[tuple[Layer, Scheme], ...]:
        """Return body and branch as layers of their own, named as in the graph, with schemes."""
        return ((layer, scheme.body),)

    def joining_bytes(self, layer: Layer) -> int:
        """Return the bytes of the constants that join body and branch."""
        return 0

    def nominal_bits(self, layer: Layer, body: int) -> float:
        """Return the mean bits per weight, with a body of ``body`` bits; added factors count 0."""
        return float(body)

    def input_scale(self, stats: ActivationStats) -> float:
        """Return the INT8 scale of the input."""
        return stats.scale

    def input_amax(self, stats: ActivationStats) -> Array:
        """Return the largest magnitude of the quantizer's input at each timestep, float [K]."""
        return np.asarray(stats.amax_by_timestep.max(axis=1))

    def rank(self, stats: ActivationStats) -> int:
        """Return how many variants of the branch have a smaller expected error with ``stats``."""
        return 0

    def input_bytes(self, layer: Layer) -> int:
        """Return the bytes of the input's quantizer in addition to its scale."""
        return 0

    def left_out(self, stats: ActivationStats) -> Array:
        """Return the input channels that stay in float, int32 [n], ascending."""
        return np.empty(0, np.int32)

    def factors(self, stats: ActivationStats) -> Array | None:
        """Return the factors of the input's channels, float16 [C]; None for none."""
        return None

    def factors_in(self, matrix: Any) -> Array | None:
        """Return the factors that ``matrix`` was rounded for; None for none."""
        return None

    def rounds_first(self, scheme: Scheme) -> tuple[Scheme, ...]:
        """Return the schemes to round before this one, together with others: usually the body."""
        return (scheme.body,)

    def rescaling(self, layer: LayerRounding) -> Array | None:
        """Return the channel factors for which the body is rounded, float16 [C]; None for none."""
        return None

    def around(self, body: DeployedMatrix, layer: LayerRounding) -> DeployedMatrix:
        """Return the branch's matrix from its ``body`` as rounded by ``rounds_first``."""
        return body

    def round(self, scheme: Scheme, layer: LayerRounding, forms: Forms) -> DeployedMatrix | None:
        """Return the matrix, given the ``forms`` rounded first; None if nothing is left to do."""
        return None

    def assemble(self, scheme: Scheme, layer: Layer, forms: Forms, order: Array) -> DeployedMatrix:
        """Return the matrix of a branch that ``promotes``; ``order`` [O]: most salient first."""
        raise NotImplementedError

    def read(self, scheme: Scheme, stored: StoredMatrix) -> DeployedMatrix:
        """Make the matrix from the result of ``DeployedMatrix.arrays``."""
        return scheme.weight.read(stored.arrays)

    def write(self, to: LayerWriter, scheme: Scheme, matrix: Any) -> None:
        """Replace the weight of ``to.node`` by the quantized one, and write the branch."""
        weight = scheme.weight.write(to, matrix)
        if scheme.multiplies(to.layer):
            to.multiply(weight)
        else:
            to.node.replace_input_with(1, weight)

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        """Make the quantizer in torch, as ``WeightFormat.twin`` does."""
        return start.scheme.weight.twin(start, kit)

    def traffic(self, layer: Layer, whole: Traffic) -> tuple[Traffic, ...]:
        """Return the memory traffic of each of ``parts``; ``whole``: that of the plain layer."""
        return (whole,)

    def joining_traffic(self, layer: Layer, whole: Traffic) -> int:
        """Return the bytes moved to gather channels and to join the parts' outputs."""
        return 0


@dataclass(frozen=True)
class Scheme:
    """What a layer becomes: its weight format, its activation format (None: FP16) and its branch.

    ``range``: what the range of the quantized input depends on.
    """

    name: str
    weight: WeightFormat
    activation: ActivationFormat | None = None
    branch: Branch = Branch()
    range: ActivationRange = STATIC
    # For the report: the body in words.
    meaning: str = field(default="", compare=False)

    @property
    def quantized(self) -> bool:
        """Whether the weight is not FP16."""
        return self.weight.quantized

    @property
    def simulated(self) -> bool:
        """Whether no engine supports it: it runs as Q/DQ in ONNX Runtime, its bytes are nominal."""
        return self.weight.simulated

    @property
    def block_size(self) -> int | None:
        """The weight's nominal block size."""
        return self.weight.block_size

    @cached_property
    def family(self) -> str:
        """The name without block size, range and branch (``w4a16``); ``simulated`` if simulated."""
        return SIMULATED if self.simulated else self.series

    @cached_property
    def series(self) -> str:
        """The common name of schemes that differ only in block size, range or branch.

        For example ``w4a16`` or ``w2a4-sim``.
        """
        body = self.name.split("+")[0]
        return body if self.simulated else body.split("-")[0]

    @property
    def bits(self) -> tuple[int, int]:
        """The bits of the weights and of the activations, 16 for FP16."""
        return self.weight.bits, self.activation.bits if self.activation else 16

    @property
    def operand_bytes(self) -> float:
        """The bytes of one element of the input as kernels read it."""
        return self.activation.value_bytes if self.activation else FP16_BYTES

    @cached_property
    def weight_form(self) -> str:
        """Schemes of equal form have the same codes and scales: ``w8a8`` and ``w8a16``."""
        return self.weight.form + self.branch.suffix

    @cached_property
    def activation_form(self) -> str:
        """Schemes of equal form share an input's quantizer; "" for static INT8, and for FP16."""
        own = self.activation.form + self.range.suffix if self.activation else ""
        return own + self.branch.activation_form

    @cached_property
    def body(self) -> Scheme:
        """The scheme without its branch."""
        return replace(self, name=self.name.split("+")[0], branch=Branch()) if self.branch else self

    @property
    def static(self) -> Scheme:
        """The scheme without its branch and with the static range."""
        name = self.body.name.removesuffix(self.range.suffix)
        return replace(self.body, name=name, range=STATIC)

    @property
    def timeless(self) -> Scheme:
        """The scheme to run a layer alone, without a timestep input: its main kernels are equal."""
        if not self.range.by_timestep:
            return self
        return self.static.with_branch(self.branch) if self.branch else self.static

    def with_range(self, kind: ActivationRange) -> Scheme:
        """Return this body with the range ``kind`` of its input."""
        meaning = f"{self.meaning}, {kind.meaning}" if kind.meaning else self.meaning
        return replace(self, name=f"{self.name}{kind.suffix}", range=kind, meaning=meaning)

    def with_branch(self, branch: Branch) -> Scheme:
        """Return this body with ``branch``."""
        return replace(self, name=f"{self.name}{branch.suffix}", branch=branch)

    def multiplies(self, layer: Layer) -> bool:
        """Whether ``layer`` is a Conv that the scheme turns into a matrix product over windows."""
        return self.weight.multiplies(layer, self.activation is None)

    def refusal(self, layer: Layer) -> str:
        """Return why ``layer`` cannot take the scheme on any target; "" when it can."""
        if self.branch and layer.group > 1:
            return "branches are written for convolutions of one group"
        return self.branch.refusal(layer) or self.weight.refusal(layer)

    def parts(self, layer: Layer) -> tuple[tuple[Layer, Scheme], ...]:
        """Return ``layer`` as the parts that the graph computes, body first, with their schemes."""
        return self.branch.parts(layer, self)

    def stored_shape(self, layer: Layer) -> tuple[int, int]:
        """Return the rows and columns of the body's weight as a matrix in the file."""
        return self.weight.stored_shape(self.parts(layer)[0][0])

    def shifts(self, layer: Layer) -> bool:
        """Whether the channels of the input of ``layer`` are shifted before it is rounded."""
        return self.activation is not None and self.activation_form in layer.shifted

    def weight_bytes(self, layer: Layer) -> int:
        """Return the bytes of all constants written for ``layer``: codes, scales, shapes, shifts.

        The activation's scale is not counted here, because layers share it. The bytes of a
        simulated scheme are nominal: those that a packed format would take.
        """
        if self.shifts(layer):
            rest = replace(layer, shifted=frozenset())
            return self.weight_bytes(rest) + FP16_BYTES * layer.out_channels
        if self.branch:
            parts = ((replace(part, shifted=frozenset()), s) for part, s in self.parts(layer))
            total = sum(s.weight_bytes(part) for part, s in parts)
            return total + self.branch.joining_bytes(layer)
        total = self.weight.bytes_of(layer)
        if self.activation:
            return total + self.activation.reader_bytes(layer)
        windows = layer.window if self.multiplies(layer) else None
        return total + (window_bytes(windows, layer.taps) if windows else 0)

    def unpacked_bytes(self, layer: Layer) -> int:
        """Return the bytes of the body's weight that a call unpacks to memory; 0 where fused."""
        return self.weight.unpacked_bytes(layer, self.activation is None)

    @cached_property
    def kernel_family(self) -> str:
        """The name that schemes share whose products may be one kernel: family, dynamic range."""
        return self.family + self.timeless.range.suffix

    @property
    def joins(self) -> bool:
        """Whether the engine is assumed to join products of one input (docs/engine-forms.md)."""
        return not self.branch.kernels and self.weight.joins(self.activation is None)

    def input_bytes(self, layer: Layer) -> int:
        """Return the bytes of the constants of the input's quantizer, which layers may share.

        Channel factors are counted, even where a producer takes them.
        """
        return self.scale_bytes(layer) + self.branch.input_bytes(layer) if self.activation else 0

    def scale_bytes(self, layer: Layer) -> int:
        """Return the part of ``input_bytes`` that remains where a producer takes the factors."""
        shift = shift_bytes(layer) if self.shifts(layer) else 0
        return ACTIVATION_SCALE_BYTES + self.range.input_bytes(layer) + shift

    def input_grid(self, stats: ActivationStats) -> ActivationGrid:
        """Return the quantizer of an input with ``stats``; ``activation`` must not be None."""
        assert self.activation is not None
        grid = self.activation.grid(stats, self.range.scale(self.branch, stats))
        return stats.shifted(self.range.fitted(grid, self.branch, stats), self.activation_form)


SIMULATED = "simulated"
