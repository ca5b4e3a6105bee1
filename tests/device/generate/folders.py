"""Tiny pipelines exported whole, and the same noise for diffusers and for us."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mpq_deploy.delivery.generation import pipeline_kind, write_generation
from mpq_deploy.models.pipeline_graphs import export_pipeline
from tests.shared import made_once
from tests.tiny_models import (
    WHOLE_LEVEL,
    tiny_scheduler,
    tiny_text_pipeline_folder,
    tiny_text_transformer_folder,
    write_scheduler,
)

UNET = {**WHOLE_LEVEL, "sample_size": 8}


def tiny_folder(place: Path, kind: str, **options: Any) -> Path:
    """The diffusers folder of a tiny pipeline of ``kind``."""
    if kind in ("sd", "sdxl"):
        folder = tiny_text_pipeline_folder(place, xl=kind == "sdxl", **{**UNET, **options})
        write_scheduler(folder, tiny_scheduler(clip_sample=False))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["scheduler"] = ["diffusers", "DDIMScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder
    names = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}
    return tiny_text_transformer_folder(place, names[kind], **options)


def written(factory: pytest.TempPathFactory, kind: str) -> tuple[Path, Path, Path]:
    """A tiny pipeline's folder, its GENERATION folder of float graphs, and the folder of those graphs.

    Made once for all tests, which leave them as they are.
    """

    def make(place: Path) -> None:
        folder = tiny_folder(place / "source", kind)
        images = kind in ("sd", "sdxl")
        files = export_pipeline(folder, pipeline_kind(folder), place / "graphs", images=images)
        write_generation(folder, files, place / "generation")
        (place / "folder.txt").write_text(str(folder), encoding="utf-8")

    place = made_once(factory, f"generation-{kind}", make)
    folder = Path((place / "folder.txt").read_text(encoding="utf-8"))
    return folder, place / "generation", place / "graphs"


class SameNoise:
    """Noise that depends on the shape alone."""

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The noise of one image."""
        return np.random.default_rng(sum(shape)).standard_normal(shape, dtype)


@contextmanager
def same_noise() -> Iterator[None]:
    """Give diffusers that noise wherever it draws, for each image of a batch."""

    def draw(shape: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = tuple(int(one) for one in shape[1:])
        values = SameNoise().standard_normal(own, np.float32)
        return torch.from_numpy(np.stack([values] * int(shape[0])))

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.") and "randn_tensor" in vars(module):
                stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield
