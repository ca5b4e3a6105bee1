"""Read inputs.npz (see prepare.py). Needs NumPy only, so that every tool's own environment can use it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def read_feeds(path: Path, split: str) -> list[dict[str, np.ndarray]]:
    """Return the calls of a split ("calibration" or "heldout"): input name -> array of batch 1."""
    feeds: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as data:
        for key in data.files:
            part, number, name = key.split("/", 2)
            if part == split:
                feeds.setdefault(int(number), {})[name] = data[key]
    return [feeds[number] for number in sorted(feeds)]


def arguments() -> tuple[Path, list[dict[str, np.ndarray]], str, Path]:
    """Return what every tool is called with: model, calibration feeds, mode, output file."""
    model, inputs, mode, out = sys.argv[1:5]
    return Path(model), read_feeds(Path(inputs), "calibration"), mode, Path(out)
