"""The result of measuring: predicted loss per layer and scheme, and the probe projections behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.importance import Importance

IMPORTANCE = "orm.npz"
# Metrics whose losses are expected relative squared errors of the denoiser's output. The others only rank.
PREDICTING = ("probe", "gain", "exhaustive")


@dataclass(frozen=True)
class SensitivityTable:
    """Expected relative squared error of the denoiser's output, averaged over timesteps, per layer and scheme.

    ``losses``: layer name -> scheme name -> loss. ``projections``: layer -> scheme -> float32 [P] vectors of
    a_{l,s} (one entry per timestep, probe and sample, already divided by the output's norm of its timestep and by
    sqrt(P), so that the loss of a plan is ||sum_l a_{l,s_l}||^2, cross terms included); None for metrics without
    probes. ``calls`` int [P] numbers the calibration call behind each entry (``Calls.turns``; -1: an entry
    that was taken out, and is 0), None where that is not known.
    ``losses_by_timestep``: layer -> scheme -> float32 [K]; their mean is the loss, so timesteps that stand for more of
    the trajectory than others (see ``weighted``) have that factor in them. A metric that is not in ``PREDICTING`` ranks
    layers by a loss of its own unit; ``importance`` is what orm and its controls make theirs of, and such a table lacks
    the schemes that their activation bits rule out.
    """

    metric: str
    timesteps: Array
    losses: dict[str, dict[str, float]]
    losses_by_timestep: dict[str, dict[str, Array]]
    projections: dict[str, dict[str, Array]] | None = None
    notes: tuple[str, ...] = field(default=())
    importance: Importance | None = None
    calls: Array | None = None

    @property
    def predicts_nmse(self) -> bool:
        """Whether a plan's loss is a prediction of the error that evaluation measures."""
        return self.metric in PREDICTING

    def weighted(self, shares: Array) -> SensitivityTable:
        """Return the table with timestep k counting for ``shares[k]`` [K] of the mean, where 1 / K was its share."""
        factor = np.asarray(shares, np.float64) / np.sum(shares) * len(self.timesteps)
        rows = {
            layer: {scheme: values * factor for scheme, values in by_scheme.items()}
            for layer, by_scheme in self.losses_by_timestep.items()
        }
        made = table_from_losses(self.metric, self.timesteps, rows, self.notes)
        if self.projections is None:
            return replace(made, importance=self.importance)
        # Entries are ordered by timestep first; a loss is a sum of their squares.
        size = len(next(iter(next(iter(self.projections.values())).values()), ())) // len(factor)
        roots = np.repeat(np.sqrt(factor), size).astype(np.float32)
        vectors = {
            layer: {scheme: vector * roots for scheme, vector in by_scheme.items()}
            for layer, by_scheme in self.projections.items()
        }
        return replace(made, projections=vectors, calls=self.calls)

    def plan_loss(self, schemes: dict[str, str]) -> float:
        """Predict the loss of a whole plan (layer -> scheme): with cross terms where there are projections."""
        if self.projections is None:
            return float(sum(self.losses[layer][scheme] for layer, scheme in schemes.items()))
        total = sum(self.projections[layer][scheme].astype(np.float64) for layer, scheme in schemes.items())
        return float(np.sum(np.square(total)))

    def folds(self, count: int) -> list[tuple[SensitivityTable, SensitivityTable]]:
        """Split the calls into ``count`` parts; for each, return the table without it and the table of it alone.

        Both hold all entries, those of other calls as zeros. Empty where a part would miss a timestep.
        """
        if self.projections is None or self.calls is None:
            return []
        parts = [self.calls % count == number for number in range(count)]
        steps = len(self.timesteps)
        if any(not part.reshape(steps, -1).any(axis=1).all() for part in parts) or count < 2:
            return []
        return [(self._of_calls(~part), self._of_calls(part)) for part in parts]

    def _of_calls(self, kept: Array) -> SensitivityTable:
        by_step = kept.reshape(len(self.timesteps), -1)
        factor = np.sqrt(by_step.shape[1] / by_step.sum(axis=1, keepdims=True)) * by_step
        roots = factor.reshape(-1).astype(np.float32)
        assert self.projections is not None and self.calls is not None
        vectors = {
            layer: {scheme: vector * roots for scheme, vector in by_scheme.items()}
            for layer, by_scheme in self.projections.items()
        }
        part = _from_vectors(self.metric, self.timesteps, vectors, self.notes)
        return replace(part, calls=np.where(kept, self.calls, -1).astype(np.int32))

    def save(self, folder: Path) -> None:
        """Write ``table.json`` and ``projections.npz`` into ``folder``."""
        layers = list(self.losses)
        pairs = [(layer, scheme) for layer in layers for scheme in self.losses[layer]]
        arrays: dict[str, Array] = {
            "by_timestep": np.stack([self.losses_by_timestep[a][s] for a, s in pairs]).astype(np.float32)
        }
        if self.projections is not None:
            arrays["projections"] = np.stack([self.projections[a][s] for a, s in pairs]).astype(np.float32)
        if self.calls is not None:
            arrays["calls"] = self.calls
        np.savez(folder / "projections.npz", **arrays)  # type: ignore[arg-type]
        if self.importance is not None:
            self.importance.save(folder / IMPORTANCE)
        text = {
            "metric": self.metric,
            "timesteps": [float(t) for t in self.timesteps],
            "losses": self.losses,
            "pairs": pairs,
            "notes": list(self.notes),
        }
        (folder / "table.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SensitivityTable:
        """Read what ``save`` wrote."""
        text = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        pairs = [tuple(pair) for pair in text["pairs"]]
        with np.load(folder / "projections.npz", allow_pickle=False) as data:
            by_timestep = _by_pair(pairs, data["by_timestep"])
            projections = _by_pair(pairs, data["projections"]) if "projections" in data else None
            calls = data.get("calls", None)
        stored = folder / IMPORTANCE
        return cls(
            text["metric"],
            np.array(text["timesteps"], np.float32),
            text["losses"],
            by_timestep,
            projections,
            tuple(text["notes"]),
            Importance.load(stored) if stored.exists() else None,
            calls,
        )


def table_from_projections(
    timesteps: Array,
    values: dict[str, dict[str, Array]],
    notes: tuple[str, ...] = (),
    calls: Array | None = None,
) -> SensitivityTable:
    """Make a table from layer -> scheme -> projections float32 [K, probes, N], divided by the output's rms norm.

    ``losses`` are means over all probes. ``calls`` int [K, N]: the call behind each.
    """
    shape = next(iter(next(iter(values.values())).values())).shape if values else (len(timesteps), 1, 1)
    factor = np.float32(1 / np.sqrt(np.prod(shape)))
    vectors = {
        layer: {scheme: a.reshape(-1).astype(np.float32) * factor for scheme, a in by_scheme.items()}
        for layer, by_scheme in values.items()
    }
    made = _from_vectors("probe", timesteps, vectors, notes)
    if calls is None:
        return made
    return replace(made, calls=np.broadcast_to(calls[:, None], shape).reshape(-1).astype(np.int32))


def table_from_losses(
    metric: str, timesteps: Array, by_timestep: dict[str, dict[str, Array]], notes: tuple[str, ...] = ()
) -> SensitivityTable:
    """Make a table without projections from layer -> scheme -> loss at each timestep [K]."""
    losses = {
        layer: {scheme: float(np.mean(values, dtype=np.float64)) for scheme, values in by_scheme.items()}
        for layer, by_scheme in by_timestep.items()
    }
    rows = {
        layer: {s: np.asarray(v, np.float32) for s, v in by_scheme.items()} for layer, by_scheme in by_timestep.items()
    }
    return SensitivityTable(metric, np.asarray(timesteps, np.float32), losses, rows, notes=notes)


def _from_vectors(
    metric: str, timesteps: Array, vectors: dict[str, dict[str, Array]], notes: tuple[str, ...]
) -> SensitivityTable:
    """Make a table from projection vectors [P], whose entries are ordered by timestep first."""
    steps = len(timesteps)
    by_timestep = {
        layer: {
            scheme: np.square(vector, dtype=np.float64).reshape(steps, -1).sum(1) * steps
            for scheme, vector in by_scheme.items()
        }
        for layer, by_scheme in vectors.items()
    }
    return replace(table_from_losses(metric, timesteps, by_timestep, notes), projections=vectors)


def _by_pair(pairs: list[tuple[str, ...]], rows: Array) -> dict[str, dict[str, Array]]:
    nested: dict[str, dict[str, Array]] = {}
    for (layer, scheme), row in zip(pairs, rows, strict=True):
        nested.setdefault(layer, {})[scheme] = row
    return nested
