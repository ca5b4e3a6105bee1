"""What does not fit into memory is read again: results are those of keeping everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.formats.candidates import LayerCandidates
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.rounding import candidate_store
from mpq_deploy.rounding.candidate_store import StoredCandidates
from mpq_deploy.sensitivity.layer_weights import Kept
from tests.pipeline.runs import Built, build, recipe_for, save_denoiser, stage_bytes

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

STAGES = ("candidates", "measure", "allocate", "quantize")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("spilled")
    return build(recipe_for(save_denoiser(folder)), folder / "run", last="quantize")


@pytest.fixture(scope="module")
def graph(built: Built) -> LayerGraph:
    return layer_graph(load_model(built.run / "export" / "model.onnx"))


def same(one: LayerCandidates, other: LayerCandidates) -> None:
    assert one.schemes == other.schemes and one.refused == other.refused
    np.testing.assert_array_equal(one.weight, other.weight)
    for scheme in one.schemes:
        form = scheme.weight_form
        np.testing.assert_array_equal(one.weight_matrix(form), other.weight_matrix(form))


def test_candidates_are_the_same_kept_or_read_again(built: Built, graph: LayerGraph) -> None:
    folder = built.run / "candidates"
    kept, spilled = StoredCandidates.of(folder, graph), StoredCandidates.of(folder, graph, limit=0)
    assert list(kept) == list(spilled) == [layer.name for layer in graph.layers]
    for name in kept:
        assert kept[name] is kept[name]
        assert spilled[name] is not spilled[name]
        same(kept[name], spilled[name])


def test_only_what_fits_is_kept(built: Built, graph: LayerGraph) -> None:
    folder = built.run / "candidates"
    first, last = graph.layers[0].name, graph.layers[-1].name
    everything = StoredCandidates.of(folder, graph)
    size = (folder / "00000.safetensors").stat().st_size + everything[first].weight.nbytes
    one = StoredCandidates.of(folder, graph, limit=size)
    assert one[first] is one[first]
    assert one[last] is not one[last]
    same(one[last], everything[last])


def test_a_build_that_keeps_no_candidates_ends_with_the_same_bytes(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate_store, "HELD_BYTES", 0)
    again = build(recipe_for(save_denoiser(tmp_path)), tmp_path / "run", last="quantize")
    outputs = [
        {
            name: content
            for name, content in stage_bytes(run, STAGES).items()
            if not name.endswith("stage.json")
        }
        for run in (built.run, again.run)
    ]
    assert outputs[0] == outputs[1]


def test_kept_values_stay_below_the_limit(graph: LayerGraph) -> None:
    made: list[str] = []

    def make(layer: object) -> bytes:
        made.append(layer.name)  # type: ignore[attr-defined]
        return bytes(10)

    kept = Kept(make, len, 10 * 2)
    for _ in range(2):
        for layer in graph.layers[:3]:
            assert kept[layer] == bytes(10)
    names = [layer.name for layer in graph.layers[:3]]
    assert made == [*names, names[2]]
