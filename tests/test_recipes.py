"""Every bundled recipe is built on a tiny model of the class that it is for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from mpq_deploy.recipe import bundled_recipes, load_recipe  # noqa: E402
from tests.pipeline.runs import build  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    ONE_LEVEL,
    ONE_LEVEL_CLASSES,
    tiny_text_pipeline_folder,
    tiny_text_transformer_folder,
    tiny_unet_folder,
)

pytestmark = pytest.mark.torch
Model = Callable[[Path], Path]
# Exporting takes most of the time, and half of that with one level instead of two.
CLASSES: dict[str, Model] = {
    "sd15-jetson-orin-nano": partial(tiny_text_pipeline_folder, **ONE_LEVEL),
    "sdxl-rtx": partial(tiny_text_pipeline_folder, xl=True, **ONE_LEVEL),
    "sd3-rtx-blackwell": partial(tiny_text_transformer_folder, class_name="SD3Transformer2DModel"),
    "flux-rtx-blackwell": partial(
        tiny_text_transformer_folder, class_name="FluxTransformer2DModel"
    ),
}
COUNTS: dict[str, Any] = {
    **{
        "calibrate.timesteps": 2,
        "calibrate.samples": 4,
        "calibrate.steps": 3,
        "calibrate.reservoir": 256,
    },
    **{"measure.timesteps": 1, "measure.probes": 1, "measure.samples": 2, "measure.calls": 1},
    **{"quantize.hessian_rows": 64, "quantize.noise_draws": 0, "quantize.refinements": 0},
    **{
        "evaluate.samples": 1,
        "evaluate.steps": 2,
        "evaluate.timesteps": 1,
        "evaluate.controls": False,
    },
    # Builders of engines are not everywhere; tests/pipeline builds engines where one is.
    "engine.build": False,
}
# Vectors, which stay FP16, are a larger part of a tiny transformer.
BUDGETS = {"sd3-rtx-blackwell": 0.6, "flux-rtx-blackwell": 0.6}


@pytest.fixture(scope="module")
def emoji_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's class of UNet; its runs go into one run folder, which exports it once."""
    return tiny_unet_folder(tmp_path_factory.mktemp("unet"), **ONE_LEVEL_CLASSES)


@pytest.mark.parametrize("name", bundled_recipes())
def test_it_builds_a_tiny_model_of_its_class(name: str, emoji_like: Path, tmp_path: Path) -> None:
    model = CLASSES[name](tmp_path) if name in CLASSES else emoji_like
    given = {"model": str(model), **COUNTS, "budget": BUDGETS.get(name)}
    if "flux" in name:
        # Its pipeline makes images of 1,024 pixels, whatever the model's size.
        (tmp_path / "call.yaml").write_text(
            "{prompt: abc, height: 16, width: 16}", encoding="utf-8"
        )
        given["call"] = str(tmp_path / "call.yaml")
    recipe = load_recipe(name, given)
    built = build(recipe, model.parent / "run")
    assert built.made[-1] == "report"
    assert built.report["size_bytes"] <= built.report["budget_bytes"]
    assert built.report["target"]["name"] == recipe.target
    assert load_recipe(built.run / "recipe.yaml") == recipe
