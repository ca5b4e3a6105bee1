"""The result of measuring: a loss per layer and scheme, and the projections that it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.methods import METHODS
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.inputs import read_json_object, whole
from mpq_deploy.system.validated import model_of

IMPORTANCE = "orm.npz"
# The share of a trajectory's loss that is what its steps' errors do to the image together; the rest
# is the sum of what each does alone, which fewer trajectories tell (our choice).
COHERENT = 0.5
# Largest table.json read: ten times the size of 1,000 layers with 100 schemes (our choice).
TABLE_BYTES = 128 << 20
T = TypeVar("T")
# Layer -> scheme -> values.
Nested = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class Importance:
    """The importance of L ``layers`` (in graph order) at K ``timesteps`` (in denoising order).

    ``theta`` float64 [K, L]: importances. ``weights`` float64 [K] of sum 1: the timesteps' weights.
    ``constant`` bool [K, L]: the layer's output was the same for all calls. ``activation_bits``
    int64 [L]: the fixed bits of the layer's activations, 0 where there is no choice. For the metric
    orm alone (else None and 0): ``orm`` float32 [K, L, L], the orthogonality matrices, and
    ``calls``, the smallest batch of which a Gram matrix was made.
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
        """Write all fields into one .npz without pickle; layer names are stored as JSON text."""
        arrays = {item.name: np.asarray(getattr(self, item.name)) for item in fields(self)}
        arrays["layers"] = np.array(json.dumps(self.layers))
        arrays["timesteps"] = np.asarray(self.timesteps, np.float32)
        del arrays["orm"]
        if self.orm is not None:
            arrays["orm"] = np.asarray(self.orm, np.float32)
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Importance:
        """Read what ``save`` wrote."""
        values: dict[str, Any] = dict(read_arrays(path))
        with whole(path):
            values["layers"] = tuple(json.loads(str(values["layers"])))
            return cls(**{**values, "calls": int(values["calls"])})


