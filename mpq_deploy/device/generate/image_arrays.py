"""Images as arrays and back, with Pillow."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.generate.noise_schedule import Array
from mpq_deploy.errors import InputError, MissingDependencyError, UsageError

MODES = ("RGB", "L")
# Beyond any size that a model is exported for.
LARGEST_PIXELS = 1 << 26


def pillow(module: str = "Image") -> Any:
    """Return a module of Pillow. Raises MissingDependencyError."""
    try:
        return import_module(f"PIL.{module}")
    except ImportError as error:
        raise MissingDependencyError("pillow", "generate", "An image") from error


def read_picture(given: Any, what: str, modes: tuple[str, ...] = MODES) -> Any:
    """Return a Pillow image from a file or as it is. Raises InputError, or UsageError for its mode."""
    image = given
    if isinstance(given, (str, Path)):
        try:
            image = _opened(given)
        except (MissingDependencyError, MemoryError):
            raise
        except Exception as error:
            # Its decoders raise almost anything for damaged files, and for pictures of too many pixels.
            raise InputError(f"The {what} {given} cannot be read: {error}.") from error
    if image.width * image.height > LARGEST_PIXELS:
        raise InputError(f"The {what} has {image.width}x{image.height} pixels.", "Make it smaller.")
    # An image in memory may still name the colour that was transparent in its file.
    clear = image is not given and "transparency" in image.info
    if image.mode not in modes or clear:
        mode = "a transparent colour" if clear else f"the mode {image.mode}"
        raise UsageError(
            f"The {what} has {mode}, not {' or '.join(modes)}.",
            "Save it as RGB of 8 bits, without transparency.",
        )
    return image


def _opened(file: str | Path) -> Any:
    """Return a picture, decoded unless it has too many pixels."""
    with warnings.catch_warnings():
        # Pillow warns above 89 million pixels, which our own limit is below.
        warnings.simplefilter("ignore")
        image = pillow().open(file)
        if image.width * image.height <= LARGEST_PIXELS:
            # Cameras store the rotation beside the pixels; diffusers' load_image turns them, too.
            image = pillow("ImageOps").exif_transpose(image)
            image.load()
    return image


def check_same_size(image: Any, size: tuple[int, int], what: str) -> None:
    """Raise UsageError where an image is not of ``size`` (width, height)."""
    if image.size != size:
        raise UsageError(
            f"The {what} has {image.width}x{image.height} pixels, and {size[0]}x{size[1]} is made.",
            f"Resize it to {size[0]}x{size[1]}, or give --size.",
        )


def image_array(image: Any) -> Array:
    """Return an image as [1, 3, H, W] float32 in [-1, 1]."""
    values = np.asarray(image.convert("RGB"), np.float32) / 255
    return (2 * values - 1).transpose(2, 0, 1)[None]


def mask_array(image: Any) -> Array:
    """Return a mask as [1, 1, H, W] float32: 1 where it is white, and painted anew."""
    values = np.asarray(image.convert("L"), np.float32) / 255
    return (values >= 0.5).astype(np.float32)[None, None]


def image_from_array(values: Array) -> Any:
    """Return a Pillow image of [H, W, 3] in [0, 1]."""
    return pillow().fromarray((values * 255).round().astype(np.uint8))
