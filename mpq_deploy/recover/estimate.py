"""Estimate the memory of training before it starts, and refuse training that does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mpq_deploy.system.memory import Room, refuse_too_large

# Copies of the weights in float32: the graph's, the latent's start, and five that autograd holds
# (the adapter's product, codes, clipping mask, the quantized weight, its gradient). Our choice,
# measured.
FLOAT32_BYTES = 4
WEIGHT_COPIES = 7
# Copies of each adapter: itself, its gradient, AdamW's two moments, and the best state so far.
PARAMETER_COPIES = 5
# Autograd keeps less than this many times the values of a forward pass.
VALUE_COPIES = 2
# The interpreter and the libraries, without ONNX Runtime's copy of the float model.
FIXED_BYTES = 600 << 20
HINT = (
    "Lower recover.batch_size or recover.trajectories, set recover.rank (to 32, or lower), raise recover.segments, "
    "or use a machine with more memory."
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of training, by their use."""

    weights: int
    adapters: int
    values: int
    trajectories: int

    @property
    def total(self) -> int:
        """The sum of all, with the fixed bytes."""
        return self.weights + self.adapters + self.values + self.trajectories + FIXED_BYTES

    def refuse_too_large(self, room: Room | None, held: int = 0) -> None:
        """Raise UsageError when the total exceeds ``room``.

        ``held``: bytes that the process has already; they may include the fixed bytes.
        """
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

    ``value_bytes``: all values that the float model computes for one sample. With ``segments``
    above 1 autograd holds one segment's values at a time, and the values between segments (counted
    as one more segment). ``pool_bytes``: the trajectories; counted twice, because both the old and
    the new pool exist while a round is added.
    """
    weights = sum(rows * columns for rows, columns in shapes)
    adapters = (
        sum(min(rank, rows, columns) * (rows + columns) for rows, columns in shapes)
        if rank
        else weights
    )
    share = 1.0 if segments == 1 else min(1.0, 2.0 / segments)
    return MemoryEstimate(
        # One more copy: ONNX Runtime's, which computes the trajectories.
        weights=FLOAT32_BYTES * weights * (WEIGHT_COPIES + 1),
        adapters=FLOAT32_BYTES * adapters * PARAMETER_COPIES,
        values=int(VALUE_COPIES * value_bytes * batch_size * share),
        trajectories=2 * pool_bytes,
    )
