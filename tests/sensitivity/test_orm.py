"""The ORM metric on small graphs in ONNX Runtime: against CKA in float64, and its losses against every plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from mpq_deploy.allocate.milp import allocate
from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.calls.timesteps import adaptive_steps, sampled_steps, stride_shares
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.recipe import AllocateSettings, MeasureSettings, OrmSettings
from mpq_deploy.sensitivity.bit_losses import scheme_bits, schemes_at
from mpq_deploy.sensitivity.bit_program import linear_bits
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.orm import adapted_steps
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.progress import Talk
from tests.calls.sets import samples_of
from tests.graphs import GraphBuilder, awkward_graph, denoiser_graph
from tests.sensitivity.cases import Setting, setting
from tests.sensitivity.kinds import kinds
from tests.sensitivity.test_orthogonality import cka, debiased_cka

OPTIONS = MeasureSettings(calls=8, batch_size=8)
PLAIN = tuple(SCHEMES[name] for name in ("fp16", "w8a8", "w8a16", "w4a16-b32", "w4a8-b32"))


@pytest.fixture(scope="module")
def mixed() -> Setting:
    made = setting(kinds(), (4, 7, 6), steps=3, calls=8)
    made.candidates = {name: replace(one, schemes=PLAIN) for name, one in made.candidates.items()}
    return made


def outputs(case: Setting, step: int) -> dict[str, np.ndarray[Any, Any]]:
    """Features of every layer, one row per call, the uses side by side, float64."""
    names = [use.output for layer in case.graph.layers for use in layer.uses]
    values = case.values(step, names)
    calls = len(case.calibration.rows)

    def rows(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        value = np.repeat(value, calls, axis=0) if len(value) == 1 else value
        return value.astype(np.float64).reshape(calls, -1)

    return {
        layer.name: np.concatenate([rows(values[use.output]) for use in layer.uses], axis=1)
        for layer in case.graph.layers
    }


@pytest.mark.parametrize(("estimator", "reference"), [("biased", cka), ("debiased", debiased_cka)])
def test_orm_of_a_graph_is_cka_of_its_outputs(
    mixed: Setting, estimator: Any, reference: Any
) -> None:
    options = OPTIONS.replace(orm=OrmSettings(estimator=estimator))
    found = measure("orm", Subject(*mixed, options, Talk())).importance
    assert found is not None and found.orm is not None
    assert found.layers == tuple(layer.name for layer in mixed.graph.layers)
    for step in range(3):
        rows = outputs(mixed, step)
        # The timestep's embedding is the same for every call: no CKA, and taken as orthogonal.
        constant = [name.startswith("time.") for name in found.layers]
        assert list(found.constant[step]) == constant and sum(constant) == 2
        for i, a in enumerate(found.layers):
            for j, b in enumerate(found.layers):
                expected = (
                    float(i == j) if constant[i] or constant[j] else reference(rows[a], rows[b])
                )
                assert found.orm[step, i, j] == pytest.approx(expected, abs=2e-5), (a, b)


def test_a_timestep_for_the_whole_batch_has_outputs_without_a_batch_axis() -> None:
    case = setting(awkward_graph(), (3, 7, 9), steps=1, calls=6, batched_time=False)
    found = measure("orm", Subject(*case, OPTIONS.replace(batch_size=6), Talk())).importance
    assert found is not None and found.orm is not None
    same = {name for name, constant in zip(found.layers, found.constant[0]) if constant}
    # A layer of zeros is the same for all calls as well.
    assert same == {"time.linear_1", "time.proj_16", "time.proj_24", "zero"}
    rows, tied = outputs(case, 0), found.layers.index("tied")
    assert len(case.graph.layers[tied].uses) == 2
    down = found.layers.index("down")
    assert found.orm[0, tied, down] == pytest.approx(cka(rows["tied"], rows["down"]), abs=2e-5)


def test_small_differences_beside_a_large_mean_are_kept() -> None:
    g = GraphBuilder(seed=2)
    g.input("sample", ["N", 12])
    g.input("timestep", ["N"])
    small = g.op("Mul", ["sample", g.weight("tenth", np.float32(1e-3))], "small")
    x = g.op("Add", [small, g.random("offset", 12, scale=5.0)], "moved")
    a, b = g.gemm(x, "a", 40, 12), g.gemm(g.op("Sin", [x], "sin"), "b", 30, 12)
    g.op("Concat", [a, b], "both", axis=1)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 70])
    case = setting(g, (12,), steps=1, calls=8)
    found = measure("orm", Subject(*case, OPTIONS, Talk())).importance
    assert found is not None and found.orm is not None and not found.constant.any()
    rows = outputs(case, 0)
    # float32 itself leaves 1e-4 of such differences.
    assert found.orm[0, 0, 1] == pytest.approx(cka(rows["a"], rows["b"]), abs=1e-3)


def test_batches_are_even_and_their_dependence_is_averaged(mixed: Setting) -> None:
    bar: list[int] = []
    options = OPTIONS.replace(batch_size=5, orm=OrmSettings(estimator="debiased"))
    found = measure("orm", Subject(*mixed, options, Talk())).importance
    assert found is not None and found.calls == 4 and found.orm is not None and not bar
    halves = [replace_calls(mixed, slice(0, 4)), replace_calls(mixed, slice(4, 8))]
    rows = [outputs(half, 1) for half in halves]
    from tests.sensitivity.test_orthogonality import hsic_1

    top = sum(hsic_1(r["to_q"], r["conv_in"]) for r in rows)
    bottom = np.prod([sum(hsic_1(r[n], r[n]) for r in rows) for n in ("to_q", "conv_in")])
    i, j = found.layers.index("to_q"), found.layers.index("conv_in")
    assert found.orm[1, i, j] == pytest.approx(top / np.sqrt(bottom), abs=1e-4)


def replace_calls(case: Setting, calls: slice) -> Setting:
    return replace(case, calibration=case.calibration.take(np.arange(8)[calls]))


def test_fewer_than_eight_calls_are_said_in_the_result(mixed: Setting) -> None:
    few = measure("orm", Subject(*mixed, OPTIONS.replace(batch_size=4), Talk()))
    assert any("only 4 calls" in note and "batch_size" in note for note in few.notes)
    assert not any(
        "calls at a time" in note for note in measure("orm", Subject(*mixed, OPTIONS, Talk())).notes
    )


@pytest.mark.parametrize(("estimator", "calls"), [("biased", 2), ("debiased", 3)])
def test_too_few_calls_for_any_orm_are_refused(mixed: Setting, estimator: Any, calls: int) -> None:
    options = OPTIONS.replace(calls=calls, orm=OrmSettings(estimator=estimator))
    with pytest.raises(UsageError, match=f"here are {calls}"):
        measure("orm", Subject(*mixed, options, Talk()))


def test_a_model_that_takes_one_call_at_once_is_refused(mixed: Setting) -> None:
    fixed = mixed.spec.model_copy(
        update={"conditions": (InputSpec(name="text", shape=(1,), batched=False),)}
    )
    case = replace(mixed, spec=fixed)
    with pytest.raises(UsageError, match="takes 1 at once"):
        measure("orm", Subject(*case, OPTIONS, Talk()))


def test_an_activation_that_is_not_finite_is_named(mixed: Setting) -> None:
    samples = samples_of(mixed.calibration).copy()
    samples[2, 3, 0, 0, 0] = np.inf
    case = replace(mixed, calibration=mixed.calibration.with_values("sample", samples))
    with pytest.raises(ModelError, match=r"'conv_in'.*timestep 20"):
        measure("orm", Subject(*case, OPTIONS, Talk()))


# From importances to a plan


def problem_of(case: Setting, table: SensitivityTable, mean_bits: float) -> Problem:
    layers = [
        LayerChoice(
            layer.name,
            layer.inputs,
            {name: SCHEMES[name].weight_bytes(layer) for name in table.losses[layer.name]},
            table.losses[layer.name],
        )
        for layer in case.graph.layers
    ]
    weights = sum(layer.weights for layer in case.graph.layers)
    return Problem(layers, 100, 100 + int(mean_bits * weights / 8))


@pytest.mark.parametrize("method", ["orm", "size-only", "random"])
@pytest.mark.parametrize("bits", ["nominal", "deployed"])
@pytest.mark.parametrize("mean_bits", [7.5, 9.0, 12.0])
def test_the_plan_maximises_weighted_bits(method: str, bits: Any, mean_bits: float) -> None:
    case = setting(denoiser_graph(channels=16, size=8), (3, 8, 8), steps=2, calls=8)
    graph = replace(case.graph, layers=case.graph.layers[3:10])
    candidates = {layer.name: case.candidates[layer.name] for layer in graph.layers}
    candidates = {name: replace(one, schemes=PLAIN) for name, one in candidates.items()}
    case = replace(case, graph=graph, candidates=candidates)
    orm = OrmSettings(beta=4.0, bits=bits, aggregation="exponential", eta=2.0)
    table = measure(method, Subject(*case, OPTIONS.replace(orm=orm), Talk()))
    problem = problem_of(case, table, mean_bits)
    schemes = allocate(problem, AllocateSettings(gap=0.0)).schemes
    assert table.importance is not None
    c = table.importance.total

    def weighted(plan: Any) -> float:
        return sum(
            c[i] * scheme_bits(layer, SCHEMES[plan[layer.name]], bits)
            for i, layer in enumerate(graph.layers)
        )

    names = [layer.name for layer in graph.layers]
    every = (
        dict(zip(names, choice)) for choice in product(*(table.losses[name] for name in names))
    )
    best = max(weighted(plan) for plan in every if problem.plan_bytes(plan) <= problem.budget_bytes)
    assert weighted(schemes) == pytest.approx(best, rel=1e-6)
    sizes = np.array([layer.weights for layer in graph.layers], float)
    low, high = np.full(len(sizes), 4.0), np.full(len(sizes), 16.0)
    assert (
        linear_bits(c, sizes, low, high, 8.0 * (problem.budget_bytes - 100)).objective
        >= best - 1e-9
    )


def test_the_controls_know_sizes_and_nothing(mixed: Setting) -> None:
    even = measure("size-only", Subject(*mixed, OPTIONS, Talk())).importance
    drawn = [
        measure("random", Subject(*mixed, OPTIONS.replace(seed=seed), Talk())).importance
        for seed in (1, 1, 2)
    ]
    assert even is not None and np.array_equal(even.total, np.ones(len(even.layers)))
    one, again, other = (found.total for found in drawn if found is not None)
    assert np.array_equal(one, again) and not np.allclose(one, other)
    assert one.min() > 0 and one.max() <= 1 and np.ptp(one) > 0.3


def test_activation_bits(mixed: Setting) -> None:
    def kept(**options: Any) -> tuple[dict[str, set[str]], np.ndarray[Any, Any]]:
        table = measure("orm", Subject(*mixed, OPTIONS.replace(orm=OrmSettings(**options)), Talk()))
        assert table.importance is not None
        return {
            name: set(row) for name, row in table.losses.items()
        }, table.importance.activation_bits

    rounded, bits = kept(activation_bits="int8")
    assert set(bits) == {8} and all(row == {"fp16", "w8a8", "w4a8-b32"} for row in rounded.values())
    plain, bits = kept(activation_bits="fp16")
    assert set(bits) == {16} and all(
        row == {"fp16", "w8a16", "w4a16-b32"} for row in plain.values()
    )
    assert set(kept(activation_bits="program", activation_budget=8)[1]) == {8}
    assert set(kept(activation_bits="program", activation_budget=16)[1]) == {16}
    both, bits = kept(activation_bits="program", activation_budget=11)
    assert set(bits) == {8, 16}
    shapes = mixed.values(0, list(mixed.graph.activations))
    elements = np.array([sum(shapes[t].size for t in layer.inputs) for layer in mixed.graph.layers])
    assert elements @ bits <= 11 * elements.sum()
    assert [row == {"fp16", "w8a8", "w4a8-b32"} for row in both.values()] == list(bits == 8)
    # Where there is only one kind of quantized scheme there is no choice, and nothing is taken away.
    plain_schemes = tuple(SCHEMES[n] for n in ("fp16", "w8a16"))
    assert schemes_at(plain_schemes, 0) == plain_schemes


def test_losses_by_timestep_average_to_the_loss_and_survive_the_disk(
    mixed: Setting, tmp_path: Any
) -> None:
    options = OPTIONS.replace(orm=OrmSettings(beta=2, aggregation="exponential", eta=1))
    table = measure("orm", Subject(*mixed, options, Talk(), shares=(0.5, 0.3, 0.2)))
    table.save(tmp_path)
    read = SensitivityTable.load(tmp_path)
    assert not read.predicts_nmse and read.importance is not None and table.importance is not None
    for name, value in vars(table.importance).items():
        assert np.array_equal(
            getattr(read.importance, name), np.asarray(value, getattr(value, "dtype", None))
        ) or (name == "orm" and np.allclose(read.importance.orm, value, atol=1e-7))
    for i, layer in enumerate(table.importance.layers):
        for scheme, rows in read.losses_by_timestep[layer].items():
            given = {"fp16": 16, "w8a8": 8, "w4a8-b32": 4}[scheme]
            assert read.losses[layer][scheme] == pytest.approx(
                table.importance.total[i] * (16 - given)
            )
            assert rows.mean() == pytest.approx(read.losses[layer][scheme], rel=1e-5)


# Adaptive timesteps


def test_a_straight_curve_is_sampled_evenly() -> None:
    coarse = sampled_steps(40, 5)
    line = np.linspace([0.0, 1.0], [1.0, 0.0], 5)
    assert np.array_equal(adaptive_steps(line, coarse, 40, 8), sampled_steps(40, 8))
    assert np.array_equal(adaptive_steps(np.ones((5, 2)), coarse, 40, 8), sampled_steps(40, 8))


def test_more_timesteps_lie_where_the_curve_changes_fastest() -> None:
    coarse = sampled_steps(100, 10)
    # Nothing happens but between positions 25 and 35.
    curve = np.where(np.arange(10) < 3, 0.0, 1.0)[:, None]
    chosen = adaptive_steps(curve, coarse, 100, 8)
    assert len(set(chosen)) == 8 and np.array_equal(chosen, np.sort(chosen))
    assert chosen.min() >= 25 and chosen.max() <= 35
    shares = stride_shares(chosen, 100)
    assert shares.sum() == pytest.approx(1) and shares[0] > 0.2 and shares[-1] > 0.6


@pytest.mark.parametrize("count", [1, 5, 12])
def test_adaptive_steps_are_distinct_and_all_when_all_are_wanted(count: int) -> None:
    curve = np.array([0.0, 0.0, 0.0, 9.0])[:, None]
    chosen = adaptive_steps(curve, sampled_steps(12, 4), 12, count)
    assert len(set(chosen.tolist())) == count and chosen.min() >= 0 and chosen.max() < 12
    if count == 12:
        assert np.array_equal(chosen, np.arange(12))


def test_even_shares_are_those_of_uniform_sampling() -> None:
    assert stride_shares(sampled_steps(15, 5), 15) == pytest.approx(np.full(5, 0.2))


def test_the_first_pass_follows_the_graph() -> None:
    """Something new fades in late: importance changes only there, and that is where timesteps go."""
    g = GraphBuilder(seed=5)
    g.input("sample", ["N", 6])
    g.input("timestep", ["N"])
    column = g.op("Unsqueeze", ["timestep", g.weight("axes", np.array([1], np.int64))], "column")
    late = g.op(
        "Relu", [g.op("Sub", [g.weight("late", np.float32(200)), column], "before")], "fade"
    )
    fade = g.op("Mul", [late, g.weight("small", np.float32(0.01))], "factor")
    first = g.gemm("sample", "first", 8, 6)
    other = g.op("Mul", [g.op("Sin", [g.op("Mul", [first, first], "sq")], "sin"), fade], "other")
    g.gemm(g.op("Add", [first, other], "sum"), "last", 5, 8)
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 5])
    case = setting(g, (6,), steps=20, calls=8)
    samples = samples_of(case.calibration)
    samples[:] = samples[0]
    recorded = RecordedCalls(case.calibration, case.spec)
    chosen = adapted_steps(case.graph, recorded, OPTIONS, Talk(), count=6, coarse=10)
    # Timesteps fall from 800: those below 200 are the last five of twenty.
    assert (chosen >= 13).sum() >= 5


def test_shares_weigh_the_other_metrics(mixed: Setting) -> None:
    even = measure("local_error", Subject(*mixed, OPTIONS, Talk()))
    shares = (0.6, 0.3, 0.1)
    weighed = measure("local_error", Subject(*mixed, OPTIONS, Talk(), shares=shares))
    for layer, row in even.losses_by_timestep.items():
        for scheme, values in row.items():
            assert weighed.losses[layer][scheme] == pytest.approx(np.dot(shares, values), rel=1e-5)


def test_shares_weigh_projections_too(mixed: Setting) -> None:
    pytest.importorskip("torch")
    options = OPTIONS.replace(calls=4, probes=2)
    even = measure("probe", Subject(*mixed, options, Talk()))
    weighed = measure("probe", Subject(*mixed, options, Talk(), shares=(0.6, 0.3, 0.1)))
    for layer in ("conv_in", "to_k"):
        plan = {layer: "w4a16-b32"}
        rows = even.losses_by_timestep[layer]["w4a16-b32"]
        assert weighed.plan_loss(plan) == pytest.approx(np.dot((0.6, 0.3, 0.1), rows), rel=1e-4)
        assert weighed.losses[layer]["w4a16-b32"] == pytest.approx(
            weighed.plan_loss(plan), rel=1e-4
        )


def test_bits_of_branches_are_means_over_the_weights(mixed: Setting) -> None:
    layer = replace(mixed.graph.layers[0], weight_shape=(20, 64), out_axis=0)
    for name, bits in (
        ("w4a16-b128", 4),
        ("w4a16-b128+rows3", 4 + 4 * 6 / 20),
        ("w4a16-b128+lowrank8", 4),
    ):
        assert scheme_bits(layer, SCHEMES[name], "nominal") == pytest.approx(bits)
    assert scheme_bits(layer, SCHEMES["w8a8+cols1"], "nominal") == pytest.approx(8 + 8 * 2 / 64)
    for scheme in SCHEMES.values():
        # More bytes than the nominal bits take: so the linear program is a bound.
        nominal = scheme_bits(layer, scheme, "nominal")
        assert nominal <= scheme_bits(layer, scheme, "deployed") <= 16
