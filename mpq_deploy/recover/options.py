"""What a user may choose about recovery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mpq_deploy.errors import UsageError, nearest

# Names of losses, and what each compares: see ``losses``.
LOSSES = ("output", "eps", "v", "sample", "relation", "memory")


@dataclass(frozen=True)
class RecoverOptions:
    """How the student is trained.

    ``steps`` updates on ``batch_size`` calls each, out of ``trajectories`` float trajectories that are recorded anew
    every ``round_steps``, and of those of earlier rounds, ``replay`` rounds in all; ``held_out`` others, never trained
    on, decide every ``check_every`` steps which state is best.
    ``losses``: name -> weight. ``timesteps``: "uniform", or "sensitivity" (see ``timesteps``).

    Learning rates of AdamW, each with a warm-up and a cosine to zero, for a plan whose NMSE is 1e-3 or more (below they
    follow the root of the measured one): ``adapter_rate`` in units of EfficientDM's, a layer's mean weight step / 2500;
    ``scale_rate`` of the logarithm of a scale; ``constant_rate`` in units of the constant's rms. A rate of 0 keeps that
    kind of parameter as it is.

    ``rank`` and ``margin``: see ``Adapter`` and ``Grid``; ``initialization`` of the adapters: see that module.
    ``segments`` of the graph are computed again in the backward pass. ``precision`` of training: "auto" is bfloat16 on
    a GPU that has it, else float32; errors are measured in float32. The rest are sizes of the losses of those names.
    """

    steps: int = 2050
    batch_size: int = 16
    trajectories: int = 80
    round_steps: int = 100
    replay: int = 6
    held_out: int = 32
    check_every: int = 200
    rank: int = 0
    margin: float = 0.0
    initialization: Literal["zero", "svd"] = "zero"
    losses: dict[str, float] = field(default_factory=lambda: {"output": 1.0})
    timesteps: Literal["uniform", "sensitivity"] = "sensitivity"
    adapter_rate: float = 45.0
    scale_rate: float = 1.5e-3
    constant_rate: float = 1.5e-3
    warmup: int = 10
    segments: int = 1
    relation_pixels: int = 256
    memory_size: int = 20_000
    memory_pixels: int = 128
    memory_anchors: int = 4096
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 4

    def __post_init__(self) -> None:
        for name in self.losses:
            if name not in LOSSES:
                raise UsageError(f"Unknown loss '{name}'.", f"{nearest(name, LOSSES)}Known: {', '.join(LOSSES)}.")
        if not any(weight > 0 for weight in self.losses.values()):
            raise UsageError(f"The losses are {self.losses}: none has a weight.", "Give at least one above 0.")
