"""What a plan costs, what it minimizes, and which schemes protection leaves."""

from __future__ import annotations

import pytest

from mpq_deploy.allocate.problem import LayerChoice, Objective, Problem, protected_schemes
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.sizes import ACTIVATION_SCALE_BYTES

SIZES = {"fp16": 80, "w8a8": 41, "w4a16-b32+rows1": 25, "w4a16-b32": 23}
LOSSES = {"fp16": 0.0, "w8a8": 1.0, "w4a16-b32+rows1": 2.0, "w4a16-b32": 3.0}


def test_readers_of_one_tensor_pay_for_its_scale_once() -> None:
    layers = [LayerChoice(n, ("x",), {"w8a8": 100}, {"w8a8": 1.0}) for n in ("q", "k", "v")]
    assert Problem(layers, 0, 0).plan_bytes(dict.fromkeys("qkv", "w8a8")) == 302


def test_quantizers_with_and_without_outlier_channels_are_two() -> None:
    sizes = {"w8a8": 10, "w8a8+cols1": 10}
    layers = [LayerChoice(name, ("x",), sizes, dict.fromkeys(sizes, 0.0)) for name in "abc"]
    problem = Problem(layers, 0, 100)
    alike = problem.plan_bytes({"a": "w8a8", "b": "w8a8", "c": "w8a8"})
    mixed = problem.plan_bytes({"a": "w8a8", "b": "w8a8+cols1", "c": "w8a8+cols1"})
    assert mixed - alike == ACTIVATION_SCALE_BYTES


def test_readers_of_one_tensor_wait_for_its_quantizer_once() -> None:
    layers = [
        LayerChoice(n, ("x",), {"w8a8": 1}, {"w8a8": 0.0}, latency_ns={"w8a8": 10})
        for n in ("q", "k", "v")
    ]
    problem = Problem(layers, 0, 100, quantizer_ns={"x": 7}, fixed_ns=3)
    assert problem.plan_ns(dict.fromkeys("qkv", "w8a8")) == 3 + 30 + 7
    assert set(layers[0].quantizers("w8a8")) == {"x"}


def test_protection_limits_a_layer_and_refuses_what_matches_nothing() -> None:
    names = ("fp16", "w8a8", "w4a16-b32", "w4a8-b64")
    layers = [("conv_in", names), ("mid.conv1", names)]
    assert protected_schemes(layers, [("conv_*", ("fp16",))])["conv_in"] == ("fp16",)
    assert protected_schemes(layers, [("mid.*", ("w4a16", "fp16"))])["mid.conv1"] == (
        "fp16",
        "w4a16-b32",
    )
    with pytest.raises(UsageError, match="matches no layer"):
        protected_schemes(layers, [("nothing.*", ("fp16",))])
    with pytest.raises(UsageError, match="leaves no scheme"):
        protected_schemes([("conv", ("fp16",))], [("conv", ("w8a8",))])


def test_each_objective_counts_what_it_is_named_after() -> None:
    times = {"fp16": 9, "w8a8": 5, "w4a16-b32+rows1": 8, "w4a16-b32": 6}
    layers = [LayerChoice(name, ("x",), SIZES, LOSSES, latency_ns=times) for name in "ab"]
    problem = Problem(layers, 11, 100, quantizer_ns={"x": 7}, fixed_ns=3)
    plan = {"a": "w8a8", "b": "w4a16-b32+rows1"}
    assert Objective.predicted_loss(problem).of(plan, layers) == problem.plan_loss(plan) == 3.0
    # A branch of rows has two kernels.
    assert Objective.predicted_loss(problem, 0.5).of(plan, layers) == 4.0
    size, latency = Objective.size(problem), Objective.latency(problem)
    assert size.of(plan, layers) + sum(size.quantizers.values()) + 11 == problem.plan_bytes(plan)
    assert latency.of(plan, layers) + sum(latency.quantizers.values()) + 3 == problem.plan_ns(plan)


def test_without_branches_a_layer_keeps_one_where_it_has_nothing_else() -> None:
    alone = LayerChoice("b", ("y",), {"w4a16-b32+rows1": 25}, {"w4a16-b32+rows1": 2.0})
    plain = Problem([LayerChoice("a", ("x",), SIZES, LOSSES), alone], 0, 0).without_branches()
    assert [list(layer.bytes) for layer in plain.layers] == [
        ["fp16", "w8a8", "w4a16-b32"],
        ["w4a16-b32+rows1"],
    ]
    assert list(plain.layers[0].loss) == ["fp16", "w8a8", "w4a16-b32"]
