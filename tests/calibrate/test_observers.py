"""Observers against NumPy over the whole activations, and merging in any order."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.calibrate import activation_shapes as shapes_module
from mpq_deploy.calibrate.activation_shapes import ActivationShape, activation_shapes
from mpq_deploy.calibrate.calibrate import summarise, timestep_values, weight_ranges
from mpq_deploy.calibrate.observers import Observation, merge, observe
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.recipe import CalibrateSettings
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session
from tests.calibrate.conftest import Case, case, denoiser_case, end, with_timestep
from tests.calls.sets import samples_of
from tests.graphs import GraphBuilder

OPTIONS = CalibrateSettings(batch_size=2, reservoir=256)


def seen(given_case: Case, options: CalibrateSettings = OPTIONS, **part) -> Observation:
    calls = calls_of(given_case)
    return observe(
        given_case.graph, calls, options, Talk(), chosen=calls.batches(options.batch_size, **part)
    )


def calls_of(given_case: Case) -> RecordedCalls:
    return RecordedCalls(given_case.recorded, given_case.spec)


def check_against_numpy(case_: Case) -> None:
    observed, graph = seen(case_), case_.graph
    stats = summarise(observed, weight_ranges(graph), OPTIONS, timestep_values(calls_of(case_)))
    values = case_.activations(list(graph.activations))
    convolved = {use.input for layer in graph.layers if layer.op == "Conv" for use in layer.uses}
    for number, name in enumerate(observed.names):
        axis = 1 if name in convolved else -1
        whole = np.stack([np.stack(step) for step in values[name]]).astype(np.float64)
        flat = np.moveaxis(whole, 2 + axis if axis == 1 else -1, 0)
        flat = flat.reshape(len(flat), -1)
        one = stats.activations[name]
        np.testing.assert_allclose(
            one.amax, np.abs(flat).max(axis=1), rtol=2e-5, atol=1e-6, err_msg=name
        )
        np.testing.assert_allclose(
            one.second_moment, np.mean(flat**2, axis=1), rtol=1e-4, atol=1e-9
        )
        np.testing.assert_allclose(
            one.fourth_moment, np.mean(flat**4, axis=1), rtol=1e-4, atol=1e-9
        )
        per_step = np.abs(flat.reshape(len(flat), len(whole), -1)).max(axis=2).T
        np.testing.assert_allclose(one.amax_by_timestep, per_step, rtol=2e-5, atol=1e-6)
        assert sorted(one.exponents) == list(range(len(one.factors)))
        assert one.timesteps.tolist() == case_.recorded.timesteps.tolist()
        assert observed.counts[number] == flat.shape[1]
        # Each sampled value is one of the tensor's.
        ordered = np.sort(whole.ravel())
        place = np.clip(np.searchsorted(ordered, one.reservoir), 1, ordered.size - 1)
        gap = np.minimum(
            abs(ordered[place] - one.reservoir), abs(ordered[place - 1] - one.reservoir)
        )
        assert gap.max() <= 1e-4 * max(1.0, np.abs(ordered).max()), name
        assert len(one.reservoir) == OPTIONS.reservoir
        # And of the channel that it is said to come from.
        for channel, row in enumerate(flat):
            drawn = one.reservoir[observed.channels[number] == channel]
            nearest = np.abs(drawn[:, None] - row).min(axis=1) if len(drawn) else np.zeros(1)
            assert nearest.max() <= 1e-4 * max(1.0, np.abs(ordered).max()), (name, channel)


def test_every_activation_of_a_denoiser() -> None:
    check_against_numpy(denoiser_case())


def test_batch_axis_need_not_be_the_first_and_frames_may_be_folded_in() -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 4, 6, 8])
    x = with_timestep(g, "sample", 4)
    moved = g.op("Transpose", [x], "moved", perm=[2, 0, 1, 3])
    end(g, g.matmul(moved, "moved.product", 8, 8))
    frames = g.op("Reshape", [x, g.weight("frames", np.array([-1, 2, 6, 8]))], "fold")
    end(g, g.conv(frames, "folded.conv", 4, 2))
    check_against_numpy(case(g, (4, 6, 8)))


def test_a_tensor_that_is_the_same_for_all_calls_counts_for_each() -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 4, 6, 6])
    g.input("timestep", [])
    scaled = g.op(
        "Mul",
        [g.weight("f", np.linspace(0.001, 0.01, 8, dtype=np.float32)[None]), "timestep"],
        "angle",
    )
    shift = g.gemm(g.op("Sin", [scaled], "sin"), "time.proj", 4, 8)
    axes = g.weight("axes23", np.array([2, 3], np.int64))
    end(
        g,
        g.conv(g.op("Add", ["sample", g.op("Unsqueeze", [shift, axes], "u")], "add"), "conv", 4, 4),
    )
    check_against_numpy(case(g, (4, 6, 6), batched=False))


def test_a_channel_that_stretches_the_range_is_found_and_the_scale_without_it_is_that_of_the_others() -> (
    None
):
    g = GraphBuilder()
    g.input("sample", ["N", 64, 4, 4])
    g.input("timestep", ["N"])
    end(g, g.conv("sample", "conv", 4, 64))
    stretched = case(g, (64, 4, 4), timesteps=2, calls=16)
    samples_of(stretched.recorded)[:, :, 5] *= 40
    samples_of(stretched.recorded)[0, 3, 9] *= 30  # now and then counts as well
    options = CalibrateSettings(batch_size=8, reservoir=2048)
    one = summarise(seen(stretched, options), {}, options, np.empty(0)).activations["sample"]
    assert set(one.outliers[:2]) == {5, 9}
    samples_of(stretched.recorded)[:, :, [5, 9]] = 0
    rest = summarise(seen(stretched, options), {}, options, np.empty(0)).activations["sample"]
    # The zeros that now stand in the two channels cost no rounding error, so the best scale is the same.
    without = SCHEMES["w8a8+cols1"]
    assert without.input_grid(one).scale == pytest.approx(rest.scale, rel=0.15)
    assert without.input_grid(one).scale < one.scale / 2
    np.testing.assert_array_equal(without.branch.left_out(one), [5, 9])


def same(a: Observation, b: Observation) -> None:
    """Equal, sums up to float64 rounding."""
    for field in (
        "amax",
        "counts",
        "amax_by_timestep",
        "priorities",
        "values",
        "channels",
        "offsets",
    ):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    for field in ("square_sum", "fourth_sum"):
        np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=1e-12)


@pytest.fixture(scope="module")
def shards() -> list[Observation]:
    """One observation per timestep and call of a denoiser."""
    small = denoiser_case()
    steps, calls = len(small.recorded.timesteps), len(small.recorded.rows)
    parts = [(k, n) for k in range(steps) for n in range(calls)]
    return [seen(small, steps=range(k, k + 1), calls=range(n, n + 1)) for k, n in parts]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_order_and_any_tree_of_merges_agree(
    shards: list[Observation], data: st.DataObject
) -> None:
    straight = reduce(merge, shards)
    heap = [shards[i] for i in data.draw(st.permutations(range(len(shards))))]
    while len(heap) > 1:
        a = heap.pop(data.draw(st.integers(0, len(heap) - 1)))
        b = heap.pop(data.draw(st.integers(0, len(heap) - 1)))
        heap.append(merge(a, b))
    same(straight, heap[0])


def test_shards_agree_with_one_run_at_another_batch_size(shards: list[Observation]) -> None:
    whole, merged = seen(denoiser_case()), reduce(merge, shards)
    np.testing.assert_array_equal(whole.priorities, merged.priorities)
    # The runtime's kernels may round differently in other batches, nothing more.
    np.testing.assert_allclose(whole.values, merged.values, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(whole.square_sum, merged.square_sum, rtol=1e-4)
    np.testing.assert_array_equal(whole.counts, merged.counts)


def test_other_graphs_do_not_merge(shards: list[Observation]) -> None:
    other = seen(denoiser_case(), CalibrateSettings(batch_size=8, reservoir=512))
    with pytest.raises(ValueError, match="reservoir"):
        merge(shards[0], other)


def test_the_reservoir_is_uniform_over_calls_and_positions() -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 4, 8, 8])
    g.input("timestep", ["N"])
    end(g, g.conv("sample", "conv", 4, 4))
    ramp = case(g, (4, 8, 8), timesteps=2, calls=32)
    # Every value names its own place.
    samples_of(ramp.recorded)[:] = np.arange(
        samples_of(ramp.recorded).size, dtype=np.float32
    ).reshape(samples_of(ramp.recorded).shape)
    drawn = seen(ramp, CalibrateSettings(batch_size=8, reservoir=4096)).values[0]
    counts = np.histogram(drawn, bins=64, range=(0, samples_of(ramp.recorded).size))[0]
    # 64 cells of 64 expected: chi-square with 63 degrees of freedom, far below its 99.99 % point of 113.
    assert len(drawn) == 4096 and np.square(counts - 64).sum() / 64 < 113


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_names_tensor_layer_and_timestep(bad: float) -> None:
    broken = denoiser_case()
    samples_of(broken.recorded)[1, 3, 0, 2, 2] = bad
    with pytest.raises(ModelError, match=r"'sample'.*'conv_in'.*not finite.*timestep 460"):
        seen(broken)


def test_old_opset_is_refused() -> None:
    proto = denoiser_case().proto
    model = ir.from_proto(proto)
    model.graph.opset_imports[""] = 13
    small = denoiser_case()
    with pytest.raises(ModelError, match="opset 13"):
        observe(layer_graph(model), calls_of(small), OPTIONS, Talk())


def test_observing_leaves_the_graph_as_it_was() -> None:
    small = denoiser_case()
    graph = small.graph
    before = ir.to_proto(graph.model).SerializeToString(deterministic=True)
    observe(graph, calls_of(small), OPTIONS, Talk())
    assert ir.to_proto(graph.model).SerializeToString(deterministic=True) == before


def test_external_weights_are_mapped_where_they_lie(tmp_path: Path) -> None:
    small = denoiser_case()
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.onnx"
    ir.save(ir.from_proto(small.proto), path, external_data="model.onnx.data")
    data = path.with_name("model.onnx.data")
    graph = layer_graph(load_model(path))
    lines: list[str] = []

    class Listening(Talk):
        def line(self, text: str) -> None:
            lines.append(text)

    with open_session(graph.model.clone(), Listening(), scratch=tmp_path):
        assert data.stat().st_nlink == 1
        assert not [one for one in tmp_path.rglob("*") if one.is_symlink()]
    assert lines == []
    external = observe(graph, calls_of(small), OPTIONS, Talk(), scratch=tmp_path)
    inline = seen(small)
    np.testing.assert_allclose(external.square_sum, inline.square_sum, rtol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def two_convs() -> Case:
    """A graph whose shapes are all declared."""
    g = GraphBuilder()
    g.input("sample", ["N", 4, 6, 6])
    x = g.op("Relu", [g.conv(with_timestep(g, "sample", 4), "one", 8, 4, strides=[2, 2])], "relu")
    end(g, g.conv(x, "two", 4, 8))
    return case(g, (4, 6, 6))


def test_shapes_are_the_same_whether_declared_inferred_or_found_by_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared, bare = two_convs(), two_convs()
    del bare.proto.graph.value_info[:]
    runs: list[object] = []
    real = shapes_module.open_session
    monkeypatch.setattr(
        shapes_module, "open_session", lambda *a, **k: (runs.append(a), real(*a, **k))[1]
    )
    found = [activation_shapes(c.graph, calls_of(c), Talk()) for c in (declared, bare)]
    assert not runs
    monkeypatch.setattr(shapes_module, "inferred_shapes", lambda *_: {})
    found.append(activation_shapes(bare.graph, calls_of(bare), Talk()))
    assert len(runs) == 1
    expected = {
        "with_t_out": ActivationShape((1, 4, 6, 6), 0),
        "relu_out": ActivationShape((1, 8, 3, 3), 0),
    }
    assert found == [expected] * 3


def test_a_wrongly_declared_shape_is_an_error() -> None:
    small = two_convs()
    graph = small.graph
    shapes = activation_shapes(graph, calls_of(small), Talk())
    wrong = ActivationShape((1, 8, 3, 1), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mpq_deploy.calibrate.observers.activation_shapes",
            lambda *_, **__: shapes | {"relu_out": wrong},
        )
        with pytest.raises(ModelError, match="'relu_out' is not of the shape"):
            observe(graph, calls_of(small), OPTIONS, Talk())
