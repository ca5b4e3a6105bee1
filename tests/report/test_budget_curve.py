"""The plans behind the sliders, what is drawn of them, and the points that a sweep measures."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.allocate.front import least_so_far
from mpq_deploy.allocate.predicted_images import PredictedImages
from mpq_deploy.report.budget_curve import Stop, budget_view, options, view
from mpq_deploy.report.data import CurvePoint
from mpq_deploy.report.network import byte_price, why
from mpq_deploy.report.page import html_page
from mpq_deploy.report.shown_errors import ShownErrors
from mpq_deploy.studies.sweep import _predicted, points_on_curve, spread_over, sweep_table
from mpq_deploy.system.quantities import Budget, Latency
from tests.report.sample_report import make_budgets, make_report, timed_report


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


def test_points_of_a_sweep_are_fast_enough_for_the_recipe():
    plans, fp16 = make_budgets(make_report().layers, timed=True), make_report().fp16_size_bytes
    limit = 0.7
    budgets = points_on_curve(plans, fp16, 20, limit_ms=limit)
    sizes = {p.size_bytes for p in plans.plans if p.latency_ms <= limit}
    assert 0 < len(budgets) < len({p.size_bytes for p in plans.plans})
    for budget in budgets:
        assert any((budget - 2e-4) * fp16 < size <= int(budget * fp16) for size in sizes)


@given(
    st.integers(1, 10**12),
    st.floats(1e-4, 1.0),
    st.one_of(st.none(), st.integers(1, 10**12)),
)
def test_the_options_hold_the_plan_that_they_are_of(fp16, ratio, nanoseconds):
    size = max(1, int(ratio * fp16))
    time = None if nanoseconds is None else nanoseconds / 1e6
    words = options(Stop(size, size / fp16, 1e-6, (), time), fp16).split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    budget = Budget.parse(given["--budget"]).bytes(fp16, 1)
    assert size <= budget <= size + 2e-4 * fp16 + 1
    if nanoseconds is None:
        assert len(given) == 1
    else:
        limit = Latency.parse(given["--max-latency"]).nanoseconds
        assert nanoseconds <= limit <= 1.001 * nanoseconds + 1
        assert given["--objective"] == "quality"


def test_the_line_joins_what_no_smaller_plan_equals():
    assert least_so_far([1e-2, 1e-3, 1e-3, 5e-4, 9e-4]) == [0, 1, 3]
    assert least_so_far([None, None]) == [0, 1] and least_so_far([]) == []


def test_plans_with_times_have_dots_by_time_limits_and_a_column():
    report = timed_report()
    seen = budget_view(report)
    drawn = str(seen.chart)
    assert sum(len(part.stops) for part in seen.dots) == len(report.budgets.plans)
    assert [part.key for part in seen.dots] == ["slow", "medium", "fast"]
    for part in seen.dots:
        assert f'class="plans {part.key}"' in drawn and f"that take {part.said}" in drawn
    assert seen.columns[3] == "Time" and all(row[3].endswith(" ms") for row in seen.rows)
    limits = [value for value, _ in seen.values["times"]]
    times = [stop.latency_ms for stop in seen.stops]
    assert limits == sorted(limits) and limits[0] == min(times) and limits[-1] < max(times)
    assert limits[seen.start_time] == 0.75 and 0.7 in limits  # this run's, and FP16's
    assert seen.values["budgets"][seen.start][0] == report.size_bytes
    text = " ".join(html_page(report).split())
    assert "Every budget and time" in text and "(estimated; FP16 0.700 ms)" in text
    assert "above the line" in text


def test_without_a_time_of_the_run_itself_no_times_are_shown():
    seen = budget_view(timed_report(expected_latency=None))
    assert seen.times is None and seen.dots == () and seen.values["times"] == []
    assert "Time" not in seen.columns


def test_a_run_on_the_front_is_shown_once():
    report = make_report()
    row = report.layers[0]
    plan = report.budgets.plans[0]
    alone = report.budgets.model_copy(
        update={
            "layers": (row.name,),
            "layer_bytes": ({0: row.bytes},),
            "schemes": (row.scheme,),
            "plans": (plan.model_copy(update={"schemes": (0,)}),),
        }
    )
    seen = budget_view(make_report(layers=(row,), budgets=alone))
    assert len(seen.stops) == 1 and seen.has_own


def test_the_run_is_a_stop_with_its_own_bytes():
    report = make_report()
    seen = budget_view(report)
    own = next(stop for stop in seen.stops if stop.own)
    assert own.size_bytes == report.size_bytes and own.predicted == report.predicted_nmse
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
        plan = seen.stops[seen.rows.index(row)]
        assert stop["options"] == options(plan, report.fp16_size_bytes)
        assert [ord(letter) - ord("A") for letter in stop["plan"]] == list(plan.schemes)
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
    assert "does not predict errors" in text and "cross terms" not in text
    assert "largest plan within it" in " ".join(text.split())


def test_plans_that_were_chosen_by_final_images_are_drawn_in_their_psnr():
    report = make_report()
    plans = tuple(
        p.model_copy(update={"predicted_psnr_db": 40.0 + number})
        for number, p in enumerate(report.budgets.plans)
    )
    of_images = report.budgets.model_copy(update={"plans": plans})
    images = PredictedImages(12, 51.0, 48.0, (45.0,) * 6)
    found = make_report(budgets=of_images, predicted_images=images, predicted_nmse=None)
    seen = budget_view(found)
    assert seen.columns[2] == "Predicted PSNR"
    own = next(stop for stop in seen.stops if stop.own)
    assert own.predicted == pytest.approx(10**-5.1)
    shown = [row[2] for row in seen.rows]
    assert "51.0 dB" in shown and "40.0 dB" in shown
    drawn = str(seen.chart)
    assert "mean squared error of the final images" in drawn
    assert f"measured: {found.psnr_db:.1f} dB" in drawn and "predicted: 51.0 dB" in drawn
    text = " ".join(html_page(found).split())
    assert f"predicted 51.0 dB, measured {found.psnr_db:.1f} dB" in text
    assert f"measured {found.psnr_db:.1f} dB (mean)" in text
    # The price of a byte is in the unit of the layers' losses.
    assert byte_price(found) == byte_price(report)
    point = {"budget": 0.3, "size_ratio": 0.3, "size_bytes": 1, "predicted_nmse": None}
    points = [{**point, "predicted_psnr_db": 44.4, "measured_nmse": 1e-4, "psnr_db": 45.0}]
    assert "44.4 dB" in sweep_table({"points": points, "controls": {}})


def test_simulated_curves_say_so():
    text = " ".join(html_page(make_report(simulated=True)).split())
    assert "Simulated:</strong> sizes are nominal" in text
    assert "nominal bytes (simulated), relative to FP16" in text and "Size (nominal)" in text


def test_an_error_of_zero_has_no_place_on_a_logarithmic_axis():
    report = make_report()
    last = report.budgets.plans[-1].model_copy(update={"predicted_nmse": 0.0})
    exact = report.budgets.model_copy(update={"plans": (*report.budgets.plans[:-1], last)})
    seen = budget_view(make_report(budgets=exact))
    assert seen.values["stops"][-1]["at"][1] is None and seen.rows[-1][2] == "0"
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


def test_the_drawn_line_of_a_sweep_is_the_least_of_all_plans_not_of_those_in_view():
    losses = (1e-2, 1e-4, 1e-9, 1e-5)
    plans = [{"size_ratio": 0.2 + 0.1 * i, "predicted_nmse": loss} for i, loss in enumerate(losses)]
    drawn, line = _predicted(plans, [{"measured_nmse": 1e-4}], ShownErrors(False))
    assert [loss for _, loss in drawn] == [1e-2, 1e-4, 1e-5]
    assert [loss for _, loss in line] == [1e-2, 1e-4]
    assert _predicted([{"size_ratio": 0.3, "predicted_nmse": None}], [], ShownErrors(False)) == (
        [],
        [],
    )
