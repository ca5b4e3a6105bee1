"""A Flux pipeline in FP8 and FP4: every layer planned so is so in the engine, for Ada and for Blackwell."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

pytest.importorskip("torch")

from mpq_deploy.engine.record import EngineRecord
from tests.pipeline.runs import build, recipe_for
from tests.tiny_models import tiny_text_transformer_folder

pytestmark = [pytest.mark.torch, pytest.mark.rtx]

FLUX = "FluxTransformer2DModel"
# Wide enough for FP4's blocks and FP8's kernels.
WIDE = {"num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx")
    return tiny_text_transformer_folder(tmp_path_factory.mktemp("flux"), FLUX, **WIDE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of both targets, one after the other: what does not depend on one is made once."""
    return tmp_path_factory.mktemp("run") / "run"


@pytest.mark.parametrize(
    ("target", "schemes", "types"),
    [("rtx-ada", ["f8a8"], {"FP8"}), ("rtx-blackwell", ["f8a8", "nvfp4"], {"FP8", "FP4E2M1"})],
)
def test_flux_computes_in_the_floats_of_its_plan(
    flux: Path, run: Path, target: str, schemes: list[str], types: set[str]
) -> None:
    calls = run.parent / "calls.yaml"
    prompts = [{"prompt": prompt, "height": 16, "width": 16} for prompt in ("a cat", "a dog")]
    calls.write_text(yaml.safe_dump(prompts), encoding="utf-8")
    recipe = recipe_for(
        flux,
        target=target,
        call=str(calls),
        budget=0.4 if "nvfp4" in schemes else 0.6,
        allocate__schemes=["fp16", *schemes],
        allocate__protect=[{"layers": "*", "schemes": schemes}],
        quantize__rounding="nearest",
        engine__build=True,
        engine__batch_max=2,
        evaluate__controls=False,
    )
    built = build(recipe, run)
    record = EngineRecord.load(run / "engine" / "build.json")
    assert record.verified and not record.problems
    assert {layer["scheme"] for layer in built.report["layers"]} == set(schemes)
    assert types <= {name.split()[-1] for name in record.kernels if " " in name}
