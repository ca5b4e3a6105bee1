"""The hub's cache: ``models--ORG--NAME/snapshots/REVISION/FILE`` is a link into ``blobs/`` beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mpq_deploy.errors import ModelError

PREFIX, SNAPSHOTS, BLOBS = "models--", "snapshots", "blobs"


def cache_root(path: Path) -> Path | None:
    """Return the folder ``models--ORG--NAME`` whose snapshots ``path`` lies in; None: in none."""
    shown = path.absolute()
    for root in shown.parents:
        if root.name.startswith(PREFIX) and shown.relative_to(root).parts[0] == SNAPSHOTS:
            return root
    return None


def hub_blobs(path: Path) -> Path | None:
    """Return the folder of files of the cache that the link ``path`` leads to; None: to none of it."""
    root = cache_root(path)
    if root is None:
        return None
    blobs = (root / BLOBS).resolve()
    inside = blobs.parent == root.resolve() and path.resolve().parent == blobs
    return blobs if inside else None


def refuse_links_out(files: Iterable[Path]) -> None:
    """Raise ModelError for a file of a cache that is a link out of the model's own folder there."""
    for file in files:
        root = cache_root(file)
        if root is not None and not file.resolve().is_relative_to(root.resolve()):
            raise ModelError(
                f"{file} is in a hub cache, and links to a file outside of {root.name}.",
                "The cache was altered: remove this model from it and download it again.",
            )
