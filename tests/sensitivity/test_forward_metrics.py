"""The metrics of ONNX Runtime: local error against NumPy by hand, exhaustive against torch, gain against exhaustive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from scipy.stats import spearmanr

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.recipe import MeasureSettings
from mpq_deploy.sensitivity import measure as measure_module
from mpq_deploy.sensitivity.exhaustive import _chained_uses, measure_exhaustive
from mpq_deploy.sensitivity.gain import measure_gain, propagation_gains
from mpq_deploy.sensitivity.layer_weights import float_matrix, form_stack
from mpq_deploy.sensitivity.local_error import local_errors, measure_local_error
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.methods import METHODS
from mpq_deploy.sensitivity.ort_graph import noisy_graph
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.progress import Talk
from tests.calls.sets import samples_of
from tests.graphs import GraphBuilder, denoiser_graph
from tests.sensitivity.cases import NAMES, Rounded, Setting, moved_scale, setting
from tests.sensitivity.kinds import kinds, linear

OPTIONS = MeasureSettings(calls=3, probes=4)


@pytest.fixture(scope="module")
def mixed() -> Setting:
    return setting(kinds(), (4, 7, 6))


@pytest.fixture(scope="module")
def denoiser() -> Setting:
    return setting(denoiser_graph(channels=16, size=8), (3, 8, 8), steps=2, calls=4)


class Remarks(Talk):
    """Keeps what is said and how far the bars got."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.bars: dict[str, list[int]] = {}

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Any]:
        counts = self.bars[what] = [total, 0]

        def advance(steps: int) -> None:
            counts[1] += steps

        yield advance


def test_gemm_local_error_by_hand() -> None:
    case = setting(linear(), (12,), calls=3)
    table = measure_local_error(Subject(*case, OPTIONS, Talk()))
    weight = case.candidates["first"].weight
    bias = next(
        numpy_helper.to_array(w) for w in case.model.graph.initializer if w.name == "first.bias"
    )
    x = samples_of(case.calibration)[1]
    stats = case.stats.activations["sample"]
    for scheme in NAMES:
        kind = SCHEMES[scheme]
        grid = (kind if kind.activation else SCHEMES["w8a8"]).input_grid(stats)
        factors = stats.factors[0].astype(np.float32) if "+scale" in scheme else np.float32(1)
        scale = moved_scale(kind, grid.scale, 1, x * factors, (-1,))
        rounded = (
            np.clip(np.rint(x * factors / scale), grid.quant_min, grid.quant_max) * scale / factors
        )
        assert (
            not kind.simulated or kind.activation is None or grid.quant_max - grid.quant_min == 127
        )
        kept = stats.outliers[:1] if "+cols" in scheme else []
        rounded[:, kept] = x[:, kept]
        quantized = case.candidates["first"].weight_matrix(kind.weight_form)
        error = (rounded if kind.activation else x) @ quantized.T - x @ weight.T
        expected = np.sum(error**2) / np.sum((x @ weight.T + bias) ** 2)
        assert table.losses_by_timestep["first"][scheme][1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_exhaustive_is_the_same_in_torch_and_in_onnxruntime(
    mixed: Setting, batch_size: int
) -> None:
    pytest.importorskip("torch")
    options = MeasureSettings(calls=3, batch_size=batch_size)
    one = measure_exhaustive(Subject(*mixed, options, Talk()), use_torch=True)
    two = measure_exhaustive(Subject(*mixed, options, Talk()), use_torch=False)
    for layer, row in one.losses.items():
        # One use of to_k's weight feeds the other's neighbour, not the other: injection is exact for it as well.
        for scheme, loss in row.items():
            assert two.losses[layer][scheme] == pytest.approx(loss, rel=2e-2, abs=1e-12), (
                layer,
                scheme,
            )


def test_exhaustive_of_chosen_pairs_measures_only_those(mixed: Setting) -> None:
    remarks = Remarks()
    table = measure_exhaustive(
        Subject(*mixed, OPTIONS, remarks), pairs={("to_q", "w8a8"), ("conv_in", "fp16")}
    )
    assert {layer: set(row) for layer, row in table.losses.items()} == {
        "to_q": {"w8a8"},
        "conv_in": {"fp16"},
    }
    total, done = remarks.bars["single layers"]
    assert total == done == 2 * 2 * 3


def test_exhaustive_says_where_uses_feed_one_another() -> None:
    g = GraphBuilder(seed=4)
    g.input("sample", ["N", 8])
    g.input("timestep", ["N"])
    x = g.op("Tanh", [g.matmul("sample", "again", 8, 8)], "tanh")
    g.op("MatMul", [x, "again.weight"], "last")
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 8])
    table = measure_exhaustive(Subject(*setting(g, (8,)), OPTIONS, Talk()), use_torch=False)
    assert len(table.notes) == 1 and "'again'" in table.notes[0]


