"""What a metric that weighs bits by importance leaves behind, beside the losses made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpq_deploy.models.spec import Array


@dataclass(frozen=True)
class Importance:
    """The importance of L ``layers`` (in graph order) at K ``timesteps`` (in denoising order).

    ``theta`` float64 [K, L]; ``weights`` float64 [K] of sum 1, what each timestep counts for. ``orm`` float32
    [K, L, L], the orthogonality matrices; None for the controls, which have none. ``constant`` bool [K, L]: layers
    whose output was the same for all calls. ``activation_bits`` int64 [L]: what the layer's activations are fixed at,
    0 where there is no choice. ``calls``: the least N behind a Gram matrix; 0 for the controls.
    """

    layers: tuple[str, ...]
    timesteps: Array
    weights: Array
    theta: Array
    constant: Array
    activation_bits: Array
    calls: int = 0
    orm: Array | None = None

    @property
    def total(self) -> Array:
        """The importance c of each layer over all timesteps, float64 [L]."""
        return np.asarray(self.weights @ self.theta)

    def save(self, path: Path) -> None:
        """Write everything into one .npz (no pickle); names as JSON text."""
        arrays: dict[str, Array] = {
            "layers": np.array(json.dumps(self.layers)),
            "timesteps": np.asarray(self.timesteps, np.float32),
            "weights": self.weights,
            "theta": self.theta,
            "constant": self.constant,
            "activation_bits": self.activation_bits,
            "calls": np.array(self.calls),
        }
        if self.orm is not None:
            arrays["orm"] = np.asarray(self.orm, np.float32)
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Importance:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as data:
            return cls(
                tuple(json.loads(str(data["layers"]))),
                data["timesteps"],
                data["weights"],
                data["theta"],
                data["constant"],
                data["activation_bits"],
                int(data["calls"]),
                data.get("orm", None),
            )
