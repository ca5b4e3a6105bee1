"""Inception v3 as FID defines it: torch-fidelity's port with its own resizing.

The weights are the user's: a path, or torch-fidelity's file in PyTorch's cache. Nothing is
downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np

from mpq_deploy.errors import MissingDependencyError, UsageError
from mpq_deploy.evaluate.metrics.networks import BATCH, INCEPTION, as_rgb, digest_of, title_of
from mpq_deploy.models.spec import Array
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.files import file_digest
from mpq_deploy.system.locks import scratch_folder

# torch-fidelity's release of the weights; its name ends with the start of their SHA-256.
FILE = "weights-inception-2015-12-05-6726825d.pth"
STANDARD = "6726825d"
LAYER = "2048"


def cached_weights() -> Path:
    """Return where torch-fidelity keeps its weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / FILE


def check_inception(path: Path | None, offline: str) -> None:
    """Say what is missing: the package, or the weights. Raises MissingDependencyError, UsageError."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "torch", "The network 'inception'")
    weights = path or cached_weights()
    if not weights.is_file():
        raise UsageError(
            f"The weights of 'inception' are not at {weights}.",
            f"Get {FILE} from the releases of torch-fidelity on GitHub (v0.2.0), put it there or give it with "
            f"--weights inception=FILE. {offline}",
        )
    try:
        _torch_fidelity()
    except ImportError as error:
        raise UsageError(
            f"The network 'inception' needs the package torch-fidelity, which cannot be imported: {error}.",
            f'Install it with: pip install "mpq-deploy[fid]" (it brings torchvision). {offline}',
        ) from error


class Inception:
    """2,048 features before the classifier. Only with the standard weights is the distance called FID."""

    def __init__(self, path: Path | None) -> None:
        weights = path or cached_weights()
        self.name, self.width = INCEPTION, int(LAYER)
        found = file_digest(weights)
        self.title = (
            "FID" if found.startswith(STANDARD) else f"{title_of(INCEPTION)}, other weights"
        )
        self.digest = digest_of(found, "torch-fidelity inception-v3-compat")
        self._device = computing_on().torch_device()
        self._model = _model(weights).to(self._device)

    def features(self, images: Array) -> Array:
        """Return float64 [N, 2048] of ``images`` uint8 [N, H, W, C]; resizing to 299 is torch-fidelity's own."""
        import torch

        found = []
        for start in range(0, len(images), BATCH):
            pixels = np.ascontiguousarray(
                as_rgb(images[start : start + BATCH]).transpose(0, 3, 1, 2)
            )
            with torch.inference_mode():
                fed = torch.from_numpy(pixels).to(self._device)
                found.append(self._model(fed)[0].double().cpu().numpy())
        return np.concatenate(found)


def _torch_fidelity() -> ModuleType:
    return importlib.import_module("torch_fidelity")


def _model(weights: Path):  # type: ignore[no-untyped-def]  # a class of torch-fidelity
    import pickle

    import torch

    try:
        state = torch.load(weights, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UsageError(
            f"{weights} cannot be read as plain tensors: {error}",
            f"Get {FILE} of torch-fidelity again.",
        ) from error
    # torch-fidelity unpickles whatever its path holds, so it is given a file that was written here.
    with scratch_folder("inception") as folder:
        clean = folder / "weights.pth"
        torch.save(state, clean)
        try:
            return _torch_fidelity().FeatureExtractorInceptionV3(
                "inception-v3-compat", [LAYER], str(clean)
            )
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                f"{weights} does not hold the weights of torch-fidelity's Inception: {str(error).splitlines()[0]}",
                f"Get {FILE} of torch-fidelity.",
            ) from error
