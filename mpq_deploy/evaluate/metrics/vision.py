"""CLIP's and DINOv2's image towers from a local folder of the transformers library."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mpq_deploy.errors import MissingDependencyError, UsageError
from mpq_deploy.evaluate.metrics.efficientnet import torch_features
from mpq_deploy.evaluate.metrics.networks import CLIP, digest_of, title_of
from mpq_deploy.models.spec import Array
from mpq_deploy.models.weight_files import refuse_unborne
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.files import file_digest
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.libraries import no_bars

CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


def check_vision(name: str, path: Path | None, offline: str) -> None:
    """Say what is missing: the package, the folder, or a file of it. Raises MissingDependencyError, UsageError."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError("transformers", "torch", f"The network '{name}'")
    if path is None:
        raise UsageError(
            f"The network '{name}' needs weights of your own.",
            f"Give a local folder of the transformers library: --weights {name}=FOLDER. {offline}",
        )
    for file in (CONFIG, PREPROCESSOR, WEIGHTS):
        if not (path / file).is_file():
            raise UsageError(
                f"{path} holds no {file}.",
                f"Give a folder with {CONFIG}, {PREPROCESSOR} and {WEIGHTS}. {offline}",
            )


class VisionNetwork:
    """CLIP: the projected image embedding; DINOv2: the class token behind the last norm.

    The whole image is made as large as the network's crop, by bicubic interpolation, with the
    folder's mean and deviation; nothing is cropped (our choice: the samples are square).
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._side, self._mean, self._deviation = preprocessing(folder)
        self._model = _model(name, folder)
        self._projects = name == CLIP
        config = self._model.config
        self.width = int(config.projection_dim if self._projects else config.hidden_size)
        self.name, self.title = name, title_of(name)
        self.digest = digest_of(
            file_digest(folder / WEIGHTS), repr((self._side, self._mean, self._deviation))
        )

    def features(self, images: Array) -> Array:
        """Return float64 [N, width] of ``images`` uint8 [N, H, W, C] with 1 or 3 channels."""
        return torch_features(self._embed, images, self._side, self._mean, self._deviation)

    def _embed(self, pixels: Any) -> Any:
        found = self._model(pixel_values=pixels)
        return found.image_embeds if self._projects else found.last_hidden_state[:, 0]


def preprocessing(folder: Path) -> tuple[int, list[float], list[float]]:
    """Return crop size, mean and deviation from a folder's preprocessor_config.json.

    Raises UsageError for one that does not.
    """
    path = folder / PREPROCESSOR
    settings = read_json_object(path, error=UsageError)
    try:
        crop = settings.get("crop_size") or settings.get("size") or {}
        side = int(crop if isinstance(crop, int) else crop["height"])
        return side, settings["image_mean"], settings["image_std"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} does not say {error}.", "It must name crop_size, image_mean and image_std."
        ) from error


def from_folder(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """Return a transformers model of class ``kind`` with all its weights from ``folder``, on torch's device.

    Raises UsageError where the folder does not hold them all.
    """
    from transformers.utils import logging

    refuse_unborne(folder, "model", None)
    level = logging.get_verbosity()
    # Weights of the other tower are listed as unexpected, line by line; what is missing is told
    # below.
    logging.set_verbosity_error()
    try:
        with no_bars("transformers"):
            model, info = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} is not a '{name}' of the transformers library: {str(error).splitlines()[0]}",
            "Give a folder that it saved.",
        ) from error
    finally:
        logging.set_verbosity(level)
    # transformers fills what is missing with random numbers, and only warns.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"{folder / WEIGHTS} lacks {len(missing)} of the tensors of {kind.__name__}, such as {missing[0]}.",
            f"Give the whole folder of a {kind.__name__}.",
        )
    return model.eval().to(computing_on().torch_device())


def _model(name: str, folder: Path) -> Any:
    import transformers

    if name != CLIP:
        return from_folder(transformers.Dinov2Model, folder, name)
    settings = read_json_object(folder / CONFIG, error=UsageError)
    tower = settings.get("vision_config", settings)
    # A whole CLIP says how wide its embeddings are beside its towers, not in them.
    width = settings.get("projection_dim", tower.get("projection_dim"))
    config = transformers.CLIPVisionConfig(
        **{**tower, **({} if width is None else {"projection_dim": width})}
    )
    return from_folder(transformers.CLIPVisionModelWithProjection, folder, name, config=config)
