"""What was measured of a run's images, kept as metrics.json in the run folder: calls add up.

In: the rows of one call, and those of earlier ones. Out: ``ImageMetrics``, from where the reports
and the gate take it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mpq_deploy.errors import InputError
from mpq_deploy.evaluate.cache import arrays_digest, model_digest
from mpq_deploy.evaluate.decode import decoder_path
from mpq_deploy.evaluate.metrics.frechet import minimum_images
from mpq_deploy.evaluate.metrics.networks import digest_of
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.report.data import FrechetInfo, ScoreInfo
from mpq_deploy.system.files import read_sealed, sealed_json, write_text
from mpq_deploy.system.inputs import whole
from mpq_deploy.system.progress import Talk

FILE = "metrics.json"
# 2: says what the images were made from, so that calls can add to each other.
FORMAT = 2
OURS = "ours"
Row = TypeVar("Row", bound="FrechetInfo | ScoreInfo")


@dataclass(frozen=True)
class MadeFrom:
    """Digests of what images depend on; sampler, steps, seed and number stand in each row.

    ``ours``, ``float_model``: the graphs. ``conditions``: of ``conditions_digest``. ``controls``:
    of the stage; empty where there is none.
    """

    ours: str
    float_model: str
    conditions: str
    controls: str = ""

    def changed(self, earlier: MadeFrom) -> str:
        """Say what makes ``earlier`` images others than these; empty where nothing does. Controls are not looked at."""
        parts = (
            ("model", self.float_model, earlier.float_model),
            ("conditions, prompts or decoder", self.conditions, earlier.conditions),
            ("plan", self.ours, earlier.ours),
        )
        return next((name for name, now, then in parts if now != then), "")


def conditions_digest(spec: DenoiserSpec, conditions: Mapping[str, Array], folder: Path) -> str:
    """Return the digest of conditions, their prompts, and the decoder in ``folder``, if there is one."""
    decoder = decoder_path(spec, folder)
    return digest_of(
        arrays_digest(dict(conditions)),
        *spec.labels,
        "" if decoder is None else model_digest(decoder),
    )


@dataclass(frozen=True)
class ImageMetrics:
    """The distances of the plan's images (``frechet``), the controls', and the images' origin.

    ``scores``: LPIPS and CLIP scores, those of the plan and of the controls, where they were asked
    for.

    Seconds of sampling and of all, and whether every image was ``fresh`` (none cached), are not
    kept.
    """

    frechet: tuple[FrechetInfo, ...]
    controls: dict[str, tuple[FrechetInfo, ...]]
    made_from: MadeFrom
    scores: tuple[ScoreInfo, ...] = ()
    sampling_seconds: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    fresh: bool = field(default=False, compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of the plan's distances, in sentences."""
        return _notes(self.frechet)

    @property
    def count(self) -> int:
        """How many figures of the plan these are."""
        return len(self.frechet) + sum(row.variant == OURS for row in self.scores)

    def still_true(self, now: MadeFrom) -> tuple[ImageMetrics | None, str]:
        """Return what of these holds for images made from ``now`` (None: nothing); say what does not, if anything."""
        changed = now.changed(self.made_from)
        if changed:
            return None, f"{FILE} is of an earlier {changed}"
        own = tuple(row for row in self.scores if row.variant == OURS)
        if now.controls == self.made_from.controls or (not self.controls and own == self.scores):
            return self, ""
        return replace(self, controls={}, scores=own), f"{FILE} holds figures of earlier controls"

    def added_to(self, earlier: ImageMetrics) -> tuple[ImageMetrics, str]:
        """Return these with what still holds of ``earlier``, and what of it does not hold.

        A row takes the place of one of the same kind and variant. Rows are in an order of their
        own, so that the same measurements give the same file whatever call made which.
        """
        kept, said = earlier.still_true(self.made_from)
        kept = kept or replace(self, frechet=(), controls={}, scores=())
        names = dict.fromkeys((*self.controls, *kept.controls))
        merged = replace(
            self,
            frechet=_joined(self.frechet, kept.frechet),
            controls={
                name: _joined(self.controls.get(name, ()), kept.controls.get(name, ()))
                for name in names
            },
            scores=_joined(self.scores, kept.scores),
        )
        return merged, said

    def save(self, run: Path) -> None:
        """Write metrics.json into the run folder."""
        write_text(run / FILE, sealed_json({"format": FORMAT, **self.as_json()}))

    def as_json(self) -> dict[str, Any]:
        """Return plain values, without what a clock said."""
        return {
            "frechet": [one.model_dump(mode="json") for one in self.frechet],
            "controls": {
                name: [one.model_dump(mode="json") for one in rows]
                for name, rows in self.controls.items()
            },
            "made_from": vars(self.made_from),
            "notes": list(self.notes),
            "scores": [one.model_dump(mode="json") for one in self.scores],
        }

    @classmethod
    def load(cls, run: Path) -> ImageMetrics | None:
        """Read metrics.json; None where there is none. Raises InputError for a damaged one."""
        path = run / FILE
        if not path.is_file():
            return None
        text = read_sealed(path)
        if text.get("format") != FORMAT:
            raise InputError(f"{path} is not of format {FORMAT}.")
        missing = {"frechet", "controls", "made_from", "scores"} - set(text)
        if missing:
            raise InputError(f"{path} lacks {', '.join(sorted(missing))}.")
        with whole(path):
            return cls._of(text)

    @classmethod
    def _of(cls, text: dict[str, Any]) -> ImageMetrics:
        return cls(
            tuple(FrechetInfo(**row) for row in text["frechet"]),
            {
                name: tuple(FrechetInfo(**row) for row in rows)
                for name, rows in text["controls"].items()
            },
            MadeFrom(**text["made_from"]),
            tuple(ScoreInfo(**row) for row in text["scores"]),
        )


