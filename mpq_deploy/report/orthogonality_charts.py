"""Orthogonality as pictures: a heat map per timestep, and the layers' importance over time.

In: ``OrmPictures``. Out: PNGs of at most ``MOST_SIDE`` pixels a side as data URIs (a pixel is the
mean of neighbouring layers beyond that), and a line chart.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from mpq_deploy.evaluate.output_error import stride_midpoints
from mpq_deploy.models.spec import Array
from mpq_deploy.report.data import OrmPictures
from mpq_deploy.report.pictures import data_uri
from mpq_deploy.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Axis,
    chart,
    label,
    nice_ticks,
    spread_out,
    x_axis,
    y_axis,
)

MOST_SIDE = 200
MOST_MAPS = 12
MOST_LINES = 400
# Values are drawn in hundredths: the page reads them back from the colours.
LEVELS = 101
# Cividis (Nuñez, Anderton and Renslow 2018) at nine points: even in lightness, also for
# colour-blind readers, so one palette does on light and on dark.
ANCHORS = ("00224e", "1a386f", "434e6c", "61656f", "7d7c78", "9b9476", "bcae6c", "dec958", "fee838")
NAMED = 3
NAME_WIDTH = 216
NAME_LETTERS = 32


@dataclass(frozen=True)
class HeatMap:
    """One timestep's matrix as a data URI, and what a reader who does not see it is told."""

    timestep: float
    uri: str
    text: str


@dataclass(frozen=True)
class OrmView:
    """What the page shows. ``pooled``: layers per pixel; ``low``: the first colour's value.

    ``palette``: the ``LEVELS`` colours as "r,g,b", from ``low`` to 1; ``gradient`` for CSS.
    """

    maps: tuple[HeatMap, ...]
    total: int
    layers: int
    pooled: int
    side: int
    low: float
    palette: tuple[str, ...]
    gradient: str
    constant: int
    chart: Markup | None


def orm_view(pictures: OrmPictures) -> OrmView:
    """Encode the heat maps of evenly spread timesteps, and draw the lines."""
    layers = len(pictures.layers)
    pooled = -(-layers // MOST_SIDE)
    least = float(pictures.orm.min())
    low = 0.0 if least >= 0 else -np.ceil(-10 * least) / 10
    shown = stride_midpoints(len(pictures.timesteps), MOST_MAPS)
    maps = tuple(
        _heat_map(float(pictures.timesteps[k]), pictures.orm[k], pooled, low) for k in shown
    )
    colours = _palette()
    return OrmView(
        maps,
        len(pictures.timesteps),
        layers,
        pooled,
        -(-layers // pooled),
        low,
        tuple(",".join(str(int(part)) for part in colour) for colour in colours),
        ", ".join(f"#{colour}" for colour in ANCHORS),
        int(pictures.constant.sum()),
        importance_chart(pictures),
    )


def _heat_map(timestep: float, orm: Array, pooled: int, low: float) -> HeatMap:
    small = pool(np.asarray(orm, np.float64), pooled)
    index = np.rint((small - low) / (1 - low) * (LEVELS - 1)).clip(0, LEVELS - 1).astype(np.uint8)
    image = Image.fromarray(index, mode="P")
    image.putpalette(_palette().astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    others = orm[~np.eye(len(orm), dtype=bool)]
    text = (
        f"mean {others.mean():.2f}, from {others.min():.2f} to {others.max():.2f}"
        if len(others)
        else "one layer"
    )
    return HeatMap(timestep, data_uri(buffer.getvalue()), text)


def pool(matrix: Array, size: int) -> Array:
    """Return the means over blocks of ``size`` x ``size``; the last ones hold what is left."""
    starts = np.arange(0, len(matrix), size)
    sums = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    counts = np.diff(np.append(starts, len(matrix)))
    return np.asarray(sums / np.outer(counts, counts))


def _palette() -> Array:
    """Return the colours, float64 [LEVELS, 3], between ``ANCHORS``."""
    anchors = np.array(
        [[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in ANCHORS], np.float64
    )
    at = np.linspace(0, len(ANCHORS) - 1, LEVELS)
    parts = [np.interp(at, np.arange(len(ANCHORS)), part) for part in anchors.T]
    return np.asarray(np.rint(np.stack(parts, axis=1)))


def importance_chart(pictures: OrmPictures) -> Markup | None:
    """Draw the layers' importance over the timesteps with the extremes named; None for one step.

    Constant layers are left out, since they would flatten the others. Beyond ``MOST_LINES`` layers,
    evenly spread ones are drawn.
    """
    theta = np.asarray(pictures.theta, np.float64)
    steps = len(theta)
    varied = np.flatnonzero(~pictures.constant)
    if steps < 2 or not len(varied):
        return None
    order = varied[np.argsort(-(pictures.weights @ theta)[varied], kind="stable")]
    named = list(dict.fromkeys(int(i) for i in (*order[:NAMED], *order[-NAMED:])))
    drawn = sorted({*varied[stride_midpoints(len(varied), MOST_LINES)].tolist(), *named})
    ticks = nice_ticks([float(theta[:, varied].min()), float(theta[:, varied].max())], 5)
    x = Axis(0, steps - 1, LEFT, WIDTH - NAME_WIDTH)
    y = Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    every = max(1, -(-steps // 7))
    at = [(float(k), f"{t:.4g}") for k, t in enumerate(pictures.timesteps) if k % every == 0]
    parts = [
        y_axis(
            x, y, [(t, f"{t:g}") for t in ticks], "importance of a layer: theta = exp(-beta gamma)"
        ),
        x_axis(x, y, at, "timestep: from noise (left) to image (right)"),
        *(_trace(x, y, i, theta[:, i], pictures.layers[i], i in named) for i in drawn),
    ]
    heights = spread_out([y(theta[-1, i]) for i in named], 15)
    for i, height in zip(named, heights, strict=True):
        parts.append(label(x.end + 10, height + 4, _short(pictures.layers[i]), "start", "tick"))
    most, least = (
        ", ".join(pictures.layers[i] for i in part) for part in (order[:NAMED], order[-NAMED:])
    )
    text = f"Most important: {most}. Least important: {least}."
    return chart("importance", "Importance of each layer over timesteps", text, parts)


def _trace(x: Axis, y: Axis, index: int, values: Array, name: str, named: bool) -> Markup:
    path = "M" + "L".join(f"{x(k):.0f} {y(float(v)):.1f}" for k, v in enumerate(values))
    text = f"{name}: {values[0]:.3f} to {values[-1]:.3f}"
    return Markup('<path class="{}" data-layer="{}" d="{}"><title>{}</title></path>').format(
        "trace named" if named else "trace", index, path, text
    )


def _short(name: str) -> str:
    return name if len(name) <= NAME_LETTERS else "…" + name[1 - NAME_LETTERS :]
