"""What a builder needs to know about a target. Standard library only: this also runs on a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# What may build an engine: two Python packages of NVIDIA, and its command-line program. A builder's
# name is imported as a module, so no other name is accepted.
BUILDERS = ("tensorrt_rtx", "tensorrt", "trtexec")


@dataclass(frozen=True)
class BuildTarget:
    """The fields of an ``engine.target.Target`` that say what builds for it, and for which GPUs."""

    name: str
    title: str
    dialect: str
    builder: str
    versions: tuple[str, ...]
    jetpack: str
    compute_capabilities: tuple[str, ...]

    def takes_version(self, version: str) -> bool:
        """Tell whether the dialect holds for the builder's ``version``."""
        return version_fits(version, self.versions)


def version_fits(version: str, allowed: Iterable[str]) -> bool:
    """Whether ``version`` begins with the parts of one ``allowed`` (none given: any version does).

    10.3.0 is 10.3, 10.30 is not.
    """
    parts = version.split(".")
    prefixes = [one.rstrip(".").split(".") for one in allowed]
    return not prefixes or any(parts[: len(prefix)] == prefix for prefix in prefixes)
