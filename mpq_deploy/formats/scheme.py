"""Precision (a number format) and Scheme (what a layer becomes)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2

from mpq_deploy.errors import UsageError, nearest


@dataclass(frozen=True)
class Precision:
    """An integer format: ``bits`` wide, codes in [quant_min, quant_max].

    The deployable ones are signed, with zero point 0. A ``simulated`` one has no type in TensorRT that is this wide: it
    has zero points, and its codes lie in wider types.
    """

    name: str
    bits: int
    quant_min: int
    quant_max: int
    simulated: bool = False


INT4 = Precision("int4", 4, -8, 7)
# -128 is left out so that the range is symmetric, as TensorRT's own calibrators do.
INT8 = Precision("int8", 8, -127, 127)

# What the target simulate may take: weights with one scale and zero point per output channel, activations with one of
# each per tensor.
SIMULATED_BITS = (2, 3, 4, 5, 6, 7, 8)
SIMULATED_PRECISIONS = {bits: Precision(f"sim{bits}", bits, 0, 2**bits - 1, True) for bits in SIMULATED_BITS}

BLOCK_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Branch:
    """A part of a layer that gets more precision, beside its body, and how much.

    ``rows``: ``amount`` tenths of the output channels have INT8 weights. ``cols``: ``amount`` thirty-seconds of the
    input channels stay out of the INT8 activation, and have FP16 weights. ``lowrank``: two FP16 factors of rank
    ``amount``. ``scale``: the input's channels are multiplied, and the weight's divided, by a factor each that evens
    out their ranges; ``amount`` tenths is how much of the activation's range moves to the weight (MPQ-DM: half).
    Simulated: ``omq`` and ``zres`` share out the bits among the output channels, whose mean stays that of the body;
    they have no amount.
    """

    kind: str
    amount: int = 0

    @property
    def suffix(self) -> str:
        """How a scheme's name ends with this branch."""
        return f"+{self.kind}{self.amount or ''}"


SIMULATED_KINDS = ("omq", "zres")
BRANCH_KINDS = ("rows", "cols", "lowrank", "scale", *SIMULATED_KINDS)
# What a branch launches beside the body's kernel: the second product and the joining of channels; the gathering and the
# small product; the two factors (TensorRT-RTX fuses an addition into the product before it); the multiplication, where
# the producer cannot take it. Simulated: none.
BRANCH_KERNELS = {"rows": 2, "cols": 2, "lowrank": 2, "scale": 1, "omq": 0, "zres": 0}


