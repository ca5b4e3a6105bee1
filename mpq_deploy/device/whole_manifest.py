"""The manifest of a whole pipeline's package: its target, its components, how its images are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq_deploy.device.archive import MANIFEST, ArchiveError, odd_parts
from mpq_deploy.device.generate.generation_folder import COMPONENTS, WHAT
from mpq_deploy.device.manifest import (
    AGAIN,
    DIGEST,
    FORMAT,
    LARGEST_TOLERANCE,
    check_target,
    read_manifest,
)
from mpq_deploy.engine.build_target import BuildTarget
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.names import checked_name, printable

# In the manifest: that it is of a whole pipeline.
WHOLE = "whole"
MOST_STEPS, MOST_IMAGES = 1000, 10


@dataclass(frozen=True)
class ReferenceImage:
    """An image that the build machine made by ONNX Runtime, and what it was asked for."""

    file: str
    prompt: str
    steps: int
    guidance: float
    seed: int


@dataclass(frozen=True)
class WholeManifest:
    """``parts``: name -> SHA-256 of every other part; ``components``: name -> estimated bytes in memory.

    ``tolerance``: what a device's image may differ by, as ``image_error`` counts it. ``digests``: of
    each component's plan and graph. ``target.builder``: "none" where ONNX Runtime runs the graphs.
    """

    name: str
    made_by: str
    target: BuildTarget
    parts: dict[str, str]
    components: dict[str, int]
    images: tuple[ReferenceImage, ...]
    tolerance: float
    digests: dict[str, dict[str, str]]
    alternatives: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def engines(self) -> bool:
        """Whether engines are built on the device."""
        return self.target.builder != "none"

    def to_json(self) -> str:
        """Return JSON with sorted keys."""
        values = {"format": FORMAT, WHOLE: True, **asdict(self)}
        return json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> WholeManifest:
        """Read what ``to_json`` gave. Raises ArchiveError as ``Manifest.load`` does."""
        return read_manifest(cls, path, WHOLE)

    def check(self) -> None:
        """Raise ValueError or InputError where a value is impossible, or a check is switched off."""
        check_target(self.target, self.alternatives, ("none",))
        checked_name(self.name, "Its name")
        odd = odd_parts(self.parts)
        if odd:
            raise ValueError(f"its parts are not those of a whole pipeline: {', '.join(odd[:5])}")
        if not all(DIGEST.fullmatch(digest) for digest in self.parts.values()):
            raise ValueError("a part's digest is not a SHA-256")
        self._check_components()
        if len(self.images) > MOST_IMAGES or not 0 < self.tolerance <= LARGEST_TOLERANCE:
            raise ValueError(f"its images' tolerance is {self.tolerance}, or there are too many")
        for image in self.images:
            if image.file not in self.parts or not 1 <= image.steps <= MOST_STEPS:
                raise ValueError(
                    f"its image '{image.file}' is not among its parts, or has no steps"
                )

    def _check_components(self) -> None:
        for name, size in self.components.items():
            if name not in WHAT or size < 0:
                raise ValueError(f"'{printable(name)}' is no component, or its size is negative")
            model = MANIFEST if self.engines else "model.fp32.onnx"
            if f"{COMPONENTS}/{name}/{model}" not in self.parts:
                raise ValueError(f"it has no {name}, {WHAT[name]}")


def is_whole(folder: Path) -> bool:
    """Whether the manifest in ``folder`` is of a whole pipeline."""
    values: Mapping[str, Any] = read_json_object(folder / MANIFEST, error=ArchiveError, hint=AGAIN)
    return values.get(WHOLE) is True
