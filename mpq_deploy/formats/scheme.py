"""All schemes: every number format, with every range and branch that suits it.

A new format or branch is one file in ``formats/`` and its name in ``FORMATS`` or ``BRANCHES``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import log2

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.formats.branches.cols import SHARES, Cols
from mpq_deploy.formats.branches.lowrank import RANKS, LowRank
from mpq_deploy.formats.branches.omq import Omq
from mpq_deploy.formats.branches.prescaled import TENTHS, Prescaled
from mpq_deploy.formats.branches.rows import TENTHS as ROW_TENTHS
from mpq_deploy.formats.branches.rows import Rows
from mpq_deploy.formats.branches.zres import ZeroResidual
from mpq_deploy.formats.fp8 import FP8_BODIES
from mpq_deploy.formats.fp16 import FP16
from mpq_deploy.formats.int4 import INT4_BODIES
from mpq_deploy.formats.int8 import W8A8, W8A16
from mpq_deploy.formats.interfaces import SIMULATED, Branch, Scheme
from mpq_deploy.formats.nvfp4 import NVFP4
from mpq_deploy.formats.ranges import RANGES
from mpq_deploy.formats.simulated import SIMULATED_BODIES

__all__ = [
    "BRANCH_KINDS",
    "FAMILIES",
    "FP16",
    "SCHEMES",
    "SIMULATED",
    "W8A8",
    "W8A16",
    "Scheme",
    "families",
]

# Every target's YAML must allow or refuse these families; it may omit others.
FAMILIES = ("fp16", "w8a8", "w8a16", "w4a16", "w4a8")
# The schemes without branches, and the variants of each branch.
FORMATS: tuple[Scheme, ...] = (FP16, W8A8, W8A16, *INT4_BODIES, *FP8_BODIES, NVFP4)
BRANCHES: tuple[tuple[Branch, ...], ...] = (
    tuple(Rows(tenths) for tenths in ROW_TENTHS),
    tuple(Cols(share) for share in SHARES),
    tuple(Prescaled(tenths) for tenths in TENTHS),
    tuple(LowRank(rank) for rank in RANKS),
    (Omq(), ZeroResidual()),
)
SCHEMES: dict[str, Scheme] = {}
# Kind -> its class.
BRANCH_KINDS = {branch.kind: type(branch) for variants in BRANCHES for branch in variants}


def with_ranges(bodies: Iterable[Scheme]) -> Iterator[Scheme]:
    """Yield each of ``bodies`` with every range that its activation format takes."""
    for body in bodies:
        moves = body.activation is not None and body.activation.takes_ranges
        yield from (body.with_range(kind) for kind in (RANGES if moves else RANGES[:1]))


def with_branches(bodies: Iterable[Scheme]) -> Iterator[Scheme]:
    """Yield ``bodies``, then each with every branch that suits it and its range."""
    bodies = tuple(bodies)
    yield from bodies
    for variants in BRANCHES:
        pairs = ((body, b) for body in bodies if body.weight.takes_branches for b in variants)
        yield from (
            body.with_branch(branch)
            for body, branch in pairs
            if branch.suits(body) and body.range.suits(branch)
        )


def register(bodies: Iterable[Scheme]) -> None:
    """Add ``bodies``, with all ranges and branches, to ``SCHEMES``. ValueError for a used name."""
    for scheme in with_branches(with_ranges(bodies)):
        if scheme.name in SCHEMES:
            raise ValueError(f"there is a scheme '{scheme.name}' already")
        SCHEMES[scheme.name] = scheme


register(FORMATS)
register(SIMULATED_BODIES)
# Families that only some GPUs support: candidates by default where the target lists them.
NEW_FAMILIES = tuple(dict.fromkeys(s.family for s in FORMATS if s.weight.generation))


def rate_of(family: str) -> str:
    """Return the target's field with the rate of products of ``family``; "" for FP16 products."""
    schemes = (s for s in SCHEMES.values() if s.family == family and not s.simulated)
    activation = next(schemes, FP16).activation
    return activation.rate if activation else ""


def families() -> tuple[str, ...]:
    """Return the families that targets may list."""
    return tuple(dict.fromkeys(scheme.family for scheme in SCHEMES.values()))


def branches_of(bodies: tuple[Scheme, ...], kinds: tuple[str, ...]) -> tuple[Scheme, ...]:
    """Return the schemes with one of ``bodies`` and a branch of one of ``kinds``."""
    names = {scheme.name for scheme in bodies}
    return tuple(
        s for s in SCHEMES.values() if s.branch and s.branch.kind in kinds and s.body.name in names
    )


def ranges_of(bodies: tuple[Scheme, ...], kinds: tuple[str, ...]) -> tuple[Scheme, ...]:
    """Return ``bodies``, and the same bodies with a range of one of ``kinds``."""
    names = {scheme.name for scheme in bodies}
    return tuple(
        s
        for s in SCHEMES.values()
        if not s.branch and (s.name in names or (s.range.kind in kinds and s.static.name in names))
    )


def schemes_named(names: list[str] | tuple[str, ...]) -> tuple[Scheme, ...]:
    """Return the schemes for ``names``; a family (``w4a16``) stands for all its block sizes.

    A family includes static ranges only. Raises UsageError, which names the nearest scheme, for an
    unknown name.
    """
    chosen: dict[str, Scheme] = {}
    for name in names:
        found = [
            s
            for s in SCHEMES.values()
            if name == s.name or (name == s.family and not s.branch and not s.range.moves)
        ]
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
    """Return the scheme of ``offered`` (not empty) that is most like ``scheme`` (our choice).

    It compares the bits of the weights, then of the activations, then whether both need FP8 or FP4
    hardware. Ties go to the one with more bits.
    """

    def distance(other: Scheme) -> tuple[float, ...]:
        pairs = list(zip(other.bits, scheme.bits))
        return (
            *(abs(log2(a / b)) for a, b in pairs),
            bool(scheme.weight.generation) != bool(other.weight.generation),
            -other.bits[0],
            -other.bits[1],
            len(other.name),
        )

    return min(offered, key=distance)
