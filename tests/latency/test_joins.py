"""Products of one input as kernels: what an engine's log shows, what is taken from it, and what is assumed."""

from __future__ import annotations

import pytest

from mpq_deploy.engine.product_kernels import ProductKernel
from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.scheme import FP16, SCHEMES, W8A8
from mpq_deploy.graph.layers import Layer, LayerGraph, LayerUse
from mpq_deploy.latency.costs import LatencyCosts
from mpq_deploy.latency.joins import Joins, Shown
from mpq_deploy.latency.roofline import LAUNCH_SECONDS

F8A8, NVFP4, LOWRANK = SCHEMES["f8a8"], SCHEMES["nvfp4"], SCHEMES["w4a16-b64+lowrank8"]
SIZE, ROWS = 256, 16
# Two attentions of x and y with q, k and v, two that project the text t to k and v, and an embedding's three.
GROUPS = ("x.q x.k x.v", "y.q y.k y.v", "t.k1 t.v1", "t.k2 t.v2")
EMBEDDING = "e.a e.b e.c"


def layer(name: str) -> Layer:
    use = LayerUse(name, name.split(".")[0], name)
    return Layer(name, "MatMul", f"{name}.w", (SIZE, SIZE), 1, 1, (use,))


LAYERS = {name: layer(name) for names in (*GROUPS, EMBEDDING) for name in names.split()}
GRAPH = LayerGraph(None, tuple(LAYERS.values()), ())  # type: ignore[arg-type]
SHAPES = dict.fromkeys((*LAYERS, *"xyte"), (ROWS, SIZE))


def costs(monkeypatch: pytest.MonkeyPatch, *kernels: tuple[str, str]) -> LatencyCosts:
    monkeypatch.setattr("mpq_deploy.latency.costs.others_seconds", lambda *_: 0.0)
    groups = [[LAYERS[name] for name in names.split()] for names in GROUPS]
    listed = tuple(ProductKernel(family, tuple(names.split())) for family, names in kernels)
    joins = Joins(GRAPH, groups, Shown(listed, "an engine") if listed else None)
    return LatencyCosts(GRAPH, SHAPES, load_target("rtx-blackwell"), 1, None, joins)


def of(names: str) -> list[Layer]:
    return [LAYERS[name] for name in names.split()]


def saved(products: int, value_bytes: float) -> float:
    """Nanoseconds that one kernel of some products saves: launches, and reading the input again (by hand)."""
    read = ROWS * SIZE * value_bytes / 1792e9
    return 1e9 * (products - 1) * (LAUNCH_SECONDS + read)


def test_without_a_log_the_format_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = costs(monkeypatch)
    assert found.joined_ns(of(GROUPS[0]), W8A8) == pytest.approx(saved(3, 1), abs=1)
    assert found.joined_ns(of(GROUPS[2]), FP16) == pytest.approx(saved(2, 2), abs=1)
    assert found.joined_ns(of(GROUPS[0]), F8A8) == found.joined_ns(of("e.a"), FP16) == 0
    plan = dict.fromkeys(LAYERS, FP16)
    assert found.joins.basis(plan).endswith("is assumed: no engine was built here")


def test_a_log_overrules_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = (("w8a8", name) for name in GROUPS[0].split())
    found = costs(monkeypatch, *apart, ("f8a8", GROUPS[0]))
    assert found.joined_ns(of(GROUPS[0]), W8A8) == 0
    assert found.joined_ns(of(GROUPS[0]), F8A8) == pytest.approx(saved(3, 1), abs=1)
    # Nothing is known of FP16.
    assert found.joined_ns(of(GROUPS[0]), FP16) == pytest.approx(saved(3, 2), abs=1)


def test_a_part_of_a_group_may_be_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = costs(monkeypatch, ("nvfp4", "x.k x.q"), ("nvfp4", "x.v"))
    whole, part = (found.joined_ns(of(names), NVFP4) for names in (GROUPS[0], "x.q x.k"))
    assert 0 < whole == part < found.joined_ns(of(GROUPS[0]), FP16)


def test_a_kernel_of_several_attentions_is_shared_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = costs(monkeypatch, ("w8a8", " ".join(GROUPS[2:])))
    shares = [found.joined_ns(of(group), W8A8) for group in GROUPS[2:]]
    assert sum(shares) == pytest.approx(saved(4, 1), abs=2)
    assert shares[0] == shares[1]


def test_groups_that_no_log_shows_are_taken_as_those_it_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = costs(monkeypatch, ("f8a8", GROUPS[0]), ("nvfp4", "t.k1"), ("nvfp4", "t.v1"))
    assert found.joined_ns(of(GROUPS[1]), F8A8) == pytest.approx(saved(3, 1), abs=1)
    # Of two layers in FP8, and of three in FP4, it shows nothing.
    assert found.joined_ns(of(GROUPS[2]), F8A8) == found.joined_ns(of(GROUPS[1]), NVFP4) == 0
    plan = dict.fromkeys(LAYERS, F8A8)
    assert found.joins.basis(plan).endswith("2 of 4 groups as in the log of an engine, 2 assumed")


def test_a_log_that_contradicts_itself_says_nothing_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = costs(monkeypatch, ("w8a8", "t.k1 t.v1"), ("w8a8", "t.k2"), ("w8a8", "t.v2"))
    assert found.joins.shares(of(GROUPS[2]), W8A8)[1]
    assert not found.joins.shares(of(GROUPS[0]), W8A8)[1]
    assert found.joined_ns(of(GROUPS[3]), W8A8) == 0


def test_other_products_of_one_input_count_where_a_log_shows_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = dict.fromkeys(LAYERS, FP16)
    assumed = costs(monkeypatch)
    shown = costs(monkeypatch, ("fp16", EMBEDDING))
    less = assumed.plan_ns(GRAPH.layers, plan) - shown.plan_ns(GRAPH.layers, plan)
    assert less == pytest.approx(saved(3, 2), abs=3)
    mixed = {**plan, "e.b": W8A8}
    each = saved(3, 2) / 3
    before, after = (c.plan_ns(GRAPH.layers, mixed) for c in (assumed, shown))
    assert before - after == pytest.approx(2 * each, abs=3)


def test_what_reads_different_tensors_is_no_kernel_and_branches_keep_products_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = costs(monkeypatch, ("f8a8", "x.q y.q"), ("w4a16", GROUPS[0]))
    assert found.joined_ns(of("x.q"), F8A8) == 0
    assert found.joined_ns(of(GROUPS[0]), LOWRANK) == 0
    assert found.joined_ns(of(GROUPS[0]), LOWRANK.body) > 0
