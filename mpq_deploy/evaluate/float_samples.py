"""The float model's images and calls in pieces, each kept by what it depends on.

In: the key of what all images have in common, and what samples a stretch of them. Out: the pieces of
all images, whatever other number of them was sampled before: only those that are missing are run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpq_deploy.calls.recorded import CallSet, joined
from mpq_deploy.evaluate.cache import SampleCache
from mpq_deploy.models.spec import Array

# What decides which of the images and of their calls are compared, and changes none of them.
CHOICES = ("samples", "rows", "calls")
Pieces = list[dict[str, Array]]


def piece_keys(
    common: Mapping[str, Any], rows: Array, size: int
) -> list[tuple[range, dict[str, Any]]]:
    """Return the pieces of ``size`` images and the key of each."""
    base = {name: value for name, value in common.items() if name not in CHOICES}
    pieces = [range(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
    return [
        (
            p,
            {
                **base,
                "part": "float",
                "images": [p.start, p.stop],
                "rows": rows[p.start : p.stop].tolist(),
            },
        )
        for p in pieces
    ]


def float_pieces(
    common: Mapping[str, Any],
    rows: Array,
    size: int,
    store: SampleCache,
    sample: Callable[[range], dict[str, Array]],
) -> Pieces:
    """Return pieces of ``size`` images, which are computed together, in their order.

    ``rows`` int [N]: the condition of each image. ``sample`` returns ``images``, ``outputs`` [K, M,
    ...], ``sampler`` and the arrays of M calls, image by image, for a stretch of the images.
    """
    pieces, kept = piece_keys(common, rows, size), list[dict[str, Array]]()
    for _, key in pieces:
        known = store.find(key)
        if known is None:
            break
        kept.append(known)
    if len(kept) == len(pieces):
        return kept
    stretch = range(pieces[len(kept)][0].start, len(rows))
    made = sample(stretch)
    if made["outputs"].shape[1] % len(stretch):
        # Images of pipelines that differ in how often they call the model.
        return [*kept, made]
    left = pieces[len(kept) :]
    return [*kept, *(store.keep(key, _cut(made, stretch, piece)) for piece, key in left)]


def _cut(made: dict[str, Array], stretch: range, piece: range) -> dict[str, Array]:
    """Return what ``piece`` has of what the images ``stretch`` gave."""
    calls = CallSet.of_arrays(made)
    each, start = calls.count // len(stretch), piece.start - stretch.start
    taken = np.arange(each * start, each * (start + len(piece)))
    return {
        **calls.take(taken).arrays(),
        "images": made["images"][start : start + len(piece)],
        "outputs": made["outputs"][:, taken],
        "sampler": made["sampler"],
    }


def joined_pieces(pieces: Sequence[dict[str, Array]]) -> tuple[CallSet, Array]:
    """Return the calls of all pieces, and the outputs [K, M, ...]."""
    calls = joined([CallSet.of_arrays(piece) for piece in pieces])
    return calls, np.concatenate([piece["outputs"] for piece in pieces], 1)
