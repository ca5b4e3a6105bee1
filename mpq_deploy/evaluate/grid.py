"""A PNG to look at: a row per variant, a column per condition, the same noise per column.

In: uint8 images [N, H, W, C] by the row's caption, and the columns' labels. Out: a Pillow image.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.cache import write_aside
from mpq_deploy.models.spec import Array

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class GridStyle:
    """Sizes in pixels. ``cell`` is the least width of an image after upscaling by a whole number."""

    cell: int = 96
    gap: int = 8
    margin: int = 16
    font_size: int = 13
    label_lines: int = 3
    background: str = "#ffffff"
    ink: str = "#1c2127"

    @property
    def line_height(self) -> int:
        """Distance of two lines of a label, in pixels."""
        return round(self.font_size * 1.3)


def as_rgb(images: Array) -> Array:
    """Return uint8 [N, H, W, C] as RGB: one or two channels show the first in grey, more the first three."""
    channels = images.shape[-1]
    if channels < 3:
        return np.repeat(images[..., :1], 3, axis=-1)
    return np.ascontiguousarray(images[..., :3])


def image_grid(
    rows: Mapping[str, Array], labels: Sequence[str] = (), style: GridStyle | None = None
) -> Image.Image:
    """Draw every row's images side by side, upscaled without smoothing, with captions and labels.

    Raises UsageError when there is nothing to draw or the rows differ in shape.
    """
    style = style or GridStyle()
    count, height, width = _common_shape(rows)
    factor = max(1, -(-style.cell // width))
    cell = (width * factor, height * factor)
    font = _font(style.font_size)
    captions = [_fitted(name, font, 4 * style.cell, 1)[0] for name in rows]
    column_labels = [_fitted(label, font, cell[0], style.label_lines) for label in labels[:count]]
    left = style.margin + max(round(font.getlength(caption)) for caption in captions) + style.gap
    top = style.margin + style.line_height * max(map(len, column_labels), default=0) + style.gap
    size = (
        left + count * (cell[0] + style.gap) - style.gap + style.margin,
        top + len(rows) * (cell[1] + style.gap) - style.gap + style.margin,
    )
    canvas = Image.new("RGB", size, style.background)
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(column_labels):
        x = left + column * (cell[0] + style.gap) + cell[0] / 2
        for number, line in enumerate(lines):
            y = top - style.gap - style.line_height * (len(lines) - number)
            draw.text((x, y), line, fill=style.ink, font=font, anchor="ma")
    for row, (caption, images) in enumerate(zip(captions, rows.values(), strict=True)):
        y = top + row * (cell[1] + style.gap)
        draw.text(
            (left - style.gap, y + cell[1] / 2), caption, fill=style.ink, font=font, anchor="rm"
        )
        for column, pixels in enumerate(as_rgb(images)):
            tile = Image.fromarray(pixels).resize(cell, Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (cell[0] + style.gap), y))
    return canvas


def save_grid(path: Path, rows: Mapping[str, Array], labels: Sequence[str] = ()) -> Path:
    """Write the grid as PNG, aside and then into place."""
    buffer = io.BytesIO()
    image_grid(rows, labels).save(buffer, format="PNG", optimize=True)
    write_aside(path, buffer.getvalue())
    return path


def _common_shape(rows: Mapping[str, Array]) -> tuple[int, int, int]:
    shapes = {name: images.shape for name, images in rows.items()}
    if not shapes or any(len(shape) != 4 or 0 in shape for shape in shapes.values()):
        raise UsageError(
            f"There are no images to draw: {shapes or 'no rows'}.",
            "Give uint8 images [N, H, W, C] for each row.",
        )
    if len({shape[:3] for shape in shapes.values()}) > 1:
        raise UsageError(
            f"The rows' images differ in shape: {shapes}.", "All rows must show the same samples."
        )
    count, height, width, _ = next(iter(shapes.values()))
    return count, height, width


def _font(size: int) -> Font:
    """DejaVu Sans, which matplotlib brings along: Pillow's own default has Latin letters only."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitted(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Break ``text`` at spaces into at most ``lines`` lines of ``width`` pixels; an ellipsis ends what is cut."""
    done: list[str] = []
    words = text.split() or [""]
    while words and len(done) < lines:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        if words and len(done) == lines - 1:
            line = f"{line} {' '.join(words)}"
        done.append(_clipped(line, font, width))
    return done


def _clipped(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
