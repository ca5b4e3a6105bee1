"""Versions of TensorRT, as numbers with points. Standard library only: this also runs on a device."""

from __future__ import annotations


def version_matches(version: str, wanted: str) -> bool:
    """Tell whether ``version`` is ``wanted`` as far as that is given: 10.3.0 is 10.3, and 10.30 is not."""
    parts = wanted.rstrip(".").split(".")
    return version.split(".")[: len(parts)] == parts
