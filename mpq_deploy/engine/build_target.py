"""What a builder must know of a target: a ``Target``, or what a package says of one."""

from __future__ import annotations

from typing import Protocol


class BuildTarget(Protocol):
    """See ``engine.target.Target``, whose fields these are."""

    @property
    def name(self) -> str:
        """The target's name."""

    @property
    def dialect(self) -> str:
        """What its graphs are written in."""

    @property
    def builder(self) -> str:
        """Which builder builds for it."""

    @property
    def versions(self) -> tuple[str, ...]:
        """The builder's versions that the dialect holds for."""

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The GPUs that the engine must run on."""

    def takes_version(self, version: str) -> bool:
        """Tell whether the dialect holds for the builder's ``version``."""