@dataclass(frozen=True)
class Scheme:
    """What a layer becomes: the weight's format and granularity, and the activation's format.

    ``weight`` None means FP16. ``block_size`` None means one scale per output channel; otherwise one scale per
    output channel and ``block_size`` consecutive elements of the reduction axis. ``requantized`` marks 4-bit
    storage that is turned into INT8 at run time (w4a8). ``branch``: what is computed beside the body, if anything.
    """

    name: str
    weight: Precision | None
    activation: Precision | None
    block_size: int | None = None
    branch: Branch | None = None

    @property
    def requantized(self) -> bool:
        """4-bit storage with INT8 compute."""
        return self.weight is INT4 and self.activation is INT8

    @property
    def simulated(self) -> bool:
        """Whether no engine can hold this scheme: it runs as Q/DQ in ONNX Runtime, and its bytes are nominal."""
        return self.weight is not None and self.weight.simulated

    @property
    def family(self) -> str:
        """The scheme's name without its block size and branch, such as ``w4a16``; ``simulated`` for all of those."""
        return SIMULATED if self.simulated else self.series

    @property
    def series(self) -> str:
        """What schemes share that differ only in their block size or branch: ``w4a16``, ``w2a4-sim``."""
        body = self.name.split("+")[0]
        return body if self.simulated else body.split("-")[0]

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of the weights and of the activations, 16 for FP16."""
        return (self.weight.bits if self.weight else 16), (self.activation.bits if self.activation else 16)

    @property
    def weight_form(self) -> str:
        """Schemes with equal forms hold the same codes and scales for the same layer: ``w8a8`` and ``w8a16``."""
        if self.weight is None:
            return "fp16"
        suffix = self.branch.suffix if self.branch else ""
        if self.weight.simulated:
            return f"{self.weight.name}{suffix}"
        if self.weight is INT8:
            return f"int8{suffix}"
        return f"{'int4x8' if self.requantized else 'int4'}-b{self.block_size}{suffix}"

    @property
    def activation_form(self) -> str:
        """Schemes with equal forms share the quantizer of an input: which channels it leaves out or rescales.

        "" for none. Of simulated schemes: how wide it is, such as ``+a4``.
        """
        if self.activation is not None and self.activation.simulated:
            return f"+a{self.activation.bits}"
        return self.branch.suffix if self.branch and self.branch.kind in ("cols", "scale") else ""

    @property
    def body(self) -> Scheme:
        """The scheme without its branch."""
        return replace(self, name=self.name.split("+")[0], branch=None)

    def with_branch(self, branch: Branch) -> Scheme:
        """Return this scheme with ``branch`` beside it."""
        return replace(self, name=f"{self.name}{branch.suffix}", branch=branch)


FP16 = Scheme("fp16", None, None)
W8A8 = Scheme("w8a8", INT8, INT8)
W8A16 = Scheme("w8a16", INT8, None)

_INT4_BODIES = (
    *(Scheme(f"w4a16-b{block}", INT4, None, block) for block in BLOCK_SIZES),
    *(Scheme(f"w4a8-b{block}", INT4, INT8, block) for block in BLOCK_SIZES),
)
# A layer's branches stand beside one of its INT4 bodies, that of blocks nearest to this: blocks and branches would
# otherwise multiply the candidates.
BRANCH_BLOCK = 128
# MPQ-DM's group search: m = 0, k, 2k, ... of the output channels, k = c_out // 10, up to half of them.
ROW_TENTHS = (1, 2, 3, 4, 5)
RANKS = (8, 16)
COLUMN_SHARES = (1, 2)
# MPQ-DM's pre-scaling: factors of (max|W| / max|X|) ** 0.5.
SCALE_TENTHS = (5,)

SIMULATED = "simulated"
# w2a2-sim to w8a8-sim, and w2a16-sim to w8a16-sim.
_SIMULATED_BODIES = tuple(
    Scheme(f"w{weight.bits}a{activation.bits if activation else 16}-sim", weight, activation)
    for weight in SIMULATED_PRECISIONS.values()
    for activation in (*SIMULATED_PRECISIONS.values(), None)
)
# Mean bits of the layers that share out bits among their channels: {1, 2, 3} to {3, 4, 5} bits per channel.
SHARED_OUT_BITS = (2, 3, 4)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        FP16,
        W8A8,
        W8A16,
        *_INT4_BODIES,
        *(body.with_branch(Branch("rows", tenths)) for body in _INT4_BODIES for tenths in ROW_TENTHS),
        *(
            body.with_branch(Branch("cols", share))
            for body in (W8A8, *_INT4_BODIES)
            if body.activation is INT8
            for share in COLUMN_SHARES
        ),
        *(
            body.with_branch(Branch("scale", tenths))
            for body in (W8A8, *_INT4_BODIES)
            if body.activation is INT8
            for tenths in SCALE_TENTHS
        ),
        *(
            body.with_branch(Branch("lowrank", rank))
            for body in _INT4_BODIES
            if body.activation is None
            for rank in RANKS
        ),
        *_SIMULATED_BODIES,
        *(
            body.with_branch(Branch(kind))
            for body in _SIMULATED_BODIES
            if body.bits[0] in SHARED_OUT_BITS
            for kind in SIMULATED_KINDS
        ),
    )
}
FAMILIES = ("fp16", "w8a8", "w8a16", "w4a16", "w4a8")


def outlier_count(channels: int, share: int) -> int:
    """How many of ``channels`` are ``share`` thirty-seconds: at least one, if any (our choice)."""
    return max(1, share * channels // 32) if share else 0


def branches_of(bodies: tuple[Scheme, ...], kinds: tuple[str, ...]) -> tuple[Scheme, ...]:
    """Return the schemes with a branch of one of ``kinds`` beside one of ``bodies``."""
    names = {scheme.name for scheme in bodies}
    return tuple(s for s in SCHEMES.values() if s.branch and s.branch.kind in kinds and s.body.name in names)


def schemes_named(names: list[str] | tuple[str, ...]) -> tuple[Scheme, ...]:
    """Return the schemes for ``names``, where a family such as ``w4a16`` stands for all its block sizes.

    Raises UsageError for an unknown name, naming the nearest.
    """
    chosen: dict[str, Scheme] = {}
    for name in names:
        found = [s for s in SCHEMES.values() if name == s.name or (name == s.family and not s.branch)]
        if not found:
            known = [*SCHEMES, *FAMILIES, SIMULATED]
            deployable = ", ".join(s.name for s in SCHEMES.values() if not s.simulated)
            raise UsageError(
                f"Unknown scheme '{name}'.",
                f"{nearest(name, known)}Known schemes: {deployable}; and for the target simulate, w2a2-sim to w8a8-sim "
                "and w2a16-sim to w8a16-sim.",
            )
        chosen.update({s.name: s for s in found})
    return tuple(s for s in SCHEMES.values() if s.name in chosen)


def nearest_scheme(scheme: Scheme, offered: tuple[Scheme, ...]) -> Scheme:
    """Return the one of ``offered`` (not empty) that comes nearest to ``scheme`` in its weights' bits, then in its
    activations'; of two as near, the wider. Our choice.
    """

    def distance(other: Scheme) -> tuple[float, ...]:
        pairs = list(zip(other.bits, scheme.bits))
        return (*(abs(log2(a / b)) for a, b in pairs), -other.bits[0], -other.bits[1], len(other.name))

    return min(offered, key=distance)
