"""Which errors stand beside each other in charts: the output's, or the final images'.

A plan that was chosen by final images is predicted and compared in these: the error is the mean
squared error of pixels with peak 1 that the images' mean PSNR stands for. Any other is predicted
and compared in the relative squared error of the denoiser's output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log10
from typing import Any

from mpq_deploy.report.words import decibels, error


def squared_error(psnr_db: float | None) -> float | None:
    """Return the mean squared error, with peak 1, of a PSNR in dB."""
    return None if psnr_db is None else float(10 ** (-psnr_db / 10))


@dataclass(frozen=True)
class ShownErrors:
    """Errors of the final images, or of the output."""

    of_images: bool

    @classmethod
    def of(cls, psnrs_db: Iterable[float | None]) -> ShownErrors:
        """Return those of images where plans have predicted PSNRs."""
        return cls(any(psnr is not None for psnr in psnrs_db))

    @property
    def name(self) -> str:
        """What a plan is predicted to have."""
        return "Predicted PSNR" if self.of_images else "Predicted error"

    @property
    def axis(self) -> str:
        """What an axis shows."""
        if self.of_images:
            return "mean squared error of the final images"
        return "relative squared error of the output"

    def predicted(self, nmse: float | None, psnr_db: float | None) -> float | None:
        """Return the predicted error of a plan with these predictions."""
        return squared_error(psnr_db) if self.of_images else nmse

    def measured(self, found: Any) -> float | None:
        """Return the measured error of what has ``measured_nmse`` and ``psnr_db``, a mapping or not."""
        name = "psnr_db" if self.of_images else "measured_nmse"
        value = found.get(name) if isinstance(found, dict) else getattr(found, name)
        return squared_error(value) if self.of_images else value

    def text(self, value: float) -> str:
        """Return an error as it is written: of images as their PSNR."""
        return decibels(psnr_of_error(value)) if self.of_images else error(value)


def psnr_of_error(value: float) -> float | None:
    """Return the PSNR in dB of a mean squared error with peak 1; None of identical images."""
    return -10 * log10(value) if value > 0 else None