def test_gain_predicts_weight_errors(denoiser: Setting) -> None:
    options = MeasureSettings(calls=4)
    gained = measure_gain(Subject(*denoiser, options, Talk()))
    truth = measure_exhaustive(Subject(*denoiser, options, Talk()))
    for scheme in ("w8a16", "w4a16-b32"):
        a = np.array([gained.losses[n.name][scheme] for n in denoiser.graph.layers])
        b = np.array([truth.losses[n.name][scheme] for n in denoiser.graph.layers])
        assert spearmanr(a, b)[0] > 0.8
        assert 1 / 3 < a.sum() / b.sum() < 3


def test_gain_of_the_last_layer_is_one(denoiser: Setting) -> None:
    """Noise of relative size eps on the output itself changes it by eps^2."""
    subject = Subject(*denoiser, MeasureSettings(calls=4), Talk())
    calls = subject.calls()
    gains = propagation_gains(subject, local_errors(subject, calls), calls)
    assert gains["conv_out"] == pytest.approx(np.ones(2), rel=0.15)


def test_noise_enters_where_it_is_put(mixed: Setting) -> None:
    values = mixed.values(0, ["strided_out", "out_sample"])
    layers = mixed.graph.layers
    outputs = [use.output for n in layers for use in n.uses]
    ranks = {name: value.ndim for name, value in mixed.values(0, outputs).items()}
    with noisy_graph(mixed.graph, layers, "out_sample", ranks, Talk()) as noisy:
        feeds = mixed.feeds(0)
        np.testing.assert_allclose(noisy.run(feeds), values["out_sample"], rtol=1e-4, atol=1e-5)
        moved = noisy.run(feeds, {"out_sample": np.full_like(values["out_sample"], 0.25)})
        np.testing.assert_allclose(moved, values["out_sample"] + 0.25, rtol=1e-4, atol=1e-5)
        assert not np.allclose(
            noisy.run(feeds, {"strided_out": np.ones_like(values["strided_out"])}),
            values["out_sample"],
        )


@pytest.mark.parametrize("method", ["gain", "local_error"])
def test_no_torch_is_needed_and_nothing_is_random(mixed: Setting, method: str) -> None:
    one, two = (measure(method, Subject(*mixed, OPTIONS, Talk())) for _ in range(2))
    assert one.metric == method
    assert one.losses == two.losses
    assert one.projections is None
    assert one.plan_loss({"to_q": "w8a8", "conv_in": "fp16"}) == pytest.approx(
        one.losses["to_q"]["w8a8"] + one.losses["conv_in"]["fp16"]
    )


def test_a_scalar_timestep_is_measured_too() -> None:
    g = GraphBuilder(seed=5)
    g.input("sample", ["N", 3, 5, 5])
    g.input("timestep", [])
    row = g.op("Reshape", ["timestep", g.weight("one_by_one", [1, 1])], "row")
    row = g.op("Sin", [g.op("Mul", [row, g.random("frequency", 1, 6, scale=0.01)], "angle")], "sin")
    shift = g.op("Unsqueeze", [g.gemm(row, "time", 4, 6), g.weight("axes23", [2, 3])], "shift")
    x = g.op("Tanh", [g.op("Add", [g.conv("sample", "conv_in", 4, 3), shift], "add")], "tanh")
    g.conv(x, "conv_out", 3, 4)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 3, 5, 5])
    case = setting(g, (3, 5, 5), calls=4, batched_time=False)
    options = MeasureSettings(calls=4)
    gained, truth = (
        measure_gain(Subject(*case, options, Talk())),
        measure_exhaustive(Subject(*case, options, Talk()), use_torch=False),
    )
    assert 0.1 < gained.losses["time"]["w4a16-b32"] / truth.losses["time"]["w4a16-b32"] < 10