@dataclass(frozen=True)
class SensitivityTable:
    """The loss of each scheme of each layer; its unit depends on ``metric`` (see ``METHODS``).

    ``losses``: layer -> scheme -> loss, the mean over K of ``losses_by_timestep``, float32 [K].
    Where timesteps stand for different parts of the trajectory (``weighted``), the losses by
    timestep include that weight.

    ``projections``: layer -> scheme -> float32 [P], vectors a_{l,s} with one entry per timestep,
    probe and sample. Entries are divided by the output's norm at their timestep and by sqrt(P), so
    that the loss of a plan is ||sum_l a_{l,s_l}||^2, cross terms included. None without probes.
    ``calls`` int [P]: the place in ``Calls.turns`` of the call behind each entry; -1 for entries
    that ``folds`` set to 0; None where unknown.

    ``partial``: layer -> scheme -> float32 [P]: for each projection the sum of the squares of its
    partial inner products (``torch_projection``), in the same unit. None where it is not measured.
    ``measured``: the table as it was measured, where this one is ``steadied`` (see there).

    ``mean_square``: mean square of final images with peak 1, where losses are relative to it; None
    for other metrics or where unknown. ``image_probes``: of trajectories, how many of each call's
    entries are the coherent sums over steps that final images are predicted by, a half of the loss;
    the others are the steps apart. 0: all entries. ``importance``: for metrics that weigh bits; their tables
    lack the schemes that the fixed activation bits rule out.
    """

    metric: str
    timesteps: Array
    losses: dict[str, dict[str, float]]
    losses_by_timestep: Nested
    projections: Nested | None = None
    notes: tuple[str, ...] = field(default=())
    importance: Importance | None = None
    calls: Array | None = None
    mean_square: float | None = None
    image_probes: int = 0
    partial: Nested | None = None
    measured: SensitivityTable | None = None

    @property
    def predicts(self) -> bool:
        """Whether a plan's loss predicts an error, of the denoiser's outputs or of final images."""
        return self.metric in METHODS and METHODS[self.metric].predicts

    @property
    def of_images(self) -> bool:
        """Whether losses are errors of final images; projections then have [probe, trajectory]."""
        return self.metric in METHODS and METHODS[self.metric].images

    @property
    def predicts_nmse(self) -> bool:
        """Whether a plan's loss predicts the NMSE of the output that evaluation measures."""
        return self.predicts and not self.of_images

    def weighted(self, shares: Array) -> SensitivityTable:
        """Return the table with timestep k weighted by ``shares[k]`` [K] instead of 1 / K."""
        factor = np.asarray(shares, np.float64) / np.sum(shares) * len(self.timesteps)
        rows = _each(self.losses_by_timestep, lambda values: values * factor)
        table = table_from_losses(self.metric, self.timesteps, rows, self.notes)
        if self.projections is None:
            return replace(table, importance=self.importance)
        # Entries are ordered by timestep first; a loss is a sum of their squares.
        size = len(next(iter(next(iter(self.projections.values())).values()), ())) // len(factor)
        roots = np.repeat(np.sqrt(factor), size).astype(np.float32)
        vectors = _each(self.projections, lambda vector: vector * roots)
        partial = self._partial_times(np.square(roots))
        return replace(table, projections=vectors, calls=self.calls, partial=partial)

    def _partial_times(self, factors: Array) -> Nested | None:
        return self.partial and _each(self.partial, lambda squares: squares * factors)

    def plan_loss(self, schemes: Mapping[str, str], rho: float = 1.0) -> float:
        """Return the loss of a plan (layer -> scheme); with projections, cross terms included.

        ``rho``: the share of the cross terms that counts.
        """
        if self.projections is None:
            return float(sum(self.losses[layer][scheme] for layer, scheme in schemes.items()))
        return float(np.sum(self.plan_entries(schemes, rho)))

    def plan_entries(self, schemes: Mapping[str, str], rho: float = 1.0) -> Array:
        """Return the contribution of each projection entry to a plan's loss, float64 [P].

        Of a ``steadied`` table the layers' own terms are spread over the entries as their parts are.
        """
        assert self.projections is not None
        rows = [self.projections[n][s].astype(np.float64) for n, s in schemes.items()]
        whole = np.square(np.sum(rows, axis=0))
        if self.measured is None and rho == 1.0:
            return np.asarray(whole)
        alone = np.sum(np.square(rows), axis=0)
        own = alone
        if self.measured is not None and self.partial is not None:
            own = np.zeros_like(alone)
            for name, scheme in schemes.items():
                parts = self.partial[name][scheme].astype(np.float64)
                if (total := parts.sum()) > 0:
                    own += self.losses[name][scheme] / total * parts
        return np.asarray(own + rho * (whole - alone))

    def errors_by_call(self, entries: Array) -> Array:
        """Split a plan's ``entries`` [P] by call, float64 [N]: the mean of N is the plan's loss."""
        assert self.calls is not None
        order = np.argsort(self.calls, kind="stable")
        count = len(np.unique(self.calls))
        return np.asarray(entries[order].reshape(count, -1).sum(axis=1) * count)

    def image_errors(self, entries: Array) -> Array:
        """Return the squared error of each trajectory's image for a plan's ``entries`` [P], float64 [N]."""
        if not self.image_probes:
            return self.errors_by_call(entries)
        assert self.calls is not None
        count = len(np.unique(self.calls))
        rows = entries.reshape(-1, count)[: self.image_probes].sum(axis=0)
        return np.asarray(rows * (count / COHERENT))

    def image_losses(self) -> dict[str, dict[str, float]]:
        """Return the expected squared error of the images for each scheme alone."""
        if self.projections is None or not self.image_probes:
            return self.losses
        return _each(
            self.projections,
            lambda vector: float(self.image_errors(np.square(vector, dtype=np.float64)).mean()),
        )

    def weighing(self, weights: Array) -> SensitivityTable:
        """Return the table in which call n counts ``weights[n]`` times, float64 [N]."""
        assert self.projections is not None and self.calls is not None
        roots = np.sqrt(weights[self.calls]).astype(np.float32)
        vectors = _each(self.projections, lambda vector: vector * roots)
        table = _from_vectors(self.metric, self.timesteps, vectors, self.notes)
        return replace(table, calls=self.calls, **self._of_images())

    def _of_images(self) -> dict[str, Any]:
        return {"mean_square": self.mean_square, "image_probes": self.image_probes}

    def folds(self, count: int) -> list[tuple[SensitivityTable, SensitivityTable]]:
        """Split the calls into ``count`` folds; return (table without the fold, table of the fold).

        Both tables hold all entries, with zeros for calls that are left out. Empty where a fold
        would have no call at some timestep, or without projections by call.
        """
        if self.projections is None or self.calls is None:
            return []
        parts = [self.calls % count == number for number in range(count)]
        steps = len(self.timesteps)
        if any(not part.reshape(steps, -1).any(axis=1).all() for part in parts) or count < 2:
            return []
        return [(self._of_calls(~part), self._of_calls(part)) for part in parts]

    def halves(self) -> list[tuple[SensitivityTable, SensitivityTable]]:
        """Split the timesteps in two, alternately; return (table of one half, of the other) both ways.

        All tables hold all entries, with zeros for the other half. Empty for a single timestep or
        without projections by call.
        """
        if self.projections is None or self.calls is None or len(self.timesteps) < 2:
            return []
        size = len(self.calls) // len(self.timesteps)
        first = np.repeat(np.arange(len(self.timesteps)) % 2 == 0, size)
        one, other = (
            self._of_entries(first, first.mean()),
            self._of_entries(~first, (~first).mean()),
        )
        return [(one, other), (other, one)]

    def _of_calls(self, part: Array) -> SensitivityTable:
        by_step = part.reshape(len(self.timesteps), -1)
        return self._of_entries(part, by_step.mean(axis=1).repeat(by_step.shape[1]))

    def _of_entries(self, part: Array, share: Array | float) -> SensitivityTable:
        """Return the table with zeros but for the entries ``part`` [P], which count 1 / ``share`` times."""
        roots = (np.sqrt(1 / np.asarray(share, np.float64)) * part).astype(np.float32)
        assert self.projections is not None and self.calls is not None
        vectors = _each(self.projections, lambda vector: vector * roots)
        table = _from_vectors(self.metric, self.timesteps, vectors, self.notes)
        calls = np.where(part, self.calls, -1).astype(np.int32)
        partial = self._partial_times(np.square(roots))
        return replace(table, calls=calls, partial=partial, **self._of_images())

    def save(self, folder: Path) -> None:
        """Write ``table.json`` and ``projections.npz`` into ``folder``."""
        pairs = [(layer, scheme) for layer, row in self.losses.items() for scheme in row]

        def stacked(values: Nested) -> Array:
            return np.stack([values[layer][scheme] for layer, scheme in pairs]).astype(np.float32)

        arrays: dict[str, Array] = {"by_timestep": stacked(self.losses_by_timestep)}
        if self.projections is not None:
            arrays["projections"] = stacked(self.projections)
        if self.partial is not None:
            arrays["partial"] = stacked(self.partial)
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
            "mean_square": self.mean_square,
            "image_probes": self.image_probes,
        }
        (folder / "table.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SensitivityTable:
        """Read what ``save`` wrote."""
        file = folder / "table.json"
        text = read_json_object(file, limit=TABLE_BYTES, infinite=True)
        data = read_arrays(folder / "projections.npz")
        stored = folder / IMPORTANCE
        with whole(file):
            pairs = text["pairs"]
            return cls(
                text["metric"],
                np.array(text["timesteps"], np.float32),
                model_of(dict[str, dict[str, float]], text["losses"], f"{file}: losses"),
                _by_pair(pairs, data["by_timestep"]),
                _by_pair(pairs, data["projections"]) if "projections" in data else None,
                tuple(text["notes"]),
                Importance.load(stored) if stored.exists() else None,
                data.get("calls"),
                text.get("mean_square"),
                int(text.get("image_probes", 0)),
                _by_pair(pairs, data["partial"]) if "partial" in data else None,
            )


def table_from_projections(
    timesteps: Array,
    values: Nested,
    notes: tuple[str, ...] = (),
    calls: Array | None = None,
    partial: Nested | None = None,
) -> SensitivityTable:
    """Make a table from projections float32 [K, probes, N] that are divided by the output's norm.

    ``calls`` int [K, N]: the call (``Calls.turns``) of each column. ``partial``: the sums of the
    squares of their parts, in the same shape, divided by the norm's square.
    """
    shape = (
        next(iter(next(iter(values.values())).values())).shape if values else (len(timesteps), 1, 1)
    )
    factor = np.float32(1 / np.sqrt(np.prod(shape)))
    vectors = _each(values, lambda a: a.reshape(-1).astype(np.float32) * factor)
    table = _from_vectors("probe", timesteps, vectors, notes)
    if partial is not None:
        table = replace(
            table, partial=_each(partial, lambda a: a.reshape(-1).astype(np.float32) * factor**2)
        )
    if calls is None:
        return table
    return replace(table, calls=np.broadcast_to(calls[:, None], shape).reshape(-1).astype(np.int32))


def table_from_losses(
    metric: str, timesteps: Array, by_timestep: Nested, notes: tuple[str, ...] = ()
) -> SensitivityTable:
    """Make a table without projections from the losses at each timestep [K]."""
    losses = _each(by_timestep, lambda values: float(np.mean(values, dtype=np.float64)))
    rows = _each(by_timestep, lambda values: np.asarray(values, np.float32))
    return SensitivityTable(metric, np.asarray(timesteps, np.float32), losses, rows, notes=notes)


def _from_vectors(
    metric: str, timesteps: Array, vectors: Nested, notes: tuple[str, ...]
) -> SensitivityTable:
    """Make a table from projection vectors [P], whose entries are ordered by timestep first."""
    steps = len(timesteps)

    def losses(vector: Array) -> Array:
        squares = np.square(vector, dtype=np.float64).reshape(steps, -1)
        return np.asarray(squares.sum(1) * steps)

    return replace(
        table_from_losses(metric, timesteps, _each(vectors, losses), notes), projections=vectors
    )


def _each(
    values: Mapping[str, Mapping[str, Array]], change: Callable[[Array], T]
) -> dict[str, dict[str, T]]:
    return {
        layer: {scheme: change(value) for scheme, value in row.items()}
        for layer, row in values.items()
    }


def _by_pair(pairs: list[list[str]], rows: Array) -> Nested:
    nested: Nested = {}
    for (layer, scheme), row in zip(pairs, rows, strict=True):
        nested.setdefault(layer, {})[scheme] = row
    return nested
