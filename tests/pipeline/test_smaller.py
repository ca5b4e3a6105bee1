"""Measuring at a smaller sample: a second graph over the same weights, crops of the calls, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from mpq_deploy.calibrate.stats import CalibrationSet  # noqa: E402
from mpq_deploy.errors import ModelError, UsageError  # noqa: E402
from mpq_deploy.graph.layers import layer_graph  # noqa: E402
from mpq_deploy.graph.load import load_model  # noqa: E402
from mpq_deploy.models.smaller import SMALLER  # noqa: E402
from mpq_deploy.models.spec import DenoiserSpec  # noqa: E402
from mpq_deploy.runtime.ort import make_session  # noqa: E402
from mpq_deploy.sensitivity.table import SensitivityTable  # noqa: E402
from tests.pipeline.runs import Built, build, recipe_for  # noqa: E402
from tests.tiny_models import tiny_onnx_with_yaml, tiny_unet_folder  # noqa: E402

pytestmark = pytest.mark.torch
OPTIONS = {"target": "onnxruntime-cpu", "evaluate__samples": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_unet_folder(tmp_path_factory.mktemp("unet"), sample_size=16)


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    recipe = recipe_for(folder, measure__side=8, **OPTIONS)
    return build(recipe, tmp_path_factory.mktemp("built") / "run")


def test_the_smaller_graph_has_the_layers_and_the_weights_of_the_whole(built: Built) -> None:
    export = built.run / "export"
    smaller, whole = (layer_graph(load_model(export / name)) for name in (SMALLER, "model.onnx"))
    assert [layer.name for layer in smaller.layers] == [layer.name for layer in whole.layers]
    protos = [onnx.load(export / name, load_external_data=False) for name in (SMALLER, "model.onnx")]
    places = [
        {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data}
        for proto in protos
    ]
    # All but the smallest constants lie beside the graph, once.
    assert len(places[0]) > 10 and places[0] == places[1]
    assert not (export / f"{SMALLER}.data").exists()
    spec = DenoiserSpec.load(export / "denoiser.json")
    assert spec.sample.shape[-2:] == (16, 16)  # what is deployed is whole
    session = make_session(export / SMALLER)
    feeds = {spec.sample.name: np.zeros((2, *spec.sample.shape[:-2], 8, 8), np.float32)}
    feeds[spec.timestep_name] = np.zeros(2, np.float32)
    feeds |= {item.name: np.zeros((2, *item.shape), item.dtype) for item in spec.conditions}
    assert session.run(None, feeds)[0].shape == feeds[spec.sample.name].shape


def test_losses_are_those_of_the_crops_and_the_report_says_so(built: Built, folder: Path, tmp_path: Path) -> None:
    """Layers that matter at one size matter at the other; the figures themselves differ."""
    whole = build(recipe_for(folder, **OPTIONS), tmp_path / "whole", "measure")
    found, own = (SensitivityTable.load(one.run / "measure").losses for one in (built, whole))
    assert {name: set(row) for name, row in found.items()} == {name: set(row) for name, row in own.items()}
    rows = [(found[layer][s], own[layer][s]) for layer, row in own.items() for s in row if own[layer][s] > 0]
    small, large = (np.log(np.array(one)) for one in zip(*rows))
    assert not np.allclose(small, large) and np.corrcoef(small, large)[0, 1] > 0.9
    assert any("samples of 8 x 8, the centres of those of 16 x 16" in note for note in built.report["notes"])


def test_crops_are_the_centres(built: Built) -> None:
    calls = CalibrationSet.load(built.run / "calibrate" / "inputs.npz")
    found = calls.cropped(6, 6)
    np.testing.assert_array_equal(found.samples, calls.samples[..., 5:11, 5:11])
    np.testing.assert_array_equal(found.rows, calls.rows)


def test_a_side_that_is_no_smaller_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"measure.side is 16, which is no smaller"):
        build(recipe_for(folder, measure__side=16, **OPTIONS), tmp_path / "run")


def test_a_side_that_the_model_cannot_take_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not take samples of \[3, 7, 7\], as measure.side asks") as caught:
        build(recipe_for(folder, measure__side=7, **OPTIONS), tmp_path / "run")
    assert "half of that" in caught.value.hint


def test_an_onnx_file_has_one_size(tmp_path: Path) -> None:
    model = tiny_onnx_with_yaml(tmp_path)
    with pytest.raises(UsageError, match="one size of samples") as caught:
        build(recipe_for(model, measure__side=4, **OPTIONS), tmp_path / "run")
    assert "measure.side" in caught.value.hint
