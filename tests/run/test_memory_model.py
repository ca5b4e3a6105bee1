"""The memory estimates: what they count, how they grow, and when a stage is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.recipe import make_recipe
from mpq_deploy.rounding.quantizers import TOGETHER_BYTES, rounding_bytes
from mpq_deploy.run.memory_model import (
    ModelSize,
    Patches,
    candidates_worker_bytes,
    estimate_engine,
    estimate_onnx_export,
    estimate_stage,
    estimate_torch_export,
    hessian_bytes,
    model_size,
    salience_worker_bytes,
    source_size,
)
from mpq_deploy.system.memory import Room
from tests.pipeline.runs import save_denoiser

STAGES = ("calibrate", "candidates", "measure", "allocate", "quantize")
# With one call at a time: larger values make the probes take fewer calls at once, and that may be less in all.
RECIPE = make_recipe({"measure": {"batch_size": 1}})
GB = 10**9
SMALL = ModelSize(
    weights=GB // 10, largest=10**6, values=GB // 10, alive=GB // 100, outputs=GB // 50
)


@pytest.mark.parametrize("stage", STAGES)
def test_more_of_anything_never_takes_less(stage: str) -> None:
    before = estimate_stage(stage, SMALL, RECIPE, 4).total
    for field in ("largest", "values", "alive", "outputs"):
        assert (
            estimate_stage(
                stage, replace(SMALL, **{field: 4 * getattr(SMALL, field)}), RECIPE, 4
            ).total
            >= before
        )
    assert (
        estimate_stage(stage, replace(SMALL, weights=4 * SMALL.weights), RECIPE, 4).total > before
    )


# Without the order of salient channels, which takes torch.
UNORDERED = {"quantize": {"salience": "kurtosis"}}


def test_every_worker_that_rounds_takes_its_own() -> None:
    wide, recipe = (
        replace(SMALL, patches=(Patches(1, 2048, 1024),), nodes=500),
        make_recipe(UNORDERED),
    )
    each = candidates_worker_bytes(wide, recipe, 4)
    alone, two, four = (estimate_stage("candidates", wide, recipe, 4, n) for n in (0, 2, 4))
    assert alone.total < two.total < four.total
    assert 0.9 * 2 * each < four.total - two.total <= 2 * each
    # Sessions share what they have mapped of large weights.
    large = replace(wide, weights=4 * GB)
    two, four = (estimate_stage("candidates", large, recipe, 4, n) for n in (2, 4))
    assert two.weights == four.weights == large.weights
    ordered = [estimate_stage("candidates", wide, RECIPE, 4, n).total for n in (2, 4)]
    torch = 400 << 20
    assert 0.8 * (salience_worker_bytes(wide) + torch) < (ordered[1] - ordered[0]) / 2
    assert (ordered[1] - ordered[0]) / 2 <= salience_worker_bytes(wide) + torch
    nearest = make_recipe({"quantize": {"rounding": "nearest"}})
    assert candidates_worker_bytes(wide, nearest, 4) < each


def test_layers_side_by_side_count_up_to_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def total(largest: int, threads: int) -> int:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(threads))
        size = replace(SMALL, weights=largest, largest=largest, nodes=1)
        recipe = make_recipe({"quantize": {"rounding": "nearest", "salience": "kurtosis"}})
        return estimate_stage("candidates", size, recipe, 4).work

    small, large = 10**6, 10**8
    assert total(small, 1) == rounding_bytes(small, 0, 4, gptq=False)
    assert total(small, 3) == 3 * total(small, 1)
    assert total(large, 1) > TOGETHER_BYTES and total(large, 3) == total(large, 1)
    assert total(3 * 10**7, 4) == TOGETHER_BYTES


@pytest.mark.parametrize("stage", ("calibrate", "measure"))
def test_large_weights_count_once(stage: str) -> None:
    one, two = (
        estimate_stage(stage, replace(SMALL, weights=n * 10 * GB), RECIPE, 4).total for n in (1, 2)
    )
    assert two - one == 10 * GB


# Stable Diffusion 1.5's UNet at a latent of 32 x 32, and the peaks of its stages in docs/results/scale.md.
LARGE = ModelSize(3_438_085_324, 29_491_200, 1_129_085_128, 26_219_520, 242_495_744)
PEAKS = {"calibrate": 3.83, "candidates": 1.00, "measure": 6.70, "allocate": 3.86, "quantize": 1.30}
MEASURED = {
    "calibrate": {"batch_size": 1},
    "measure": {"probes": 4, "calls": 1, "batch_size": 2},
    "quantize": {"rounding": "nearest"},
    "allocate": {"branches": []},
}


@pytest.mark.parametrize("stage", STAGES)
def test_estimates_lie_within_a_quarter_of_measured_peaks(stage: str) -> None:
    estimate = estimate_stage(stage, LARGE, make_recipe(MEASURED), 4).total / GB
    assert 0.75 * PEAKS[stage] < estimate < 1.25 * PEAKS[stage]


def test_batches_count() -> None:
    calibrated = [
        estimate_stage("calibrate", SMALL, make_recipe({"calibrate": {"batch_size": n}}), 4)
        for n in (2, 4)
    ]
    assert calibrated[1].values == pytest.approx(2 * calibrated[0].values, rel=1e-6)


def test_the_export_and_the_engine_of_large_models() -> None:
    export = estimate_torch_export(LARGE.weights, 686).total / GB
    assert 0.75 * 5.64 < export < 1.25 * 5.64
    engine = estimate_engine(518 * 10**6, 2443).total / GB
    assert 0.75 * 2.71 < engine < 1.25 * 2.71


def test_a_stage_that_does_not_fit_is_refused_with_its_figures() -> None:
    estimate = estimate_stage("measure", SMALL, RECIPE, 4)
    estimate.refuse_too_large(None, "")
    estimate.refuse_too_large(Room(estimate.total, "it"), "")
    with pytest.raises(
        UsageError, match=r"'measure' would need about \d\.\d GB .* and the box has 0\.3 GB"
    ) as caught:
        estimate.refuse_too_large(Room(3 * GB // 10, "the box"), "Lower something.")
    assert caught.value.hint == "Lower something."


def test_what_the_process_holds_already_is_not_needed_again() -> None:
    estimate = estimate_stage("measure", SMALL, RECIPE, 4)
    left = Room(estimate.total - estimate.code, "it")
    estimate.refuse_too_large(left, "", held=estimate.code)
    estimate.refuse_too_large(left, "", held=100 * GB)
    # Memory of other stages is no help: it need not be given back.
    with pytest.raises(UsageError):
        estimate.refuse_too_large(replace(left, bytes=left.bytes - 1), "", held=100 * GB)


def test_hessians_stay_within_their_cap_and_grow_up_to_it() -> None:
    def held(columns: int, cap: int) -> int:
        patches = (Patches(group=1, columns=columns, rows=1024),)
        recipe = make_recipe({"quantize": {"memory_mb": cap, "hessian_width": 8192}})
        return sum(hessian_bytes(replace(SMALL, patches=patches), recipe))

    assert held(256, 512) < held(512, 512) <= 512 << 20
    # Blocks are narrowed until they fit.
    assert 48 << 20 < held(8192, 64) <= 64 << 20
    assert 256 << 20 < held(8192, 512) <= 512 << 20


def test_long_attention_counts(tmp_path: Path) -> None:
    """The scores [heads, tokens, tokens], whose shape is computed in the graph, are most of what lives at once."""
    tokens, width = 64, 8
    nodes = [
        make_node("MatMul", ["x", "w"], ["q"], name="q"),
        make_node("Shape", ["q"], ["size"], name="size"),
        make_node("Reshape", ["x", "size"], ["k"], name="k"),
        make_node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        make_node("MatMul", ["q", "kt"], ["scores"], name="scores"),
        make_node("Softmax", ["scores"], ["p"], name="p"),
        make_node("MatMul", ["p", "x"], ["y"], name="y"),
    ]
    inputs = [make_tensor_value_info("x", TensorProto.FLOAT, ["n", tokens, width])]
    outputs = [make_tensor_value_info("y", TensorProto.FLOAT, ["n", None, None])]
    weight = from_array(np.ones((width, width), np.float32), "w")
    model = make_model(
        make_graph(nodes, "g", inputs, outputs, [weight]), opset_imports=[make_opsetid("", 20)]
    )
    onnx.save(model, tmp_path / "m.onnx")
    size = model_size(
        tmp_path / "m.onnx", layer_graph(load_model(tmp_path / "m.onnx")), {"x": (1, tokens, width)}
    )
    scores, small = 4 * tokens * tokens, 4 * tokens * width
    # Softmax writes over the scores; the input's copy, q and the transposed keys may live beside them.
    assert scores <= size.alive <= scores + 4 * small
    # Torch makes no scores.
    assert size.values <= 4 * small + 100
    assert size.patches == (Patches(1, width, tokens),)


def test_tensors_are_counted_from_headers(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {
        "a": np.zeros((3, 5), np.float16),
        "b": np.zeros(7, np.float32),
        "c": np.zeros((), np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert source_size([tmp_path / "model.safetensors"]) == (4 * (15 + 7 + 1), 3)
    assert source_size([]) == (0, 0)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 5000, b"\x00\x20" + bytes(6) + b'{"a": {"dtype": "F16"']
)
def test_a_damaged_file_of_weights_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read") as caught:
        source_size([tmp_path / "model.safetensors"])
    assert "\n" not in caught.value.message and "damaged" in caught.value.hint


def test_constants_and_values_are_those_of_the_graph(tmp_path: Path) -> None:
    path = save_denoiser(tmp_path)
    size = model_size(
        path, layer_graph(load_model(path)), {"sample": (1, 3, 8, 8), "timestep": (1,)}
    )
    one = 4 * 16 * 8 * 8  # channels x side x side
    assert size.weights == sum(
        value.const_value.nbytes  # type: ignore[union-attr]
        for value in load_model(path).graph.initializers.values()
    )
    assert one <= size.alive <= size.values
    assert size.outputs <= size.values
    assert size.nodes == len(onnx.load(path).graph.node)
    export = estimate_onnx_export(path, {"sample": (1, 3, 8, 8), "timestep": (1,)})
    # The file's session and the export's, and a batch of two calls.
    assert export.weights >= 2 * size.weights and export.values >= 2 * size.alive
