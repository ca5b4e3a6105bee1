"""The interfaces of number formats and branches, and the scheme that joins them.

A number format is one frozen value of a subclass of ``WeightFormat`` or ``ActivationFormat``, a
branch one of ``Branch``. Each class lives in a file of its own and owns all that follows from it:
bytes, refusals, rounding, nodes, the twin in torch, traffic, and what an engine's log must show.
``formats.scheme`` lists them. All of this is imported on devices too: NumPy and the standard
library alone; ONNX nodes and torch modules are made by the writer and the kit that methods are
given.
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
    """Integer codes: ``bits`` wide, in [quant_min, quant_max]."""

    name: str
    bits: int
    quant_min: int
    quant_max: int


INT4 = Precision("int4", 4, -8, 7)
# -128 is left out so that the range is symmetric, as TensorRT's own calibrators do.
INT8 = Precision("int8", 8, -127, 127)


@dataclass(frozen=True)
class ActivationGrid:
    """An activation's quantizer: integer codes from ``quant_min`` to ``quant_max``, a scale.

    By default what QuantizeLinear saturates to in INT8. ``table``: of a range by timestep, whose
    widest has the scale. ``zeros``: by how many codes each channel is shifted (``formats.shifts``);
    ``reach``: the largest magnitude in units of the largest code.
    """

    scale: float
    quant_min: int = -128
    quant_max: int = 127
    table: RangeTable | None = None
    zeros: tuple[int, ...] = ()
    reach: float = 1.0

    # Every integer between the limits is a level.
    uniform: ClassVar[bool] = True
    # The scales of its levels are found at run time.
    dynamic: ClassVar[bool] = False

    def levels(self, x: Any, xp: Any) -> Any:
        """Return the nearest level to each of ``x``, in units of the scale: an array or tensor of the module ``xp``."""
        return xp.clip(xp.round(x), self.quant_min, self.quant_max)

    def rounded(self, x: Any, xp: Any) -> Any:
        """Return ``x`` as the quantizer gives it, by its own scale."""
        return self.levels(x / self.scale, xp) * self.scale


class DeployedMatrix(Protocol):
    """The weight of a layer as it is deployed."""

    def dequantize(self) -> Array:
        """Return the weight, float32 [out_channels, reduction]."""

    def arrays(self) -> dict[str, Array]:
        """Return what is stored of it among the candidates; nothing where other forms make it up."""


@dataclass(frozen=True)
class StoredMatrix:
    """What is read to make a matrix: stored ``arrays``, the layer's float weight [O, K], the body's matrix if any."""

    arrays: Mapping[str, Array]
    layer: Layer
    weight: Array
    body: DeployedMatrix | None


Forms = Mapping[str, DeployedMatrix]
Rounder = Callable[[Sequence["Scheme"], "LayerRounding"], dict[str, DeployedMatrix]]


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored. ``block_size``: nominal elements of the reduction that share a scale.

    None means one scale per output channel.
    """

    block_size: int | None = None

    bits: ClassVar[int]
    quantized: ClassVar[bool] = True
    # No engine can hold it: it runs in ONNX Runtime alone, and its bytes are nominal.
    simulated: ClassVar[bool] = False
    # What an engine's log may call the type of the stored weight.
    engine_types: ClassVar[tuple[str, ...]] = ()
    # Whether branches may stand beside it, as far as they suit it.
    takes_branches: ClassVar[bool] = True
    # The first opset of ONNX that has it: blocks and INT4 are in 21.
    opset: ClassVar[int] = 21
    # Which GPUs brought the format, where not all have it.
    generation: ClassVar[str] = ""

    @property
    def form(self) -> str:
        """Name of the codes and scales: schemes with equal forms hold the same ones for a layer."""
        raise NotImplementedError

    def block(self, layer: Layer) -> int | None:
        """How many elements of the reduction share a scale in ``layer``; None when no block size fits."""
        return layer.reduction

    def refusal(self, layer: Layer) -> str:
        """Say why ``layer`` cannot be stored so; empty when it can."""
        return ""

    def multiplies(self, layer: Layer, alone: bool) -> bool:
        """Whether a Conv becomes a matrix product over its windows; ``alone``: its input stays in FP16."""
        return layer.window is not None and alone and self.quantized and not self.simulated

    def stored_shape(self, layer: Layer) -> tuple[int, int]:
        """Rows and columns in which the file holds the weight."""
        return matrix_shape(layer)

    def dialect_refusal(self, layer: Layer, dialect: Dialect) -> str:
        """Say why a builder is documented to refuse the weight, such as "size is odd"; else empty."""
        return ""

    def bytes_of(self, layer: Layer) -> int:
        """Bytes of all constants written for the weight: codes, scales and shapes."""
        raise NotImplementedError

    def unpacked_bytes(self, layer: Layer, alone: bool) -> int:
        """Bytes that a call unpacks into memory; 0 where the product reads the weight as stored.

        ``alone``: the activation stays in FP16.
        """
        return 0

    def fuses(self, layer: ExpectedLayer) -> bool:
        """Whether TensorRT-RTX can multiply by the packed weight as it lies (docs/engine-forms.md)."""
        return False

    def joins(self, alone: bool) -> bool:
        """Whether TensorRT-RTX multiplies several such weights of one input as one product."""
        return False

    @property
    def rounder(self) -> Rounder:
        """What rounds schemes of this kind of format, all of a layer's at once: weight form -> matrix."""
        raise NotImplementedError

    def read(self, arrays: Mapping[str, Array]) -> DeployedMatrix:
        """Read what ``DeployedMatrix.arrays`` gave."""
        raise NotImplementedError

    def write(self, to: LayerWriter, matrix: Any) -> ir.Value:
        """Write constants and nodes in front of the node; return the dequantized weight."""
        raise NotImplementedError

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        """Make the weight's twin in torch, which recovery trains."""
        raise NotImplementedError


