"""Adjoint probes against brute force, against the exhaustive ground truth, and where the answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper
from scipy.stats import spearmanr

torch = pytest.importorskip("torch")

from mpq_deploy.errors import ModelError, UsageError  # noqa: E402
from mpq_deploy.onnx_torch.adjoint import gradient_bytes, parts_within  # noqa: E402
from mpq_deploy.onnx_torch.torch_graph import TorchGraph  # noqa: E402
from mpq_deploy.recipe import MeasureSettings, make_recipe  # noqa: E402
from mpq_deploy.sensitivity import layer_weights  # noqa: E402
from mpq_deploy.sensitivity import probe as probe_module  # noqa: E402
from mpq_deploy.sensitivity.exhaustive import measure_exhaustive  # noqa: E402
from mpq_deploy.sensitivity.measure import measure  # noqa: E402
from mpq_deploy.sensitivity.probe import measure_probe  # noqa: E402
from mpq_deploy.sensitivity.subject import Subject  # noqa: E402
from mpq_deploy.system.progress import Talk  # noqa: E402
from tests.calls.sets import samples_of  # noqa: E402
from tests.graphs import GraphBuilder, denoiser_graph  # noqa: E402
from tests.sensitivity.cases import NAMES, Setting, moved_scale, setting  # noqa: E402
from tests.sensitivity.kinds import kinds, linear  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def mixed() -> Setting:
    return setting(kinds(), (4, 7, 6))


def brute_force(case: Setting, options: MeasureSettings) -> dict[str, dict[str, Any]]:
    """<G, dY> from whole gradients and whole local errors, layer by layer, in float64."""
    calls = case.calibration.count
    graph = TorchGraph(case.graph.model, torch.float64)
    uses = [(n, use) for n in case.graph.layers for use in n.uses]
    steps = len(case.calibration.timesteps)
    found = {
        n: {s.name: np.zeros((steps, options.probes, calls)) for s in c.schemes}
        for n, c in case.candidates.items()
    }
    nodes = {node.name: node for node in case.model.graph.node}
    for step in range(steps):
        feeds = {n: torch.from_numpy(v).double() for n, v in case.feeds(step).items()}
        outputs = [use.output for _, use in uses]
        values = graph.run(
            feeds, keep=[*outputs, *(use.input for _, use in uses)], differentiate=outputs
        )
        out = values["out_sample"]
        norm = (out.detach().square().sum() / calls).sqrt().item()
        for call in range(calls):
            r = np.random.default_rng((options.seed, step, call)).standard_normal(
                (options.probes, *out.shape[1:]), np.float32
            )
            for p in range(options.probes):
                weighted = (out[call] * torch.from_numpy(r[p]).double()).sum()
                gradients = torch.autograd.grad(
                    weighted, [values[o] for o in outputs], retain_graph=True
                )
                for (layer, use), gradient in zip(uses, gradients):
                    x = values[use.input].detach()
                    for scheme in case.candidates[layer.name].schemes:
                        error = local_error(
                            case, layer, nodes[use.node], x, scheme, (use.input, step)
                        )
                        product = (error * gradient).sum().item()
                        found[layer.name][scheme.name][step, p, call] += product / norm
    entries = steps * options.probes * calls
    return {
        n: {s: a.reshape(-1) / entries**0.5 for s, a in row.items()} for n, row in found.items()
    }


def local_error(
    case: Setting, layer: Any, node: Any, x: Any, scheme: Any, place: tuple[str, int]
) -> Any:
    """layer(x; Qw(W)) + layer(Qa(x); W) - 2 layer(x; W), in full by torch's own functions in float64."""
    attributes = {a.name: list(a.ints) or a.i for a in node.attribute}
    candidate = case.candidates[layer.name]
    rounded, (tensor, timestep) = x, place
    if scheme.activation is not None:
        stats = case.stats.activations[tensor]
        grid = scheme.input_grid(stats)
        factors = torch.ones(1)
        if "+scale" in scheme.name:
            factors = torch.from_numpy(stats.factors[0].astype(np.float32))
            factors = factors.reshape(-1, 1, 1) if layer.op == "Conv" else factors
        axes = tuple(range(1, x.ndim)) if layer.op == "Conv" else (-1,)
        seen = (x.float() * factors).numpy()
        step = torch.as_tensor(moved_scale(scheme, grid.scale, timestep, seen, axes)) / factors
        codes = torch.round(x.float() / step)
        rounded = torch.clamp(codes, grid.quant_min, grid.quant_max).double() * step.double()
        if "+cols" in scheme.name:
            place = (
                (slice(None), int(stats.outliers[0]))
                if layer.op == "Conv"
                else (..., int(stats.outliers[0]))
            )
            rounded[place] = x[place]

    def apply(inputs: Any, matrix: Any) -> Any:
        w = torch.from_numpy(np.ascontiguousarray(matrix)).double()
        if layer.op != "Conv":
            return inputs @ w.T
        pads = attributes["pads"]
        padded = torch.nn.functional.pad(inputs, (pads[1], pads[3], pads[0], pads[2]))
        w = w.reshape(layer.weight_shape)
        return torch.nn.functional.conv2d(
            padded, w, None, attributes.get("strides", 1), 0, 1, attributes["group"]
        )

    clean = apply(x, candidate.weight)
    of_weight = apply(x, candidate.weight_matrix(scheme.weight_form)) - clean
    return of_weight + apply(rounded, candidate.weight) - clean


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("way", ["", "forward", "weights"])
def test_projections_are_the_inner_products(
    mixed: Setting, way: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = probe_module.project_layer
    monkeypatch.setattr(probe_module, "project_layer", lambda *a: original(*a, way=way))
    options = MeasureSettings(probes=2, calls=3, batch_size=batch_size)
    table = measure_probe(Subject(*mixed, options, Talk()))
    expected = brute_force(mixed, options)
    assert table.projections is not None
    for layer, row in expected.items():
        for scheme, vector in row.items():
            error = np.linalg.norm(table.projections[layer][scheme] - vector)
            assert error <= 2e-4 * np.linalg.norm(vector) + 1e-9, (layer, scheme)


@pytest.mark.parametrize("way", ["forward", "weights"])
def test_errors_of_large_layers_one_by_one_give_the_same_products(
    mixed: Setting, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = probe_module.project_layer
    monkeypatch.setattr(probe_module, "project_layer", lambda *a: original(*a, way=way))
    options = MeasureSettings(probes=2, calls=2, batch_size=2)
    together = measure_probe(Subject(*mixed, options, Talk())).projections
    monkeypatch.setattr(layer_weights, "LARGE_STACK_BYTES", 0)
    in_turn = measure_probe(Subject(*mixed, options, Talk())).projections
    assert together is not None and in_turn is not None
    for layer, row in together.items():
        for scheme, vector in row.items():
            np.testing.assert_allclose(in_turn[layer][scheme], vector, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory_bytes", [5_000, 1])
def test_parts_of_the_graph_give_the_same_products(
    mixed: Setting, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to every node on its own: skips, layers read twice and values that pass through a part are all there."""
    options = MeasureSettings(probes=2, calls=2, batch_size=1)
    whole = measure_probe(Subject(*mixed, options, Talk())).projections
    monkeypatch.setattr(probe_module, "MEMORY_BYTES", memory_bytes)
    parts = measure_probe(Subject(*mixed, options, Talk())).projections
    assert whole is not None and parts is not None
    for layer, row in whole.items():
        for scheme, vector in row.items():
            assert (
                np.linalg.norm(parts[layer][scheme] - vector)
                <= 1e-4 * np.linalg.norm(vector) + 1e-9
            )
    number = len(parts_of(mixed, memory_bytes))
    assert number > 2 and (memory_bytes > 1 or number > 0.8 * len(mixed.model.graph.node))


def parts_of(case: Setting, memory_bytes: int) -> tuple[slice, ...]:
    graph = TorchGraph(case.graph.model)
    uses = [use for layer in case.graph.layers for use in layer.uses]
    with torch.no_grad():
        footprint, _ = graph.footprint(
            graph.feed({n: v[:1] for n, v in case.feeds(0).items()}), lambda *_: None
        )
    gradients = gradient_bytes(footprint, uses, 2, range(len(uses)))
    found = parts_within(footprint, gradients, memory_bytes)
    assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
    taken = [2 * made + more for made, more in zip(footprint.made, gradients, strict=True)]
    assert all(sum(taken[part]) <= memory_bytes or part.stop == part.start + 1 for part in found)
    sizes = {name: size for outputs in footprint.outputs for name, size in outputs.items()}
    by_hand = sum(2 * (sizes[use.output] + sizes.get(use.input, 0)) for use in uses)
    assert sum(gradients) == by_hand
    return found


def test_the_kinds_are_all_there(mixed: Setting) -> None:
    layers = {n.name: n for n in mixed.graph.layers}
    assert {n.group for n in layers.values()} == {1, 2, 16}
    assert len(layers["to_k"].uses) == 2
    assert {n.out_axis for n in layers.values() if n.op == "Gemm"} == {0, 1}
    assert any(len(readers) > 1 for readers in mixed.graph.activations.values())


def test_losses_agree_with_the_exhaustive_ones() -> None:
    case = setting(
        denoiser_graph(channels=16, size=8, image_channels=3), (3, 8, 8), steps=2, calls=4
    )
    options = MeasureSettings(probes=48, calls=4)
    probed = measure_probe(Subject(*case, options, Talk()))
    truth = measure_exhaustive(Subject(*case, options, Talk()))
    for scheme in NAMES:
        a = np.array([probed.losses[n.name][scheme] for n in case.graph.layers])
        b = np.array([truth.losses[n.name][scheme] for n in case.graph.layers])
        assert spearmanr(a, b)[0] > 0.9
        assert 0.7 < a.sum() / b.sum() < 1.4
        assert np.all((a > b / 2.5) & (a < b * 2.5))


def test_a_linear_layer_is_exact_in_expectation() -> None:
    case = setting(linear(), (12,), steps=2, calls=4)
    options = MeasureSettings(probes=4000, calls=4)
    probed = measure_probe(Subject(*case, options, Talk()))
    truth = measure_exhaustive(Subject(*case, options, Talk()))
    for layer in ("first", "second"):
        for scheme in NAMES:
            assert probed.losses[layer][scheme] == pytest.approx(
                truth.losses[layer][scheme], rel=0.06
            )
            assert probed.losses_by_timestep[layer][scheme] == pytest.approx(
                truth.losses_by_timestep[layer][scheme], rel=0.1
            )


def test_cross_terms_predict_a_plan_that_the_sum_of_losses_misses() -> None:
    """Weights only, in a network linear in each weight: the plan's output error is the sum of the layers' errors."""
    case = setting(linear(), (12,), steps=1, calls=4)
    table = measure_probe(Subject(*case, MeasureSettings(probes=4000, calls=4), Talk()))
    first, second = (case.candidates[n].weight for n in ("first", "second"))
    biases = {w.name: numpy_helper.to_array(w) for w in case.model.graph.initializer}
    x = samples_of(case.calibration)[0].astype(np.float64)

    def network(a: Any, b: Any) -> Any:
        return (x @ a.T + biases["first.bias"]) @ b.T + biases["second.bias"]

    # Errors ten times smaller than INT4's, so that the product of two errors vanishes beside them.
    plan = {"first": "w8a16", "second": "w8a16"}
    rounded = [case.candidates[n].weight_matrix("int8") for n in ("first", "second")]
    clean = network(first, second)
    measured = np.sum((network(*rounded) - clean) ** 2) / np.sum(clean**2)
    assert table.plan_loss(plan) == pytest.approx(measured, rel=0.06)


def test_opposite_errors_cancel_in_a_plan() -> None:
    """Two layers on one input whose outputs are subtracted: equal errors leave nothing of a plan with both."""
    g = GraphBuilder(seed=2)
    g.input("sample", ["N", 16])
    g.input("timestep", ["N"])
    w = g.random("a.weight", 8, 16)
    g.weight("b.weight", numpy_helper.to_array(g.weights[-1]))
    a = g.op("Gemm", ["sample", w], "a", transB=1)
    b = g.op("Gemm", ["sample", "b.weight"], "b", transB=1)
    g.op(
        "Add",
        [g.op("Sub", [a, b], "difference"), g.op("Sub", [g.gemm("sample", "c", 8, 16), b], "d")],
        "sum",
    )
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 8])
    case = setting(g, (16,))
    table = measure_probe(Subject(*case, MeasureSettings(probes=8, calls=3), Talk()))
    lone = table.plan_loss({"b": "w4a16-b32"})
    # out = a - 2b + c: with the error of a added, half of that of b goes.
    assert table.plan_loss({"a": "w4a16-b32", "b": "w4a16-b32"}) == pytest.approx(
        lone / 4, rel=1e-3
    )


def test_a_timestep_that_all_samples_share_is_measured_one_by_one() -> None:
    """With a scalar timestep its embedding has one row for all samples; per-sample products need them apart."""
    g = GraphBuilder(seed=5)
    g.input("sample", ["N", 3, 5, 5])
    g.input("timestep", [])
    row = g.op("Reshape", ["timestep", g.weight("one_by_one", [1, 1])], "row")
    row = g.op("Sin", [g.op("Mul", [row, g.random("frequency", 1, 6)], "angle")], "sin")
    shift = g.op("Unsqueeze", [g.gemm(row, "time", 4, 6), g.weight("axes23", [2, 3])], "shift")
    x = g.op("Tanh", [g.op("Add", [g.conv("sample", "conv_in", 4, 3), shift], "add")], "tanh")
    g.conv(x, "conv_out", 3, 4)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 3, 5, 5])
    case = setting(g, (3, 5, 5), calls=4, batched_time=False)
    options = MeasureSettings(probes=64, calls=4)
    table = measure_probe(Subject(*case, options, Talk()))
    truth = measure_exhaustive(Subject(*case, options, Talk()))
    assert any("one by one" in note for note in table.notes)
    for scheme in ("w8a8", "w4a16-b32"):
        assert table.losses["time"][scheme] == pytest.approx(truth.losses["time"][scheme], rel=0.5)


def test_the_first_probes_do_not_depend_on_how_many_follow(mixed: Setting) -> None:
    options = MeasureSettings(probes=5, calls=3)
    more = measure_probe(Subject(*mixed, options, Talk())).projections
    fewer = measure_probe(Subject(*mixed, options.replace(probes=3), Talk())).projections
    assert more is not None and fewer is not None
    for layer, row in fewer.items():
        for scheme, values in row.items():
            # [timesteps, probes, samples], divided by the root of the number of all entries.
            first = more[layer][scheme].reshape(2, 5, 3)[:, :3].ravel() * np.sqrt(5 / 3)
            np.testing.assert_allclose(first, values, rtol=1e-3, atol=1e-3 * np.abs(values).max())


def test_same_seed_same_table_and_another_seed_another(mixed: Setting) -> None:
    options = MeasureSettings(probes=2, calls=2)
    one, two = (
        measure_probe(Subject(*mixed, options, Talk())),
        measure_probe(Subject(*mixed, options, Talk())),
    )
    other = measure_probe(Subject(*mixed, options.replace(seed=1), Talk()))
    assert one.losses == two.losses
    assert one.losses != other.losses


def test_a_layer_that_reaches_no_output_costs_nothing() -> None:
    g = linear()
    g.gemm("sample", "dead", 3, 12)
    case = setting(g, (12,))
    table = measure_probe(Subject(*case, MeasureSettings(probes=2, calls=2), Talk()))
    assert set(table.losses["dead"].values()) == {0.0}


def test_a_missing_scale_is_named(mixed: Setting) -> None:
    case = replace(mixed)
    tensor = next(iter(case.stats.activations))
    case.stats = type(case.stats)({k: v for k, v in case.stats.activations.items() if k != tensor})
    with pytest.raises(ModelError, match=tensor):
        measure_probe(Subject(*case, MeasureSettings(calls=2), Talk()))


def test_nan_names_the_tensor(mixed: Setting) -> None:
    case = replace(mixed)
    samples = samples_of(case.calibration).copy()
    samples[0, 0, 0, 0, 0] = np.nan
    case.calibration = case.calibration.with_values("sample", samples)
    with pytest.raises(ModelError, match="conv_in_out"):
        measure_probe(Subject(*case, MeasureSettings(calls=3), Talk()))


def test_unusable_settings_are_refused(mixed: Setting) -> None:
    with pytest.raises(UsageError, match="probes"):
        make_recipe({"measure": {"probes": 0}})
    with pytest.raises(UsageError, match="prob"):
        measure("prob", Subject(*mixed, MeasureSettings(), Talk()))
