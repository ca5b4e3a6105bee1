"""The report's pictures as data URIs, within a limit of bytes.

In: an ``ImageSet``. Out: a row per variant, a PNG per condition. Large images are halved until all
fit, and the page says so.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mpq_deploy.evaluate.grid import as_rgb
from mpq_deploy.evaluate.output_error import stride_midpoints
from mpq_deploy.report.data import ImageSet

# With everything else the page stays below 5 MB; base64 makes 4 bytes of 3.
PICTURE_BYTES = 2_500_000
COLUMNS = 8


@dataclass(frozen=True)
class PictureRow:
    """One variant's pictures: data URIs in the order of the columns."""

    key: str
    title: str
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class PictureTable:
    """What the page shows: ``shown`` of ``total`` samples, at 1/``reduction`` of their size."""

    labels: tuple[str, ...]
    rows: tuple[PictureRow, ...]
    width: int
    height: int
    shown: int
    total: int
    reduction: int


def picture_table(
    images: ImageSet, titles: dict[str, str], limit: int = PICTURE_BYTES
) -> PictureTable:
    """Encode evenly spread columns of every variant's images within ``limit`` bytes."""
    first = next(iter(images.images.values()))
    # A control may have the first images alone.
    columns = stride_midpoints(min(map(len, images.images.values())), COLUMNS)
    reduction = 1
    while True:
        encoded = {
            name: [_png(image, reduction) for image in as_rgb(batch[columns])]
            for name, batch in images.images.items()
        }
        total = sum(len(png) for pngs in encoded.values() for png in pngs)
        if total <= limit or min(first.shape[1:3]) // (2 * reduction) < 8:
            break
        reduction *= 2
    rows = tuple(
        PictureRow(name, titles.get(name, name), tuple(data_uri(png) for png in pngs))
        for name, pngs in encoded.items()
    )
    height, width = (side // reduction for side in first.shape[1:3])
    labels = tuple(
        images.labels[column] if column < len(images.labels) else "" for column in columns
    )
    return PictureTable(labels, rows, width, height, len(columns), len(first), reduction)


def _png(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], reduction: int) -> bytes:
    image = Image.fromarray(pixels)
    if reduction > 1:
        image = image.reduce(reduction)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
