"""Whole builds of text-to-image transformers, from a pipeline folder to an engine and back into their pipeline."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import mpq_deploy  # noqa: E402
from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.graph.layers import layer_graph  # noqa: E402
from mpq_deploy.graph.load import load_model  # noqa: E402
from mpq_deploy.models.export import load_exported  # noqa: E402
from tests.pipeline.runs import Built, build, recipe_for  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    TEXT_PIPELINES,
    tiny_text_transformer_folder,
    tiny_transformer_folder,
)

pytestmark = [pytest.mark.torch, pytest.mark.rtx]
DIT, SD3, FLUX = "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
PROMPTS = ["abc", "de f", "ghi"]
STEPS = 3
# No branches, so that each layer's weight lies in the engine in one type.
MIX: dict[str, Any] = {
    "budget": 0.5,
    "allocate__schemes": ["fp16", "w8a8", "w4a8", "w4a16"],
    "allocate__branches": [],
}


@dataclass(frozen=True)
class Case:
    """A pipeline folder and its finished run."""

    class_name: str
    folder: Path
    built: Built


@pytest.fixture(scope="module", params=[DIT, SD3, FLUX])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    pytest.importorskip("tensorrt_rtx")
    place = tmp_path_factory.mktemp("pipeline")
    # The pipeline's own empty class is number 1,000, whatever the model has: no guidance here.
    calls: list[dict[str, Any]] = [{"class_labels": [n], "guidance_scale": 1.0} for n in range(3)]
    if request.param == DIT:
        folder = tiny_transformer_folder(place, DIT, vae=True)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        (folder / "model_index.json").write_text(
            json.dumps({**index, "_class_name": "DiTPipeline"}), encoding="utf-8"
        )
    else:
        folder = tiny_text_transformer_folder(place, request.param)
        calls = [{"prompt": prompt, "height": 16, "width": 16} for prompt in PROMPTS]
    options = {
        "target": "rtx",
        "engine__build": True,
        "engine__batch_max": 2,
        "evaluate__controls": False,
        "call": str(place / "calls.yaml"),
    }
    (place / "calls.yaml").write_text(yaml.safe_dump(calls), encoding="utf-8")
    return Case(request.param, folder, build(recipe_for(folder, **options, **MIX), place / "run"))


def elements(log: str, dtype: str) -> int:
    """Elements of all constants of a type in the builder's list of kernels, each constant once. Our own reading."""
    listed = log[log.rindex("Layers:") :]
    found = {}
    for group in re.findall(r"Constants: \[(.*?)\], Outputs:", listed):
        for name, shape, kind in re.findall(
            r"\{ Name: (\S+), Dimensions: \[([\d,]+)\].*?Datatype: (\w+)", group
        ):
            if kind == dtype:
                found[name] = int(np.prod([int(size) for size in shape.split(",")]))
    return sum(found.values())


def test_every_stage_runs_and_the_engine_is_packed(case: Case) -> None:
    record = json.loads((case.built.run / "engine" / "build.json").read_text(encoding="utf-8"))
    assert record["verified"] and record["problems"] == []
    assert (
        case.built.made[0] == "export"
        and case.built.made[-1] == "report"
        and "calibrate" in case.built.made
    )
    layers = {
        layer.name: layer
        for layer in layer_graph(load_model(case.built.run / "export" / "model.onnx")).layers
    }
    schemes = {row["name"]: row["scheme"] for row in case.built.report["layers"]}
    assert set(schemes) == set(layers)
    weights = {name: layer.out_channels * layer.reduction for name, layer in layers.items()}
    log = (case.built.run / "engine.log").read_text(encoding="utf-8")
    for start, dtype in (("w4", "Int4"), ("w8", "Int8")):
        planned = sum(weights[name] for name, scheme in schemes.items() if scheme.startswith(start))
        assert planned > 0
        assert elements(log, dtype) == planned, dtype


def images(pipe: Any, class_name: str) -> np.ndarray:
    """What the pipeline draws from one seed."""
    options: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
    options["generator"] = torch.Generator().manual_seed(3)
    if class_name == DIT:
        # The pipeline's own empty class is number 1,000, whatever the model has: no guidance here.
        return np.asarray(pipe([1], guidance_scale=1.0, **options).images)
    options |= {"height": 16, "width": 16}
    return np.asarray(pipe("de f", **options).images)


def test_it_draws_in_the_place_of_the_pipelines_transformer(case: Case, tmp_path: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(case.folder)
    pipe.set_progress_bar_config(disable=True)
    before = images(pipe, case.class_name)
    assert np.ptp(before) > 0.05
    pipe.transformer = mpq_deploy.load(case.built.run / "export" / "model.onnx", device="cpu")
    np.testing.assert_allclose(images(pipe, case.class_name), before, atol=5e-4)
    pipe.transformer = mpq_deploy.load(case.built.run, backend="onnxruntime", device="cpu")
    error = (
        np.square(images(pipe, case.class_name) - before).mean()
        / np.square(before - before.mean()).mean()
    )
    # As far from the float model as the run's own evaluation of it says, within what other noise makes of it.
    assert 0 < error < 0.1
    pipe.to("cpu", torch.float32)
    if case.class_name in TEXT_PIPELINES:
        other = pipe(
            "xyz",
            num_inference_steps=STEPS,
            output_type="latent",
            height=16,
            width=16,
        )
        assert np.isfinite(np.asarray(other.images.detach())).all()


def test_the_graph_takes_what_its_pipeline_gives(case: Case) -> None:
    exported = load_exported(case.built.run / "export")
    spec = exported.spec
    wanted = {
        DIT: ["class_labels"],
        SD3: ["encoder_hidden_states", "pooled_projections"],
        FLUX: ["encoder_hidden_states", "pooled_projections", "guidance"],
    }
    names = [item.name for item in spec.conditions]
    assert sorted(names) == sorted(wanted[case.class_name])
    assert set(names) == set(exported.conditions.arrays)
    assert spec.pipeline is not None
    assert set(spec.pipeline.fixed) == (
        {"img_ids", "txt_ids"} if case.class_name == FLUX else set()
    )
    assert spec.pipeline.class_name in case.built.report["evaluation"]["sampler"]
    if case.class_name != DIT:
        assert spec.labels == tuple(PROMPTS)
        with pytest.raises(UsageError, match="needs 'encoder_hidden_states'"):
            mpq_deploy.load(case.built.run)(torch.zeros(1, *spec.sample.shape), timestep=7)
