"""The pages alive in a real browser: sliders, toggles, keyboard, narrow and printed, with nothing fetched."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from mpq_deploy.report.data import EvaluationInfo, FrechetInfo, ImageSet, Interval, ScoreInfo
from mpq_deploy.report.page import html_page
from mpq_deploy.report.sweep_page import sweep_page
from tests.report.sample_report import make_budgets, make_report, pictures, timed_report
from tests.report.test_report import HOSTILE, bare_report, identical_report, orm_report

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no chromium here: apt-get install chromium, or set CHROMIUM to its path",
    ),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000
        )
        yield started
        started.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a page; at the end nothing may have been said on the console, asked of the network, or popped up."""
    wrong, contexts = [], []

    def call(text, **options):
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on(
            "dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss())
        )
        page.on(
            "request",
            lambda request: wrong.append(request.url) if not own(request.url, path) else None,
        )
        page.goto(path.as_uri())
        return page

    def own(url, path):
        return url == path.as_uri() or url.startswith("data:")

    yield call
    for context in contexts:
        context.close()
    assert wrong == []


def shot(locator):
    """What is seen of an element, uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"))


def cells(locator, side):
    """The colours in the middle of each of ``side`` x ``side`` enlarged pixels, int [side, side, 3]."""
    seen = shot(locator)
    rows, columns = (((np.arange(side) + 0.5) / side * size).astype(int) for size in seen.shape[:2])
    return seen[np.ix_(rows, columns)].astype(int)


def one_layer():
    report = make_report()
    row = report.layers[5]
    return make_report(layers=(row,), others=(), budgets=make_budgets((row,)))


def thousand_layers():
    row = make_report().layers[5]
    rows = tuple(
        row.model_copy(update={"name": f"blocks.{i}.attn.to_q", "loss_by_timestep": (1e-7,) * 20})
        for i in range(1000)
    )
    return make_report(
        layers=rows, budgets=make_budgets(rows), loss_timesteps=tuple(map(float, range(20)))
    )


def latents():
    batch = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 4), np.uint8)
    info = EvaluationInfo(samples=3, steps=2, seed=1, sampler="DDIM", image_kind="latents")
    return make_report(images=ImageSet({"float": batch, "ours": batch}), evaluation=info)


def frechet_info(**changes):
    values = {
        "variant": "ours",
        "title": "Frechet distance (EfficientNet-Lite0)",
        "network": "EfficientNet-Lite0",
        "network_digest": "0" * 64,
        "network_features": 1280,
        "against": "float",
        "against_source": "the float model's images from the same noise",
        "against_samples": 1000,
        "against_digest": "1" * 64,
        "samples": 1000,
        "sampler": "DDIM",
        "steps": 20,
        "seed": 5,
        "distance": 0.123,
        "floor": 0.1,
        "interval": Interval(low=0.09, high=0.15),
        "increase_interval": Interval(low=-0.01, high=0.05),
        "other_noise": 0.2,
    }
    return FrechetInfo(**{**values, **changes})


def hostile():
    row = (
        make_report()
        .layers[0]
        .model_copy(update={"name": HOSTILE, "op": HOSTILE, "refused": {HOSTILE: HOSTILE}})
    )
    return make_report(
        layers=(row,),
        budgets=make_budgets((row,), command=HOSTILE),
        notes=(HOSTILE,),
        images=ImageSet(
            {"float": pictures(0), "ours": pictures(1)}, (HOSTILE,) * 8, {"ours": HOSTILE}
        ),
        frechet=(
            frechet_info(title=HOSTILE, network=HOSTILE, against="real", against_source=HOSTILE),
        ),
    )


def scores():
    """LPIPS and the CLIP score of the plan and of everything INT4."""
    common = {
        "score_digest": "d",
        "samples": 64,
        "sampler": "DDIM, 20 steps",
        "steps": 20,
        "seed": 7,
    }
    found = []
    for variant, lpips, clip in (("ours", 0.01, 25.0), ("int4", 0.2, 20.0)):
        about = {"variant": variant, **common}
        near = Interval(low=0.9 * lpips, high=1.1 * lpips)
        kinds = {"title": "LPIPS (AlexNet)", "score": "lpips"}
        found.append(
            ScoreInfo(
                **about,
                **kinds,
                value=lpips,
                floor=0,
                other_noise=0.5,
                interval=near,
                increase_interval=near,
            )
        )
        lower = Interval(low=clip - 26.5, high=clip - 25.5)
        kinds = {"title": "CLIP score (clip)", "score": "clip-score"}
        found.append(
            ScoreInfo(
                **about, **kinds, value=clip, floor=26, other_noise=26, increase_interval=lower
            )
        )
    return tuple(found)


@pytest.mark.parametrize(
    "make",
    [
        make_report,
        timed_report,
        bare_report,
        identical_report,
        orm_report,
        one_layer,
        thousand_layers,
        latents,
        hostile,
    ],
)
def test_every_kind_of_report_opens_and_fits_any_width(make, open_page):
    text = html_page(make())
    assert len(text.encode()) < 5_000_000
    for width in (320, 1200):
        page = open_page(text)
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#layer-panel h4").inner_text() in [
            layer.name for layer in make().layers
        ]


def test_orthogonality_is_read_back_from_the_colours(open_page):
    page = open_page(html_page(orm_report()))
    cell = page.locator("#orm-cell")
    sync_api.expect(cell).to_have_text("blocks.0.attn.to_q and blocks.0.attn.to_q: 1.00")
    page.locator("#orm-map").press("ArrowDown")
    sync_api.expect(cell).to_have_text("blocks.1.attn.to_q and blocks.0.attn.to_q: -0.05")
    page.get_by_role("slider", name="Timestep").press("End")
    sync_api.expect(page.locator("#orm-timestep")).to_have_text("50")


def values_of(page):
    return page.evaluate("JSON.parse(document.getElementById('budget-plans').textContent)")


def best_within(stops, most_bytes, most_ms=None):
    """The plan of least error within both limits, by looking at each; the largest where none is predicted."""
    fit = [
        stop
        for stop in stops
        if stop["bytes"] <= most_bytes and (most_ms is None or stop["ms"] <= most_ms)
    ]
    if not fit:
        return None
    if fit[0]["error"] is None:
        return max(fit, key=lambda stop: stop["bytes"])
    return min(fit, key=lambda stop: stop["error"])


def strip_of(page):
    return page.eval_on_selector_all(
        "#budget-strip span", "spans => spans.map(one => Number(one.style.flexGrow))"
    )


def test_the_budget_slider_shows_the_plan_of_each_budget(open_page):
    report = make_report()
    page = open_page(html_page(report))
    assert page.get_by_role("slider", name="Time").count() == 0
    slider = page.get_by_role("slider", name="Budget")
    values = values_of(page)
    own = next(stop for stop in values["stops"] if stop["own"])
    start = slider.input_value()
    assert values["budgets"][int(start)][0] == own["bytes"]
    assert page.locator("#budget-changed").inner_text() == "this run's plan"
    seen = set()
    slider.press("Home")
    for number, (most, _) in enumerate(values["budgets"]):
        assert slider.input_value() == str(number)
        stop = best_within(values["stops"], most)
        assert page.locator("#budget-loss").inner_text() == stop["loss"]
        assert page.locator("#budget-size").inner_text() == stop["size"]
        assert page.locator("#budget-options").inner_text() == stop["options"]
        assert stop["loss"] in slider.get_attribute("aria-valuetext")
        seen.add(page.locator("#budget-cursor circle").get_attribute("transform"))
        slider.press("ArrowRight")
    assert len(seen) >= len(report.budgets.plans) - 1
    # The last plan's layers, as wide as their bytes.
    last, layers = report.budgets.plans[-1], report.budgets.layer_bytes
    if best_within(values["stops"], values["budgets"][-1][0])["error"] == last.predicted_nmse:
        assert strip_of(page) == [
            row[scheme] for row, scheme in zip(layers, last.schemes, strict=True)
        ]
    page.get_by_role("button", name="Back to this run").click()
    assert slider.input_value() == start
    assert page.locator("#budget-changed").inner_text() == "this run's plan"
    assert page.evaluate("document.activeElement.id") == "budget"


# What stands beside both sliders at each budget, read in one call: a browser is asked a thousand times otherwise.
BESIDE_SLIDERS = """(budget) => {
  const all = [];
  for (budget.value = 0; ; budget.stepUp()) {
    budget.dispatchEvent(new Event("input", {bubbles: true}));
    const told = {sliders: {}};
    for (const name of ["said", "none", "loss", "time", "options"]) {
      const element = document.getElementById(`budget-${name}`);
      told[name] = element.checkVisibility() ? element.innerText : null;
    }
    for (const slider of document.querySelectorAll(".budget-slider input[type=range]"))
      told.sliders[slider.id] = {value: slider.value, text: slider.getAttribute("aria-valuetext")};
    all.push(told);
    if (budget.value === budget.max) return all;
  }
}"""


def test_both_sliders_show_the_least_error_within_both(open_page):
    page = open_page(html_page(timed_report()))
    budget, time = (page.get_by_role("slider", name=name) for name in ("Budget", "Time"))
    values = values_of(page)
    assert values["times"][int(time.input_value())][0] == 0.75
    limits = [ms for ms, _ in values["times"]] + [None]
    shown, refused = set(), 0
    time.press("Home")
    for place, ms in enumerate(limits):
        every = budget.evaluate(BESIDE_SLIDERS)
        for number, ((most, _), told) in enumerate(zip(values["budgets"], every, strict=True)):
            sliders = told["sliders"]
            assert sliders["budget"]["value"] == str(number)
            assert sliders["time"]["value"] == str(place)
            stop = best_within(values["stops"], most, ms)
            assert (told["said"] is None) == (stop is None) != (told["none"] is None)
            if stop is None:
                refused += 1
                least = min(s["ms"] for s in values["stops"] if s["bytes"] <= most)
                assert f"takes {least:.3f} ms" in told["none"]
                assert "no plan" in sliders["budget"]["text"]
            else:
                shown.add(stop["options"])
                assert {name: told[name] for name in ("loss", "time", "options")} == {
                    name: stop[name] for name in ("loss", "time", "options")
                }
                for slider in sliders.values():
                    assert f"{stop['loss']}, {stop['time']}" in slider["text"]
        time.press("ArrowRight")
    assert refused > 0 and len(shown) > 12
    assert page.locator("#time-limit").inner_text() == "no limit"
    assert "estimated" in page.locator("#budget-said").inner_text()
    assert "FP16: 0.700 ms" in page.locator("#budget-said").inner_text()
    page.get_by_role("button", name="Back to this run").click()
    assert page.locator("#budget-changed").inner_text() == "this run's plan"
    assert values["times"][int(time.input_value())][0] == 0.75


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plans_with_times_fit_any_width(open_page, width, scheme):
    page = open_page(html_page(timed_report()), color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.get_by_text("All plans as a table").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator(".budget-slider")
    inside = box.bounding_box()
    for name in ("Budget", "Time"):
        slider = page.get_by_role("slider", name=name).bounding_box()
        assert slider["width"] > 150
        assert slider["x"] + slider["width"] <= inside["x"] + inside["width"] + 1
    # A legend names the dots without their colour.
    legend = page.get_by_role("list", name="What a dot's size says")
    assert "up to" in legend.inner_text() and "over" in legend.inner_text()
    widths = [legend.locator(".dot").nth(i).bounding_box()["width"] for i in range(3)]
    assert widths == sorted(set(widths))


def test_unpredicted_plans_show_the_largest_within_both(open_page):
    report = timed_report()
    silent = report.budgets.model_copy(
        update={
            "plans": tuple(
                p.model_copy(update={"predicted_nmse": None}) for p in report.budgets.plans
            )
        }
    )
    text = html_page(timed_report(budgets=silent, predicted_nmse=None, sensitivity="orm"))
    page = open_page(text)
    values = values_of(page)
    assert "largest plan within both" in page.locator("#budgets").inner_text()
    page.get_by_role("slider", name="Time").press("End")
    slider = page.get_by_role("slider", name="Budget")
    slider.press("Home")
    for most, _ in values["budgets"]:
        stop = best_within(values["stops"], most)
        assert (
            page.locator("#budget-options").inner_text().split(" --max")[0]
            == (stop["options"].split(" --max")[0])
        )
        assert page.locator("#budget-loss").inner_text() == "not predicted"
        slider.press("ArrowRight")


def test_the_wipe_goes_from_the_variant_to_the_original(open_page):
    page = open_page(html_page(make_report()))
    images = make_report().images.images
    page.get_by_role("combobox", name="Sample").select_option("2")
    page.get_by_role("combobox", name="Against").select_option("int4")
    wipe = page.get_by_role("slider", name="How much of the original is shown")
    for key, variant in (("Home", "int4"), ("End", "float")):
        wipe.press(key)
        seen = cells(page.locator("#wipe-picture"), 32)
        # The line at the edge covers a column.
        assert np.abs(seen - images[variant][2].astype(int))[:, 1:-1].max() <= 2
    assert wipe.get_attribute("aria-valuetext").startswith("100 % original")


def test_the_difference_is_the_amplified_difference(open_page):
    page = open_page(html_page(make_report()))
    images = make_report().images.images
    page.locator('tr[data-variant="int8"] img').nth(4).click()
    seen = cells(page.locator("#difference-picture"), 32)
    apart = np.abs(images["int8"][4].astype(int) - images["float"][4].astype(int))
    assert apart.max() > 2
    assert np.abs(seen - np.minimum(16 * apart, 255)).max() <= 2


def test_modes_and_gain_by_keyboard(open_page):
    page = open_page(html_page(make_report()))
    table, gain = (
        page.locator("#pictures"),
        page.get_by_role("slider", name="Gain of the difference"),
    )
    assert gain.is_disabled()
    page.get_by_role("radio", name="Images").focus()
    page.keyboard.press("ArrowRight")
    assert table.get_attribute("data-mode") == "original"
    page.keyboard.press("ArrowRight")
    assert table.get_attribute("data-mode") == "difference" and gain.is_enabled()
    gain.press("End")
    assert (
        page.locator("#gain-value").inner_text()
        == page.locator("#difference-gain").inner_text()
        == "128"
    )
    assert "Amplified 128 times" in page.locator("#image-hint").inner_text()


def test_layers_by_keyboard_with_their_reasons(open_page):
    report = make_report()
    page = open_page(html_page(report))
    page.locator("#layers .block").first.focus()
    page.keyboard.press("End")
    assert page.locator("#layer-panel h4").inner_text() == report.layers[-1].name
    page.keyboard.press("ArrowLeft")
    panel = page.locator("#layer-panel")
    assert panel.locator("h4").inner_text() == report.layers[-2].name
    for said in (
        "Kurtosis",
        "Why this scheme:",
        "would save",
        "1 kB is worth about",
        "largest at timestep",
    ):
        assert said in panel.inner_text(), said
    assert panel.locator(".steps span").count() == len(report.loss_timesteps)
    # One tab stop for all layers.
    assert page.locator('#layers .block[tabindex="0"]').count() == 1


def test_everything_that_takes_focus_has_a_name(open_page):
    page = open_page(html_page(make_report()))
    for kind in ("slider", "button", "radio", "combobox", "link", "region"):
        assert page.get_by_role(kind).count() > 0, kind
        for line in page.locator("body").aria_snapshot().splitlines():
            bare = line.strip().removeprefix("- ").rstrip(":")
            assert bare != kind, f"a {kind} without a name"


def test_light_and_dark_differ_and_print_leaves_controls_out(open_page):
    text = html_page(make_report())
    grounds = []
    for scheme in ("light", "dark"):
        page = open_page(text, color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[0]
    # A4 without its margins.
    page.set_viewport_size({"width": 700, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    for hidden in ("#image-modes", "#viewer", "#budget", "#layer-panel", "nav"):
        assert not page.locator(hidden).is_visible(), hidden
    for shown in ("h1", "#budget-strip", "#pictures", ".chart >> nth=0", "#provenance pre"):
        assert page.locator(shown).is_visible(), shown


def test_the_page_is_whole_without_scripts(open_page):
    page = open_page(html_page(make_report()), java_script_enabled=False)
    asking = page.locator(".needs-script")
    assert asking.count() >= 2
    assert not any(asking.nth(number).is_visible() for number in range(asking.count()))
    assert not page.locator("#budget-box").is_visible() and not page.locator("#viewer").is_visible()
    page.get_by_text("All plans as a table").click()
    assert page.locator("#budgets tbody tr").count() == len(make_report().budgets.plans) + 1


def test_the_sweep_page_has_its_own_slider(open_page):
    rows = make_report().layers
    points = [
        {
            "budget": 0.3,
            "size_ratio": 0.3,
            "size_bytes": 300,
            "predicted_nmse": 2e-5,
            "measured_nmse": 1.8e-5,
        },
        {
            "budget": 0.4,
            "size_ratio": 0.4,
            "size_bytes": 400,
            "predicted_nmse": 2e-6,
            "measured_nmse": 2.2e-6,
        },
        {"budget": 0.1, "smallest_feasible_bytes": 200},
    ]
    points[0]["psnr_db"] = 50.0
    control = {
        "title": "Everything INT8",
        "size_ratio": 0.5,
        "measured_nmse": 1e-3,
        "psnr_db": 41.0,
    }
    about = {"model": HOSTILE, "target": "rtx", "synthetic": "", "command": HOSTILE}
    result = {"points": points, "controls": {"int8": control}, "simulated": True}
    for point in points[:2]:
        point["latency_ms"] = 0.61
    page = open_page(sweep_page(result, make_budgets(rows, timed=True), about))
    before = page.locator("#budget-size").inner_text()
    label, slider = (
        page.locator(f"{kind}#{name}").bounding_box()
        for kind, name in (("output", "time-limit"), ("input", "time"))
    )
    assert label["x"] + label["width"] <= slider["x"]
    page.get_by_role("slider", name="Budget").press("ArrowRight")
    assert page.locator("#budget-size").inner_text() != before
    text = page.locator("main").inner_text()
    for said in (
        "2 budgets measured",
        "between 0.91 and 1.11",
        "50.0 dB",
        "no plan fits",
        "nominal",
        "Simulated",
        "0.610 ms",
    ):
        assert said in text, said
    assert not page.get_by_role("button", name="Back to this run").is_visible()


def test_frechet_distances_are_a_table_with_network_count_and_interval(open_page):
    page = open_page(html_page(make_report(frechet=(frechet_info(),))))
    section = page.get_by_role("region", name="Distribution of the images")
    assert "EfficientNet-Lite0" in section.inner_text() and "1,000 images" in section.inner_text()
    cells_ = section.get_by_role("table").get_by_role("row").nth(1).inner_text().split("\t")
    assert cells_[1:3] == ["0.123", "0.09 to 0.15"] and cells_[-1] == "below other noise's"


def test_scores_are_tables_of_the_plan_and_the_controls(open_page):
    page = open_page(html_page(make_report(scores=scores())))
    lpips, clip = (page.locator("#scores table").nth(number) for number in (0, 1))
    assert "lower is better" in page.locator("#scores p").first.inner_text()
    assert lpips.locator("tbody tr").count() == clip.locator("tbody tr").count() == 2
    assert lpips.locator("thead th").count() == 4
    assert "fits worse" in clip.locator("tbody tr").first.inner_text()
    assert page.locator('nav a[href="#scores"]').is_visible()


def test_long_prompts_fit_a_narrow_page(open_page):
    report = make_report()
    labels = tuple(
        f"a photograph of number {number}, in the style of an old master, " + "very " * 20
        for number in range(4)
    )
    page = open_page(
        html_page(make_report(images=ImageSet(report.images.images, labels, report.images.titles)))
    )
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_shade_tells_that_more_of_a_chart_lies_beside(open_page, scheme):
    page = open_page(html_page(make_report()), color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 900})
    box = page.locator(".scroll:has(> .chart)").first

    def shaded():
        # Most of a chart's rows are empty: their colour is the ground's, here and at both edges.
        seen = shot(box).astype(int)
        ground, *edges = (np.median(seen[:, x], axis=0) for x in (seen.shape[1] // 2, 1, -2))
        return [float(abs(edge - ground).max()) > 10 for edge in edges]

    assert shaded() == [False, True]
    box.evaluate("box => box.scrollLeft = 80")
    assert shaded() == [True, True]
    box.evaluate("box => box.scrollLeft = box.scrollWidth")
    assert shaded() == [True, False]
    page.set_viewport_size({"width": 1200, "height": 900})
    assert shaded() == [False, False]


@pytest.mark.parametrize("width", [1280, 1024])
def test_distances_are_seen_whole_on_a_desktop(open_page, width):
    """The verdict is the last column: cut off it would be read as nothing said."""
    long = Interval(low=0.000136, high=0.000342)
    rows = {
        name: (
            frechet_info(
                variant=name, distance=0.0002391, floor=0.0, interval=long, increase_interval=long
            ),
        )
        for name in ("ours", "int4", "int8")
    }
    text = html_page(make_report(frechet=rows.pop("ours"), frechet_controls=rows))
    page = open_page(text)
    page.set_viewport_size({"width": width, "height": 900})
    region = page.locator("#distribution .scroll").first
    assert region.evaluate("one => one.scrollWidth - one.clientWidth") <= 0
    heads = region.locator("thead th").all_inner_texts()
    assert heads[-1] == "verdict" and all(heads)
    last = region.locator("tbody tr").first.locator("td").last
    box, room = last.bounding_box(), region.bounding_box()
    assert box["x"] + box["width"] <= room["x"] + room["width"] + 1