def test_gain_of_layers_whose_batch_is_not_their_first_axis() -> None:
    """Tokens first, as torch's transformers have them: noise has the shape of the output for any batch."""
    g = GraphBuilder(seed=5)
    g.input("sample", ["N", 6, 8])
    g.input("timestep", ["N"])
    x = g.op("Transpose", ["sample"], "tokens_first", perm=[1, 0, 2])
    x = g.op("Tanh", [g.matmul(x, "first", 8, 8)], "tanh")
    g.op("Transpose", [g.matmul(x, "last", 8, 8)], "batch_first", perm=[1, 0, 2])
    g.nodes[-1].output[0] = g.output("out_sample", ["N", 6, 8])
    case, options = setting(g, (6, 8), calls=4), MeasureSettings(calls=4)
    subject = Subject(*case, options, Talk())
    gained, truth = measure_gain(subject), measure_exhaustive(subject, use_torch=False)
    for layer in ("first", "last"):
        loss = gained.losses[layer]["w4a16-b32"]
        assert loss == pytest.approx(truth.losses[layer]["w4a16-b32"], rel=0.5)


def test_probe_falls_back_without_torch(mixed: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module.importlib.util, "find_spec", lambda name: None)
    remarks = Remarks()
    table = measure("probe", Subject(*mixed, OPTIONS, remarks))
    assert table.metric == "gain"
    assert "torch is not installed" in table.notes[-1]
    assert remarks.warnings == [table.notes[-1]]


def test_probe_falls_back_on_an_unknown_operator() -> None:
    pytest.importorskip("torch")
    g = GraphBuilder(seed=6)
    g.input("sample", ["N", 8])
    g.input("timestep", ["N"])
    x = g.op("LpNormalization", [g.gemm("sample", "first", 8, 8)], "odd", axis=1)
    g.gemm(x, "second", 8, 8)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 8])
    table = measure("probe", Subject(*setting(g, (8,)), OPTIONS, Talk()))
    assert table.metric == "gain"
    assert "LpNormalization" in table.notes[-1] and "'odd'" in table.notes[-1]


