"""The result of measuring: predicted loss per layer and scheme, and the probe projections behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpq_deploy.denoisers.spec import Array


@dataclass(frozen=True)
class SensitivityTable:
    """Expected relative squared error of the denoiser's output, averaged over timesteps, per layer and scheme.

    ``losses``: layer name -> scheme name -> loss. ``projections``: layer -> scheme -> float32 [P] vectors of
    a_{l,s} (one entry per timestep, probe and sample, already divided by the output's norm of its timestep and by
    sqrt(P), so that the loss of a plan is ||sum_l a_{l,s_l}||^2, cross terms included); None for metrics without
    probes. ``heldout`` bool [P] marks entries of probes that the allocation does not see.
    ``losses_by_timestep``: layer -> scheme -> float32 [K].
    """

    metric: str
    timesteps: Array
    losses: dict[str, dict[str, float]]
    losses_by_timestep: dict[str, dict[str, Array]]
    projections: dict[str, dict[str, Array]] | None = None
    heldout: Array | None = None
    notes: tuple[str, ...] = field(default=())

    def plan_loss(self, schemes: dict[str, str]) -> float:
        """Predict the loss of a whole plan (layer -> scheme): with cross terms where there are projections."""
        if self.projections is None:
            return float(sum(self.losses[layer][scheme] for layer, scheme in schemes.items()))
        total = sum(self.projections[layer][scheme].astype(np.float64) for layer, scheme in schemes.items())
        return float(np.sum(np.square(total)))

    def save(self, folder: Path) -> None:
        """Write ``table.json`` and ``projections.npz`` into ``folder``."""
        layers = list(self.losses)
        pairs = [(layer, scheme) for layer in layers for scheme in self.losses[layer]]
        arrays: dict[str, Array] = {
            "by_timestep": np.stack([self.losses_by_timestep[a][s] for a, s in pairs]).astype(np.float32)
        }
        if self.projections is not None and self.heldout is not None:
            arrays["projections"] = np.stack([self.projections[a][s] for a, s in pairs]).astype(np.float32)
            arrays["heldout"] = self.heldout
        np.savez(folder / "projections.npz", **arrays)  # type: ignore[arg-type]
        text = {
            "metric": self.metric,
            "timesteps": [float(t) for t in self.timesteps],
            "losses": self.losses,
            "pairs": pairs,
            "notes": list(self.notes),
        }
        (folder / "table.json").write_text(json.dumps(text, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> SensitivityTable:
        """Read what ``save`` wrote."""
        text = json.loads((folder / "table.json").read_text())
        pairs = [tuple(pair) for pair in text["pairs"]]
        with np.load(folder / "projections.npz", allow_pickle=False) as data:
            by_timestep = _by_pair(pairs, data["by_timestep"])
            projections = _by_pair(pairs, data["projections"]) if "projections" in data else None
            heldout = data["heldout"] if "heldout" in data else None
        return cls(
            text["metric"],
            np.array(text["timesteps"], np.float32),
            text["losses"],
            by_timestep,
            projections,
            heldout,
            tuple(text["notes"]),
        )


def _by_pair(pairs: list[tuple[str, ...]], rows: Array) -> dict[str, dict[str, Array]]:
    nested: dict[str, dict[str, Array]] = {}
    for (layer, scheme), row in zip(pairs, rows, strict=True):
        nested.setdefault(layer, {})[scheme] = row
    return nested
