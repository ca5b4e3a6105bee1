"""Rank correlation against scipy, its bootstrap against theory, and the sample of pairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from mpq_deploy.studies.agreement import (
    Compared,
    correlations,
    moments,
    ranks,
    rho_of,
    scheme_classes,
)
from mpq_deploy.studies.compared_losses import sampled_pairs

SCHEMES = ("w8a8", "w4a16-b32", "w4a8-b32")
ALL = {"all": SCHEMES}


def compared(true: np.ndarray, found: np.ndarray) -> Compared:
    """Losses [schemes, layers]."""
    count, layers = true.shape
    return Compared(
        tuple(f"l{i}" for _ in range(count) for i in range(layers)),
        tuple(s for s in SCHEMES[:count] for _ in range(layers)),
        true.reshape(-1),
        found.reshape(-1),
    )


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_and_rho_are_scipys(ties: bool) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        a, b = random.standard_normal((2, 17))
        if ties:
            a, b = np.round(a), np.round(b)
        np.testing.assert_allclose(ranks(a), rankdata(a))
        assert float(rho_of(moments(a, b))) == pytest.approx(spearmanr(a, b).statistic)


def test_pooled_over_schemes_is_the_mean_within_them_whatever_lies_between() -> None:
    random = np.random.default_rng(1)
    true, found = random.random((2, 3, 30))
    within = [spearmanr(a, b).statistic for a, b in zip(true, found, strict=True)]
    for apart in (0.0, 100.0):
        shifted = compared(
            true + apart * np.arange(3)[:, None], found + apart * np.arange(3)[:, None]
        )
        assert correlations(shifted, ALL, 0, 10)["all"].rho == pytest.approx(np.mean(within))


def test_a_perfect_metric_has_one_and_a_reversed_one_minus_one() -> None:
    true = np.random.default_rng(2).random((3, 12)) + 0.1
    for found, expected in ((true**3, 1.0), (1 / true, -1.0)):
        rho = correlations(compared(true, found), ALL, 0, 50)["all"]
        assert (rho.rho, rho.low, rho.high) == pytest.approx((expected, expected, expected))
    spread = compared(true, 2 * true).calibration()
    assert spread is not None and (spread.low, spread.median, spread.high) == pytest.approx(
        (2, 2, 2)
    )


def test_what_is_the_same_for_all_layers_has_no_order() -> None:
    true = np.random.default_rng(3).random((2, 12)) + 0.1
    found = np.repeat([[4.0], [8.0]], 12, axis=1)
    assert correlations(compared(true, found), ALL, 0, 20)["all"].rho is None


def test_few_layers_do_not_count() -> None:
    true = np.random.default_rng(4).random((1, 2)) + 0.1
    found = correlations(compared(true, true), ALL, 0, 20)["all"]
    assert (found.pairs, found.rho) == (0, None)


@pytest.mark.parametrize("layers", [40, 160])
def test_the_interval_is_as_wide_as_theory_says(layers: int) -> None:
    """For unrelated losses of one scheme the standard error of rho is about 1 / sqrt(n - 1)."""
    random = np.random.default_rng(layers)
    widths = []
    for _ in range(8):
        true, found = random.random((2, 1, layers))
        rho = correlations(compared(true, found), ALL, 5, 300)["all"]
        assert rho.low is not None and rho.high is not None and rho.rho is not None
        assert rho.low < rho.rho < rho.high
        widths.append(rho.high - rho.low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(layers - 1), rel=0.2)


def test_copies_of_a_scheme_make_the_interval_no_narrower() -> None:
    """A layer is drawn with all its pairs: three schemes of the same losses say no more than one."""
    true, found = np.random.default_rng(6).random((2, 1, 40))
    once = correlations(compared(true, found), ALL, 5, 300)["all"]
    thrice = correlations(compared(np.tile(true, (3, 1)), np.tile(found, (3, 1))), ALL, 5, 300)[
        "all"
    ]
    assert (thrice.rho, thrice.low, thrice.high) == pytest.approx((once.rho, once.low, once.high))


def test_pairs_that_change_nothing_and_fp16_are_left_out() -> None:
    truth = {"a": {"fp16": 1e-12, "w8a8": 1.0}, "b": {"w8a8": 0.0}, "c": {"w8a8": 2.0}}
    pairs = [(layer, scheme) for layer, row in truth.items() for scheme in row]
    taken = Compared.of(pairs, truth, {"a": {"fp16": 1.0, "w8a8": 3.0}, "b": {"w8a8": 1.0}})
    assert (taken.layers, taken.schemes) == (("a",), ("w8a8",))
    assert scheme_classes({"w4a16-b64", "w8a8", "w4a16-b32"}) == {
        "w8a8": ["w8a8"],
        "w4a16": ["w4a16-b32", "w4a16-b64"],
    }


@pytest.mark.parametrize("count", [1, 7, 60, 100, 179])
def test_the_sample_is_stratified_by_scheme_and_layer(count: int) -> None:
    rare = 20
    pairs = [(f"l{i}", s) for i in range(80) for s in SCHEMES if s != "w8a8" or i < rare]
    chosen = sampled_pairs(pairs, count, seed=1)
    assert len(chosen) == len(set(chosen)) == count and set(chosen) <= set(pairs)
    by_scheme = Counter(scheme for _, scheme in chosen)
    for scheme, layers in Counter(scheme for _, scheme in pairs).items():
        assert abs(by_scheme[scheme] - count * layers / len(pairs)) < 1
    by_layer = Counter(layer for layer, _ in chosen)
    assert max(by_layer.values()) - min(by_layer.get(f"l{i}", 0) for i in range(80)) <= 1
    assert chosen == sampled_pairs(pairs, count, seed=1)
    assert count < 7 or count > 170 or chosen != sampled_pairs(pairs, count, seed=2)


def test_no_more_pairs_than_there_are() -> None:
    pairs = [("a", "w8a8"), ("b", "w8a8")]
    assert sampled_pairs(pairs, 2, 0) == sampled_pairs(pairs, 99, 0) == pairs
