"""What an evaluation's parts share: which samples, of which conditions, and of what model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.errors import ModelError
from mpq_deploy.evaluate.decode import decoder_path
from mpq_deploy.evaluate.output_error import stride_midpoints, taken_turns
from mpq_deploy.models.spec import Array, DenoiserSpec, FloatModel
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.runtime.correction import Correction
from mpq_deploy.system.progress import Talk

# The image that each compared call is of.
OWNERS = "owners"


@dataclass(frozen=True)
class Setup:
    """What every variant has in common; ``pipeline``: the folder of the one that makes the images."""

    spec: DenoiserSpec
    conditions: dict[str, Array]
    settings: EvaluateSettings
    rows: Array
    decoder: Path | None
    talk: Talk
    pipeline: Path | None = None
    calls: Path | None = None

    def float_model(self, path: Path) -> FloatModel:
        """Return the float model in the file ``path``."""
        return FloatModel(path, self.spec, self.conditions, self.pipeline, self.calls)

    @classmethod
    def of(cls, model: FloatModel, settings: EvaluateSettings, talk: Talk) -> Setup:
        """Choose the samples' conditions; the decoder lies beside the model."""
        spec, first = model.spec, model.spec.calibration_rows or 0
        if spec.pipeline is not None:
            rows = spread_rows(len(spec.pipeline.calls), settings.samples)
            return cls(spec, {}, settings, rows, None, talk, model.pipeline)
        if spec.recorded:
            from mpq_deploy.evaluate.recorded_outputs import kept_calls

            rows = np.arange(kept_calls(model, settings.timesteps, settings.samples).count)
            return cls(spec, {}, settings, rows, None, talk, calls=model.calls)
        rows = first + spread_rows(
            condition_count(model.conditions) - first, settings.samples, spec.uncond_row
        )
        return cls(
            spec, model.conditions, settings, rows, decoder_path(spec, model.path.parent), talk
        )


@dataclass(frozen=True)
class Part:
    """A worker's task: the float model's samples, or a variant's and its error on float inputs.

    ``path`` is relative to the job's root; ``images`` None: all; ``calls``: those of each timestep.
    """

    name: str
    path: Path
    reference: dict[str, Array] | None = None
    correction: Correction | None = None
    images: range | None = None
    calls: range | None = None


def spread_rows(available: int, samples: int, uncond_row: int | None = None) -> Array:
    """Choose a condition for each sample, int64 [samples], spread evenly.

    The row for classifier-free guidance is left out where there are others; without conditions all
    rows are 0.
    """
    rows = np.array([row for row in range(available) if row != uncond_row] or [0], np.int64)
    if samples <= len(rows):
        return rows[stride_midpoints(len(rows), samples)]
    return rows[np.arange(samples) % len(rows)]


def condition_count(conditions: Mapping[str, Array]) -> int:
    """Return the number of rows, 0 without conditions. Raises ModelError where they differ."""
    counts = {name: len(values) for name, values in conditions.items()}
    if len(set(counts.values())) > 1:
        raise ModelError(
            f"The conditions differ in their number of rows: {counts}.", "Give each the same rows."
        )
    return next(iter(counts.values()), 0)


def in_turn(calls: CallSet, outputs: Array, count: int, images: Array) -> dict[str, Array]:
    """Return the calls whose turn it is at each timestep (``taken_turns``), and their outputs.

    ``images`` int [N]: the image that each call is of, which are returned as ``owners``.
    """
    turns = taken_turns(calls.count, len(calls.timesteps), count)
    taken = outputs[np.arange(len(turns))[:, None], turns]
    return {**calls.turns(turns).arrays(), "outputs": taken, OWNERS: images[turns]}


def joined_parts(first: dict[str, Array], further: dict[str, Array]) -> dict[str, Array]:
    """Return a control's images and errors with those of its next group; errors by the energy of their calls."""
    energy, calls = first["energy"] + further["energy"], first["calls"] + further["calls"]
    each = [p["nmse_each"] * (p["energy"] / max(p["calls"], 1))[:, None] for p in (first, further)]
    squares = sum(part["nmse"] * part["energy"] for part in (first, further))
    return {
        "images": np.concatenate([first["images"], further["images"]]),
        "nmse": squares / energy,
        "nmse_each": np.concatenate(each, 1) * (calls / energy)[:, None],
        "energy": energy,
        "calls": calls,
    }


def finite_output(output: Array, name: str, timestep: float) -> Array:
    """Return a variant's output. Raises ModelError where it is not finite."""
    if not np.isfinite(output).all():
        raise ModelError(
            f"The output of '{name}' is not finite at timestep {timestep:g}.",
            "Check the model's weights and activations for values beyond the range of FP16; protect the "
            "layers concerned in the recipe.",
        )
    return output
