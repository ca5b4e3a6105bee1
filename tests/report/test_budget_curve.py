"""The grid of budgets, what is drawn of it, and the points that a sweep measures."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.report.budget_curve import budget_view, view
from mpq_deploy.report.budget_grid import STEP, coarse_first, grid, undominated
from mpq_deploy.report.data import CurvePoint
from mpq_deploy.report.network import byte_price, why
from mpq_deploy.report.page import html_page
from mpq_deploy.studies.sweep import points_on_curve, spread_over
from tests.report.sample_report import make_budgets, make_report

pytestmark = pytest.mark.usefixtures("whole_grid")


@given(st.integers(1, 900), st.floats(0.01, 1.0))
def test_the_grid_rises_from_the_smallest_and_reaches_the_run(smallest, ratio):
    budgets = grid(smallest, 1000, ratio)
    assert budgets[0] == smallest and budgets == sorted(set(budgets)) and budgets[-1] <= 1000
    assert budgets[-1] >= min(1000 * ratio, 1000) - 1000 * STEP
    assert max(np.diff(budgets), default=0) <= 1000 * STEP + 1


@given(st.lists(st.integers(), min_size=1, max_size=80, unique=True))
def test_every_beginning_of_the_coarse_order_is_spread(values):
    order = coarse_first(values)
    assert sorted(order) == sorted(values)
    half = [values.index(v) for v in order[: math.ceil(len(values) / 2)]]
    assert max(np.diff(sorted(half)), default=0) <= 2


def test_what_a_smaller_plan_equals_is_left_out():
    plans = [({}, 30, 1e-3), ({}, 10, 1e-2), ({}, 20, 1e-3), ({}, 40, 5e-4), ({}, 50, 9e-4)]
    assert [plan[1] for plan in undominated(plans)] == [10, 20, 40]
    unpredicted = [({}, 20, None), ({}, 10, None)]
    assert [plan[1] for plan in undominated(unpredicted)] == [10, 20]


@given(st.lists(st.floats(1e-9, 1.0), min_size=2, max_size=40), st.integers(2, 10))
def test_points_are_spread_over_the_frontier(losses, count):
    sizes = [0.2 + 0.01 * number for number in range(len(losses))]
    chosen = spread_over(sizes, losses, count)
    frontier = [i for i in range(len(losses)) if losses[i] < min(losses[:i], default=math.inf)]
    assert set(chosen) <= set(frontier) and chosen == sorted(set(chosen))
    assert chosen[0] == frontier[0] and chosen[-1] == frontier[-1]
    assert len(chosen) <= count and (count < len(frontier) or len(chosen) >= min(2, len(frontier)))


def test_points_are_where_the_curve_goes_not_where_its_plans_are_dense():
    # Half of the fall happens between the first two plans.
    sizes, losses = [0.2, 0.3, 0.31, 0.32, 0.33, 0.4], [1e-2, 1e-4, 9e-5, 8e-5, 7e-5, 1e-6]
    assert spread_over(sizes, losses, 3) in ([0, 1, 5], [0, 4, 5], [0, 2, 5])
    assert spread_over(sizes, [None] * 6, 3) == [0, 1, 5]


def test_budgets_of_the_points_hold_their_plans():
    plans = make_budgets(make_report().layers)
    fp16 = make_report().fp16_size_bytes
    budgets = points_on_curve(plans, fp16, 4)
    sizes = [plan.size_bytes for plan in plans.plans]
    assert len(budgets) == 4 and budgets[-1] <= 0.5 + 1e-4
    for budget in budgets:
        assert any(size <= int(budget * fp16) and size > (budget - 2e-4) * fp16 for size in sizes)


def test_the_run_is_a_stop_among_the_grid_with_its_own_bytes():
    report = make_report()
    seen = budget_view(report)
    own = seen.stops[seen.start]
    assert (
        own.own and own.size_bytes == report.size_bytes and own.predicted == report.predicted_nmse
    )
    assert [stop.size_bytes for stop in seen.stops] == sorted(
        stop.size_bytes for stop in seen.stops
    )
    values = seen.values
    sizes = [row[str(scheme)] for row, scheme in zip(values["bytes"], own.schemes, strict=True)]
    assert sizes == [layer.bytes for layer in report.layers]
    names = [values["schemes"][scheme] for scheme in own.schemes]
    assert names == [layer.scheme for layer in report.layers]
    for stop, row in zip(values["stops"], seen.rows, strict=True):
        assert sum(layers for layers, _ in stop["shares"]) == len(report.layers)
        assert (
            float(stop["budget"]) * report.fp16_size_bytes
            >= seen.stops[seen.rows.index(row)].size_bytes - 1e-4
        )
    first = values["stops"][0]
    moved = sum(a != b for a, b in zip(seen.stops[0].schemes, own.schemes, strict=True))
    assert first["changed"].startswith(f"{moved} layer")


def test_measured_points_of_a_sweep_are_drawn_on_the_curve():
    curve = (
        CurvePoint(size_ratio=0.3, predicted_nmse=1e-5, measured_nmse=1.1e-5),
        CurvePoint(size_ratio=0.4, predicted_nmse=1e-6),
    )
    drawn = str(budget_view(make_report(curve=curve)).chart)
    assert drawn.count("series-swept") == 1 and "measured: 1.1 × 10⁻⁵" in drawn


def test_a_metric_that_predicts_nothing_has_plans_but_no_curve():
    report = make_report()
    unpredicted = tuple(p.model_copy(update={"predicted_nmse": None}) for p in report.budgets.plans)
    silent = report.budgets.model_copy(update={"plans": unpredicted})
    seen = view(silent, report.fp16_size_bytes, [])
    assert seen.chart is None and all(
        stop["at"] is None and stop["loss"] == "" for stop in seen.values["stops"]
    )
    text = html_page(
        make_report(
            budgets=silent, predicted_nmse=None, measured_nmse=None, sensitivity="orm", controls={}
        )
    )
    assert "predicts no error" in text and "integer program's plans" not in text


def test_unfinished_and_simulated_curves_say_so():
    report = make_report()
    cut = report.budgets.model_copy(update={"wanted": 40})
    text = " ".join(html_page(make_report(budgets=cut, simulated=True)).split())
    assert "Only 9 of 40 budgets" in text and "Simulated:</strong> sizes are nominal" in text
    assert "nominal bytes (simulated), relative to FP16" in text and "Size (nominal)" in text


def test_an_error_of_zero_has_no_place_on_a_logarithmic_axis():
    report = make_report()
    last = report.budgets.plans[-1].model_copy(update={"predicted_nmse": 0.0})
    exact = report.budgets.model_copy(update={"plans": (*report.budgets.plans[:-1], last)})
    seen = budget_view(make_report(budgets=exact))
    assert seen.values["stops"][-1]["at"] is None and seen.rows[-1][2] == "0"
    only = exact.model_copy(update={"plans": (last,)})
    assert view(only, report.fp16_size_bytes, []).chart is None


def test_the_price_of_a_byte_is_the_slope_beside_the_run():
    report = make_report()
    below, above = report.budgets.plans[0], report.budgets.plans[1]
    between = make_report(size_bytes=(below.size_bytes + above.size_bytes) // 2)
    fallen = (below.predicted_nmse - above.predicted_nmse) / (above.size_bytes - below.size_bytes)
    assert byte_price(between) == pytest.approx(fallen)
    assert byte_price(make_report(size_bytes=1)) is None


def test_reasons_count_bytes_and_errors():
    report = make_report()
    layer = report.layers[5]
    said = " ".join(why(layer, report, 1e-9))
    smaller = report.budgets.smaller[layer.name]
    assert smaller.scheme in said and "1.0 × 10⁻⁶ of predicted error" in said
    alone = report.model_copy(
        update={"budgets": report.budgets.model_copy(update={"smaller": {}, "larger": {}})}
    )
    assert "only scheme" in why(layer, alone, None)[0]