@dataclass(frozen=True)
class ActivationFormat:
    """How the input of a layer is rounded.

    ``takes_ranges``: its range may follow the timestep or the values (``formats.ranges``).
    """

    bits: ClassVar[int]
    takes_ranges: ClassVar[bool] = False
    simulated: ClassVar[bool] = False
    # What an engine's log calls both operands of the product, and the bytes of one element.
    operand: ClassVar[str] = ""
    value_bytes: ClassVar[float] = 1
    # The ranks of inputs that can be rounded so; empty: all.
    ranks: ClassVar[tuple[int, ...]] = ()
    # Where ONNX Runtime lacks it: what its twin graph does instead, for the report.
    twin_only: ClassVar[str] = ""
    # The target's figure that gives the rate of its products.
    rate: ClassVar[str] = "int8_ops_per_s"

    @property
    def form(self) -> str:
        """What is appended to a tensor's name for this quantizer's; "" for the common one."""
        return ""

    def grid(self, stats: ActivationStats, scale: float) -> ActivationGrid:
        """Return the quantizer by calibration's ``stats``; ``scale``: that of INT8."""
        raise NotImplementedError

    def reader_bytes(self, layer: Layer) -> int:
        """Bytes counted for each layer that reads the quantized input."""
        return 0

    def engine_bytes(self, layer: ExpectedLayer) -> int:
        """Bytes that the builder adds for the product's scales."""
        return 0

    def operations_per_s(self, rates: Rates) -> float:
        """Peak rate of products in this format."""
        raise NotImplementedError

    def write(
        self, to: NodeWriter, value: ir.Value, grid: ActivationGrid, key: tuple[str, str]
    ) -> list[ir.Node]:
        """Return nodes, not yet inserted, that round ``value``; the last gives the rounded value.

        ``key``: the tensor and the scheme's ``activation_form``, for names.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Branch:
    """A part of a layer that gets more precision beside its body; ``amount`` says how much.

    This class itself means no branch, and is false: it does what the weight's format does.
    """

    amount: int = 0

    kind: ClassVar[str] = ""
    # For the report: "w4a16-b128; <meaning>".
    meaning: ClassVar[str] = ""
    # Kernels launched beside the body's, and those among them that work on the input alone.
    kernels: ClassVar[int] = 0
    input_kernels: ClassVar[int] = 0
    # Output channels get INT8 weights, most salient first: ``assemble`` makes the matrix from an
    # order.
    promotes: ClassVar[bool] = False
    # The input's channels are multiplied by factors, which its producer may take.
    rescales: ClassVar[bool] = False

    def __bool__(self) -> bool:
        return bool(self.kind)

    @property
    def suffix(self) -> str:
        """How a scheme's name ends with this branch."""
        return f"+{self.kind}{self.amount or ''}" if self.kind else ""

    @property
    def activation_form(self) -> str:
        """As ``ActivationFormat.form``: not "" where the branch changes the input's quantizer."""
        return ""

    def suits(self, body: Scheme) -> bool:
        """Whether the branch may stand beside ``body`` at all."""
        raise NotImplementedError

    def refusal(self, layer: Layer) -> str:
        """Say why ``layer`` cannot have the branch; empty when it can."""
        return ""

    def parts(self, layer: Layer, scheme: Scheme) -> tuple[tuple[Layer, Scheme], ...]:
        """Return body and branch as layers of their own, by the names that the graph gives, and their schemes."""
        return ((layer, scheme.body),)

    def joining_bytes(self, layer: Layer) -> int:
        """Bytes of the constants that bring body and branch together."""
        return 0

    def nominal_bits(self, layer: Layer, body: int) -> float:
        """Mean bits per weight where the body has ``body``; parts that widen no weight count as nothing."""
        return float(body)

    def input_scale(self, stats: ActivationStats) -> float:
        """Return the INT8 scale of the input."""
        return stats.scale

    def input_amax(self, stats: ActivationStats) -> Array:
        """Return the largest magnitude of the input as it is quantized, by calibrated timestep, float [K]."""
        return np.asarray(stats.amax_by_timestep.max(axis=1))

    def rank(self, stats: ActivationStats) -> int:
        """How many variants of the branch promise more for an input with these ``stats``, before measuring."""
        return 0

    def input_bytes(self, layer: Layer) -> int:
        """Bytes of the input's quantizer beside its scale."""
        return 0

    def left_out(self, stats: ActivationStats) -> Array:
        """Return the input channels that stay in float, int32 [n], ascending."""
        return np.empty(0, np.int32)

    def factors(self, stats: ActivationStats) -> Array | None:
        """Return by what the input's channels are multiplied before rounding, float16 [C]; None for none."""
        return None

    def factors_in(self, matrix: Any) -> Array | None:
        """Return the factors that ``matrix`` was rounded for; None for none."""
        return None

    def rounds_first(self, scheme: Scheme) -> tuple[Scheme, ...]:
        """Return the schemes that are rounded before, with all others: the body, as a rule."""
        return (scheme.body,)

    def rescaling(self, layer: LayerRounding) -> Array | None:
        """Return by what the input's channels are multiplied in the body's place, float16 [C]; None for none."""
        return None

    def around(self, body: DeployedMatrix, layer: LayerRounding) -> DeployedMatrix:
        """Return the matrix of a ``body`` that was rounded for the branch with all others."""
        return body

    def round(self, scheme: Scheme, layer: LayerRounding, forms: Forms) -> DeployedMatrix | None:
        """Return the matrix, given the ``forms`` rounded before; None where these hold all that is known yet."""
        return None

    def assemble(self, scheme: Scheme, layer: Layer, forms: Forms, order: Array) -> DeployedMatrix:
        """Return the matrix where ``promotes``; ``order`` int [O]: output channels, most salient first."""
        raise NotImplementedError

    def read(self, scheme: Scheme, stored: StoredMatrix) -> DeployedMatrix:
        """Read what ``DeployedMatrix.arrays`` gave."""
        return scheme.weight.read(stored.arrays)

    def write(self, to: LayerWriter, scheme: Scheme, matrix: Any) -> None:
        """Give ``to.node`` the quantized weight, and write the branch beside it."""
        weight = scheme.weight.write(to, matrix)
        if scheme.multiplies(to.layer):
            to.multiply(weight)
        else:
            to.node.replace_input_with(1, weight)

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        """As ``WeightFormat.twin``."""
        return start.scheme.weight.twin(start, kit)

    def traffic(self, layer: Layer, whole: Traffic) -> tuple[Traffic, ...]:
        """What each of ``parts`` reads and writes, where all of the layer has ``whole``."""
        return (whole,)

    def joining_traffic(self, layer: Layer, whole: Traffic) -> int:
        """Bytes moved to gather channels and to join the parts, beside their products."""
        return 0


