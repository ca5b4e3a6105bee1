"""The Frechet distance between two sets of images on a bundled model's own feature network.

It is no FID: the network is the small classifier of the demo's classes (64 features, docs/demo-model.md), not
Inception. Distances order variants of one model at equal counts, and mean nothing beyond that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mpq_deploy.denoisers.bundled import bundled_demo

BATCH = 64


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Take them of ``features`` [N, D]."""
        return cls(features.mean(axis=0), np.cov(features, rowvar=False))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982), by eigenvalues."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    shared = np.sqrt(np.maximum(product, 0)).sum()
    difference = float(np.square(a.mean - b.mean).sum())
    return difference + float(np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


class FeatureNetwork:
    """``features.onnx`` of a bundled model, and the moments of its real images."""

    def __init__(self, model: str) -> None:
        folder: Path = bundled_demo(model)
        self._session = ort.InferenceSession(str(folder / "features.onnx"), providers=["CPUExecutionProvider"])
        with np.load(folder / "features_stats.npz", allow_pickle=False) as stored:
            self.real = Moments(stored["mean"], stored["cov"])

    def moments(self, images: np.ndarray) -> Moments:
        """Return the moments of ``images`` uint8 [N, H, W, C]."""
        values = (images.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
        parts = [values[start : start + BATCH] for start in range(0, len(values), BATCH)]
        features = [self._session.run(["features"], {"images": np.ascontiguousarray(part)})[0] for part in parts]
        return Moments.of(np.concatenate(features).astype(np.float64))