def read_kept(run: Path, talk: Talk, consequence: str) -> ImageMetrics | None:
    """Return what metrics.json of ``run`` holds; None where there is none, or a damaged one, of which it warns."""
    try:
        return ImageMetrics.load(run)
    except InputError as error:
        talk.warn(f"{run / FILE} cannot be read and {consequence}: {error.message}")
        return None


def _joined(new: Sequence[Row], earlier: Sequence[Row]) -> tuple[Row, ...]:
    """Return all rows in an order of their own; of two of one kind and variant the new one."""
    rows = {(row.variant, row.kind): row for row in (*earlier, *new)}
    return tuple(sorted(rows.values(), key=_place))


def _place(row: FrechetInfo | ScoreInfo) -> tuple[Any, ...]:
    """Where a row stands: distances to the float model's images before those to real ones, the plan first."""
    network = row.network if isinstance(row, FrechetInfo) else row.score
    return (
        network,
        row.samples,
        row.steps,
        row.sampler,
        row.seed,
        row.variant != OURS,
        row.variant,
        repr(row.kind),
    )


def _notes(rows: Sequence[FrechetInfo]) -> tuple[str, ...]:
    if not rows:
        return ()
    networks = dict.fromkeys((row.samples, row.network, row.network_features) for row in rows)
    sizes = ", ".join(
        f"{samples:,} images on the {width:,} features of {name}"
        for samples, name, width in networks
    )
    notes = [
        f"Frechet distances are too large with few images, most where these are few beside the features (here {sizes}):"
        " compare equal numbers alone."
    ]
    for name in dict.fromkeys(row.network for row in rows):
        real = [row for row in rows if (row.network, row.against) == (name, "real")]
        if not real:
            notes.append(f"{name}: no real images were given (--real), so none are compared with.")
        if any(row.samples // 2 < minimum_images(row.network_features) for row in real):
            minimum = 2 * minimum_images(real[0].network_features)
            notes.append(
                f"{name}: no extrapolation to infinitely many images, which takes {minimum:,}."
            )
    return tuple(notes)
