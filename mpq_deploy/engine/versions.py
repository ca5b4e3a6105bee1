"""Versions of TensorRT. Standard library only: this also runs on a device."""

from __future__ import annotations


def version_matches(version: str, wanted: str) -> bool:
    """Whether ``version`` matches the parts given in ``wanted``: 10.3.0 is 10.3, 10.30 is not."""
    parts = wanted.rstrip(".").split(".")
    return version.split(".")[: len(parts)] == parts
