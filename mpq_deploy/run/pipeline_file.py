"""pipeline.json: the joint view of a run of a whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mpq_deploy.errors import RunFolderError
from mpq_deploy.recipe import placed
from mpq_deploy.run.folder import COMPONENTS, PIPELINE
from mpq_deploy.system.files import canonical_json, write_text
from mpq_deploy.system.validated import read_model


class PartFigures(BaseModel):
    """One part. Errors of images are relative and squared; None: not known, or not yet.

    ``predicted_nmse`` and ``measured_nmse``: of the part's own output, as its own run has them.
    ``gain``: the images' error over the part's own (``quadratic``: two sizes of noise agree);
    ``rows``: samples that the part computes per image; ``latency_ms``: of one call, ``image_ms``
    of all calls of an image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Literal["quantized", "pinned"]
    fp16_size_bytes: int | None = None
    size_bytes: int | None = None
    gain: float | None = None
    quadratic: bool | None = None
    rows: float | None = None
    predicted_nmse: float | None = None
    measured_nmse: float | None = None
    predicted_image_error: float | None = None
    measured_image_error: float | None = None
    latency_ms: float | None = None
    image_ms: float | None = None


class WholeDevice(BaseModel):
    """What a device measured of the whole; ``image_ms``: of all calls of an image, where all were timed.

    By part: bytes of its engine, whether its outputs agree, the median of a call. ``verified`` None:
    no engines. ``image_error``: the largest of the reference images, ``not_made``: why there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    device: str
    engine_bytes: dict[str, int]
    verified: bool | None
    outputs_agree: dict[str, bool | None]
    median_ms: dict[str, float]
    image_ms: float | None
    images_agree: bool | None
    image_error: float | None
    tolerance: float
    not_made: str


class PipelineFile(BaseModel):
    """A run of a whole pipeline: its source, its ``recipe`` as it was given, its parts and the whole.

    ``directory``: where the recipe's relative paths start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    class_name: str
    source: str
    denoiser: str
    recipe: dict[str, Any]
    directory: str = ""
    parts: dict[str, PartFigures]
    budget_bytes: int | None = None
    fp16_size_bytes: int | None = None
    size_bytes: int | None = None
    weights: int | None = None
    predicted_image_error: float | None = None
    measured_image_error: float | None = None
    psnr_db: float | None = None
    images: int | None = None
    image_ms: float | None = None
    notes: tuple[str, ...] = ()
    devices: tuple[WholeDevice, ...] = ()

    def given(self) -> dict[str, Any]:
        """Return the recipe's values, with paths that lead there from here."""
        return placed(self.recipe, Path(self.directory)) if self.directory else self.recipe

    def save(self, run: Path) -> None:
        """Write the file into a run folder."""
        write_text(run / PIPELINE, canonical_json(self.model_dump(mode="json")))

    @classmethod
    def load(cls, run: Path) -> PipelineFile:
        """Read what ``save`` wrote. Raises RunFolderError for anything else."""
        return read_model(
            cls, run / PIPELINE, error=RunFolderError, hint="Give a new run folder with -o."
        )


def denoiser_run(run: Path) -> Path:
    """Return the denoiser's run of a whole pipeline's; any other path as it is."""
    whole = (run / PIPELINE).is_file()
    return run / COMPONENTS / PipelineFile.load(run).denoiser if whole else run
