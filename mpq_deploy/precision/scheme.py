"""Precision (a number format) and Scheme (what a layer becomes)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpq_deploy.errors import UsageError, nearest


@dataclass(frozen=True)
class Precision:
    """A signed integer format: ``bits`` wide, codes in [quant_min, quant_max], zero point 0."""

    name: str
    bits: int
    quant_min: int
    quant_max: int


INT4 = Precision("int4", 4, -8, 7)
# -128 is left out so that the range is symmetric, as TensorRT's own calibrators do.
INT8 = Precision("int8", 8, -127, 127)

BLOCK_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Branch:
    """A part of a layer that gets more precision, beside its body, and how much.

    ``rows``: ``amount`` tenths of the output channels have INT8 weights. ``cols``: ``amount`` thirty-seconds of the
    input channels stay out of the INT8 activation, and have FP16 weights. ``lowrank``: two FP16 factors of rank
    ``amount``. ``scale``: the input's channels are multiplied, and the weight's divided, by a factor each that evens
    out their ranges; ``amount`` tenths is how much of the activation's range moves to the weight (MPQ-DM: half).
    """

    kind: str
    amount: int

    @property
    def suffix(self) -> str:
        """How a scheme's name ends with this branch."""
        return f"+{self.kind}{self.amount}"


BRANCH_KINDS = ("rows", "cols", "lowrank", "scale")
# What a branch launches beside the body's kernel: the second product and the joining of channels; the gathering and the
# small product; the two factors (TensorRT-RTX fuses an addition into the product before it); the multiplication, where
# the producer cannot take it.
BRANCH_KERNELS = {"rows": 2, "cols": 2, "lowrank": 2, "scale": 1}


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
    def family(self) -> str:
        """The scheme's name without its block size and branch, such as ``w4a16``."""
        return self.name.split("+")[0].split("-")[0]

    @property
    def weight_form(self) -> str:
        """Schemes with equal forms hold the same codes and scales for the same layer: ``w8a8`` and ``w8a16``."""
        if self.weight is None:
            return "fp16"
        suffix = self.branch.suffix if self.branch else ""
        if self.weight is INT8:
            return f"int8{suffix}"
        return f"{'int4x8' if self.requantized else 'int4'}-b{self.block_size}{suffix}"

    @property
    def activation_form(self) -> str:
        """Schemes with equal forms share the quantizer of an input: which channels it leaves out or rescales."""
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
            known = [*SCHEMES, *FAMILIES]
            raise UsageError(
                f"Unknown scheme '{name}'.",
                f"{nearest(name, known)}Known schemes: {', '.join(SCHEMES)}.",
            )
        chosen.update({s.name: s for s in found})
    return tuple(s for s in SCHEMES.values() if s.name in chosen)