@dataclass(frozen=True)
class Scheme:
    """What a layer becomes: how its weight is stored, how its input is rounded (None: FP16), and its branch.

    ``range``: where the rounded input's range comes from.
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
        """Whether it is not FP16."""
        return self.weight.quantized

    @property
    def simulated(self) -> bool:
        """Whether no engine can hold it: it runs as Q/DQ in ONNX Runtime, and its bytes are nominal."""
        return self.weight.simulated

    @property
    def block_size(self) -> int | None:
        """The weight's nominal block size."""
        return self.weight.block_size

    @cached_property
    def family(self) -> str:
        """The name without block size, range and branch, such as ``w4a16``; ``simulated`` for all of those."""
        return SIMULATED if self.simulated else self.series

    @cached_property
    def series(self) -> str:
        """What schemes share that differ only in block size, range or branch: ``w4a16``, ``w2a4-sim``."""
        body = self.name.split("+")[0]
        return body if self.simulated else body.split("-")[0]

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of the weights and of the activations, 16 for FP16."""
        return self.weight.bits, self.activation.bits if self.activation else 16

    @property
    def operand_bytes(self) -> float:
        """Bytes of one element of the input as the product reads it."""
        return self.activation.value_bytes if self.activation else FP16_BYTES

    @cached_property
    def weight_form(self) -> str:
        """Schemes with equal forms hold the same codes and scales for a layer: ``w8a8`` and ``w8a16``."""
        return self.weight.form + self.branch.suffix

    @cached_property
    def activation_form(self) -> str:
        """Schemes with equal forms share the quantizer of an input; "" for the common one, and for none."""
        own = self.activation.form + self.range.suffix if self.activation else ""
        return own + self.branch.activation_form

    @cached_property
    def body(self) -> Scheme:
        """The scheme without its branch."""
        return replace(self, name=self.name.split("+")[0], branch=Branch()) if self.branch else self

    @property
    def static(self) -> Scheme:
        """The scheme without its branch, with one range for all timesteps."""
        name = self.body.name.removesuffix(self.range.suffix)
        return replace(self.body, name=name, range=STATIC)

    @property
    def timeless(self) -> Scheme:
        """The scheme as a layer alone runs it, without a timestep: its big kernels are the same."""
        if not self.range.by_timestep:
            return self
        return self.static.with_branch(self.branch) if self.branch else self.static

    def with_range(self, kind: ActivationRange) -> Scheme:
        """Return this body with another range of its input."""
        meaning = f"{self.meaning}, {kind.meaning}" if kind.meaning else self.meaning
        return replace(self, name=f"{self.name}{kind.suffix}", range=kind, meaning=meaning)

    def with_branch(self, branch: Branch) -> Scheme:
        """Return this scheme with ``branch`` beside it."""
        return replace(self, name=f"{self.name}{branch.suffix}", branch=branch)

    def multiplies(self, layer: Layer) -> bool:
        """Whether ``layer`` is a Conv that the scheme turns into a matrix product over its windows."""
        return self.weight.multiplies(layer, self.activation is None)

    def refusal(self, layer: Layer) -> str:
        """Say why ``layer`` cannot take the scheme, whatever the target; empty when it can."""
        if self.branch and layer.group > 1:
            return "branches are written for convolutions of one group"
        return self.branch.refusal(layer) or self.weight.refusal(layer)

    def parts(self, layer: Layer) -> tuple[tuple[Layer, Scheme], ...]:
        """Return ``layer`` as the parts that the graph computes, body first, each with its scheme."""
        return self.branch.parts(layer, self)

    def stored_shape(self, layer: Layer) -> tuple[int, int]:
        """Rows and columns in which the file holds the body's weight."""
        return self.weight.stored_shape(self.parts(layer)[0][0])

    def shifts(self, layer: Layer) -> bool:
        """Whether the channels of the input of ``layer`` are shifted before it is rounded."""
        return self.activation is not None and self.activation_form in layer.shifted

    def weight_bytes(self, layer: Layer) -> int:
        """Bytes of all constants that are written for ``layer``: codes, scales, shapes, what shifts add.

        The activation's scale is not among them: layers that share an input share it. A simulated
        scheme's bytes are nominal: those that a packed form would take, if there were one.
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
        """Bytes of the body's weight that a call unpacks into memory; 0 where that is fused into the product."""
        return self.weight.unpacked_bytes(layer, self.activation is None)

    @cached_property
    def kernel_family(self) -> str:
        """What schemes share whose products may be one kernel: not their blocks, branches or timesteps."""
        return self.family + self.timeless.range.suffix

    @property
    def joins(self) -> bool:
        """Whether products of one input are assumed to be one kernel (docs/engine-forms.md)."""
        return not self.branch.kernels and self.weight.joins(self.activation is None)

    def input_bytes(self, layer: Layer) -> int:
        """Bytes of the constants that quantize the input, shared by layers that share them.

        Factors of channels are counted, though a producer may take them.
        """
        return self.scale_bytes(layer) + self.branch.input_bytes(layer) if self.activation else 0

    def scale_bytes(self, layer: Layer) -> int:
        """Bytes of ``input_bytes`` that stay where a producer takes the factors of channels."""
        shift = shift_bytes(layer) if self.shifts(layer) else 0
        return ACTIVATION_SCALE_BYTES + self.range.input_bytes(layer) + shift

    def input_grid(self, stats: ActivationStats) -> ActivationGrid:
        """Return how the input with these ``stats`` is quantized; only where ``activation`` is given."""
        assert self.activation is not None
        grid = self.activation.grid(stats, self.range.scale(self.branch, stats))
        return stats.shifted(self.range.fitted(grid, self.branch, stats), self.activation_form)


SIMULATED = "simulated"
