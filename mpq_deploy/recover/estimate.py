"""What training will need of memory, before it starts, and whether the machine has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mpq_deploy.system.memory import Room, refuse_too_large

# Of the float32 size of the weights: the graph's own, the latent's start, and what autograd holds
# of the way to a weight (the adapter's product, codes, the mask of the clipping, the weight and its
# gradient). Our choice, measured.
FLOAT32_BYTES = 4
WEIGHT_COPIES = 7
# An adapter, its gradient, AdamW's two moments, and the best state so far.
PARAMETER_COPIES = 5
# Autograd keeps less than twice the values that a pass computes.
VALUE_COPIES = 2
# The interpreter, torch, ONNX Runtime's copy of the float model aside.
FIXED_BYTES = 600 << 20
HINT = (
    "Lower recover.batch_size or recover.trajectories, set recover.rank (to 32, or lower), raise recover.segments, "
    "or use a machine with more memory."
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they hold."""

    weights: int
    adapters: int
    values: int
    trajectories: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.values + self.trajectories + FIXED_BYTES

    def refuse_too_large(self, room: Room | None, held: int = 0) -> None:
        """Raise UsageError when this exceeds the ``room``; ``held`` may include the fixed bytes."""
        refuse_too_large(
            "Recovery", {**asdict(self), "code": FIXED_BYTES}, room, HINT, min(held, FIXED_BYTES)
        )


def estimate_memory(
    shapes: Sequence[tuple[int, int]],
    rank: int,
    value_bytes: int,
    batch_size: int,
    segments: int,
    pool_bytes: int = 0,
) -> MemoryEstimate:
    """Estimate the bytes of training weights of ``shapes`` (O, K) with adapters of ``rank``.

    ``value_bytes``: of all values that the float model computes for one sample. With ``segments``
    above 1 only one stretch of them is held at a time, and what passes between stretches (taken as
    a stretch's share again). ``pool_bytes``: of the trajectories that are drawn from; while a round
    joins them they are there twice.
    """
    weights = sum(rows * columns for rows, columns in shapes)
    adapters = (
        sum(min(rank, rows, columns) * (rows + columns) for rows, columns in shapes)
        if rank
        else weights
    )
    share = 1.0 if segments == 1 else min(1.0, 2.0 / segments)
    return MemoryEstimate(
        # One copy more: ONNX Runtime's, for the trajectories.
        weights=FLOAT32_BYTES * weights * (WEIGHT_COPIES + 1),
        adapters=FLOAT32_BYTES * adapters * PARAMETER_COPIES,
        values=int(VALUE_COPIES * value_bytes * batch_size * share),
        trajectories=2 * pool_bytes,
    )
