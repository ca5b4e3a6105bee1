"""Precision (a number format) and Scheme (what a layer becomes)."""

from __future__ import annotations

from dataclasses import dataclass

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
class Scheme:
    """What a layer becomes: the weight's format and granularity, and the activation's format.

    ``weight`` None means FP16. ``block_size`` None means one scale per output channel; otherwise one scale per
    output channel and ``block_size`` consecutive elements of the reduction axis. ``requantized`` marks 4-bit
    storage that is turned into INT8 at run time (w4a8).
    """

    name: str
    weight: Precision | None
    activation: Precision | None
    block_size: int | None = None

    @property
    def requantized(self) -> bool:
        """4-bit storage with INT8 compute."""
        return self.weight is INT4 and self.activation is INT8

    @property
    def family(self) -> str:
        """The scheme's name without its block size, such as ``w4a16``."""
        return self.name.split("-")[0]

    @property
    def weight_form(self) -> str:
        """Schemes with equal forms hold the same codes and scales for the same layer: ``w8a8`` and ``w8a16``."""
        if self.weight is None:
            return "fp16"
        if self.weight is INT8:
            return "int8"
        return f"{'int4x8' if self.requantized else 'int4'}-b{self.block_size}"


FP16 = Scheme("fp16", None, None)
W8A8 = Scheme("w8a8", INT8, INT8)
W8A16 = Scheme("w8a16", INT8, None)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        FP16,
        W8A8,
        W8A16,
        *(Scheme(f"w4a16-b{block}", INT4, None, block) for block in BLOCK_SIZES),
        *(Scheme(f"w4a8-b{block}", INT4, INT8, block) for block in BLOCK_SIZES),
    )
}
FAMILIES = ("fp16", "w8a8", "w8a16", "w4a16", "w4a8")


def schemes_named(names: list[str] | tuple[str, ...]) -> tuple[Scheme, ...]:
    """Return the schemes for ``names``, where a family such as ``w4a16`` stands for all its block sizes.

    Raises UsageError for an unknown name, naming the nearest.
    """
    chosen: dict[str, Scheme] = {}
    for name in names:
        found = [s for s in SCHEMES.values() if name in (s.name, s.family)]
        if not found:
            known = [*SCHEMES, *FAMILIES]
            raise UsageError(
                f"Unknown scheme '{name}'.",
                f"{nearest(name, known)}Known schemes: {', '.join(SCHEMES)}.",
            )
        chosen.update({s.name: s for s in found})
    return tuple(s for s in SCHEMES.values() if s.name in chosen)