@pytest.fixture
def no_gemm_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows Gemm, and fails on every one."""
    pytest.importorskip("torch")
    from mpq_deploy.onnx_torch import operators

    def fail(call: Any, inputs: Any) -> Any:
        raise TypeError('reshape() missing 1 required positional arguments: "shape"')

    monkeypatch.setitem(operators.OPERATORS, "Gemm", fail)


@pytest.mark.usefixtures("no_gemm_in_torch")
def test_probe_falls_back_where_torch_fails_on_an_operator(mixed: Setting) -> None:
    remarks = Remarks()
    table = measure("probe", Subject(*mixed, OPTIONS, remarks))
    assert table.metric == "gain"
    assert "(Gemm) failed in torch: reshape() missing" in table.notes[-1]
    assert remarks.warnings == [table.notes[-1]]


@pytest.mark.usefixtures("no_gemm_in_torch")
def test_exhaustive_goes_to_onnxruntime_where_torch_fails(mixed: Setting) -> None:
    from mpq_deploy.onnx_torch.torch_graph import FailedOperator

    remarks = Remarks()
    found = measure_exhaustive(Subject(*mixed, OPTIONS, remarks))
    wanted = measure_exhaustive(Subject(*mixed, OPTIONS, Talk()), use_torch=False)
    assert found.losses == wanted.losses
    assert "failed in torch" in remarks.warnings[0]
    with pytest.raises(FailedOperator):
        measure_exhaustive(Subject(*mixed, OPTIONS, Talk()), use_torch=True)


def test_an_unknown_method_names_the_nearest(mixed: Setting) -> None:
    with pytest.raises(UsageError) as caught:
        measure("local-error", Subject(*mixed, OPTIONS, Talk()))
    assert "local_error" in caught.value.hint
    assert all(name in caught.value.hint for name in METHODS)


def test_progress_reaches_its_end(mixed: Setting) -> None:
    # Kurtosis and the controls of orm run nothing.
    for method in set(METHODS) - {"kurtosis", "size-only", "random"}:
        if method == "probe":
            pytest.importorskip("torch")
        remarks = Remarks()
        measure(method, Subject(*mixed, OPTIONS, remarks))
        assert remarks.bars and all(total == done for total, done in remarks.bars.values()), method


def test_tables_are_saved_and_loaded(mixed: Setting, tmp_path: Any) -> None:
    for method in ("local_error", "probe"):
        if method == "probe":
            pytest.importorskip("torch")
        table = measure(method, Subject(*mixed, OPTIONS, Talk()))
        table.save(tmp_path)
        loaded = SensitivityTable.load(tmp_path)
        assert loaded.losses == table.losses
        assert loaded.notes == table.notes
        plan = {"to_q": "w8a8", "to_k": "w4a16-b32"}
        assert loaded.plan_loss(plan) == table.plan_loss(plan)


def test_candidates_of_another_graph_are_refused(mixed: Setting) -> None:
    stranger = {**mixed.candidates, "nowhere": mixed.candidates["to_q"]}
    graph, _, *rest = mixed
    with pytest.raises(ModelError, match="nowhere"):
        measure("local_error", Subject(graph, stranger, *rest, OPTIONS, Talk()))


def test_missing_conditions_are_named(mixed: Setting) -> None:
    graph, candidates, stats, calibration, spec = mixed
    wanted = spec.model_copy(
        update={"conditions": (spec.timestep.model_copy(update={"name": "prompt"}),)}
    )
    with pytest.raises(ModelError, match="prompt"):
        measure(
            "gain",
            Subject(graph, candidates, stats, calibration, wanted, OPTIONS, Talk()),
        )


def test_stacks_hold_each_form_once() -> None:
    graph = layer_graph(ir.from_proto(linear().model()))
    layer = graph.layers[0]
    weight = float_matrix(graph, layer)
    names = ("fp16", "w8a8", "w8a16", "w4a16-b32", "w4a8-b32")
    candidate = Rounded(layer, tuple(SCHEMES[n] for n in names), weight)
    stack = form_stack(weight, candidate)
    assert len(stack.differences) == 4  # int8 serves w8a8 and w8a16
    assert stack.rows["w8a16"] == stack.rows["w8a8"]
    assert (stack.inputs["w8a16"], stack.inputs["w8a8"]) == (None, "")
    for name in names:
        row = stack.rows[name]
        np.testing.assert_allclose(
            stack.differences[row],
            candidate.weight_matrix(SCHEMES[name].weight_form) - weight,
            atol=1e-7,
        )


@pytest.mark.parametrize(("second", "fed"), [("between", True), ("x", False)])
def test_uses_of_a_layer_that_feed_one_another_are_named(second: str, fed: bool) -> None:
    """Through other nodes; uses side by side are none."""
    graph = GraphBuilder()
    x, weight = graph.input("x", ["batch", 4]), graph.random("shared.weight", 4, 4)
    first = graph.op("Relu", [graph.op("MatMul", [x, weight], "first")], "between")
    other = graph.op("MatMul", [first if second == "between" else x, weight], "second")
    graph.op("Add", [first, other], "sum")
    graph.nodes[-1].output[0] = graph.output("out", ["batch", 4])
    layers = layer_graph(ir.from_proto(graph.model()))
    assert [len(layer.uses) for layer in layers.layers] == [2]
    assert bool(_chained_uses(layers, layers.layers)) == fed
