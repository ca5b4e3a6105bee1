"""The three reports: complete, finite, escaped, self-contained; and the page alive in a real browser."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mpq_deploy.report.charts import size_quality_chart
from mpq_deploy.report.data import (
    CHOSEN_FP16,
    Control,
    CurvePoint,
    EngineInfo,
    ExpectedLatency,
    ImageSet,
    ImportanceInfo,
    LayerRow,
    ModelInfo,
    OrmPictures,
    TargetInfo,
    kept_in_fp16,
)
from mpq_deploy.report.markdown import markdown_report, plain
from mpq_deploy.report.network import network_rows
from mpq_deploy.report.orthogonality_charts import orm_view, pool
from mpq_deploy.report.page import html_page
from mpq_deploy.report.pictures import picture_table
from mpq_deploy.report.svg import log_ticks, nice_ticks, spread_out
from mpq_deploy.report.words import (
    decibels,
    digits,
    duration,
    error,
    glance_rows,
    headline,
    latency_rows,
    size,
)
from mpq_deploy.report.write import write_reports
from tests.report.sample_report import LABELS, make_report, pictures

STYLE = Path(__file__).parents[2] / "mpq_deploy" / "report" / "templates" / "style.css"
HOSTILE = "<script>alert('x')</script>&\"|`{{7*7}}"
VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what there is."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.headings, self.images, self.text = [], [], [], [], []
        self.references, self.attributes, self.scripts = [], [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.attributes += attrs
        self.ids += [named["id"]] if "id" in named else []
        self.headings += [int(tag[1])] if re.fullmatch(r"h\d", tag) else []
        self.images += [named] if tag == "img" else []
        self.scripts += tag == "script"
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += named.get(name, "").split()
        if named.get("href", "").startswith("#"):
            self.references.append(named["href"][1:])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture
def report():
    return make_report()


def bare_report():
    """Nothing but a plan: no evaluation, controls, engine or pictures."""
    return make_report(
        measured_nmse=None,
        psnr_db=None,
        ssim=None,
        timesteps=(),
        nmse_by_timestep=(),
        evaluation=None,
        controls={},
        engine=None,
        engine_note="The target has no builder.",
        cpu_latency=None,
        others=(),
        stages=(),
        solver=None,
        notes=(),
        versions={},
        images=None,
    )


def identical_report():
    return make_report(
        psnr_db=None, identical=True, measured_nmse=0.0, nmse_by_timestep=(0.0,) * 10
    )


def orm_report(layers=60, steps=4, **changes):
    """A plan by orm: no prediction, importances, and matrices of ``layers`` layers, the first ones constant."""
    rng = np.random.default_rng(4)
    row = make_report().layers[5]
    names = tuple(f"blocks.{i}.attn.to_q" for i in range(layers))
    orm = rng.uniform(-0.05, 1, (steps, layers, layers))
    orm = (orm + orm.transpose(0, 2, 1)) / 2
    orm[:, [0, 1], [1, 0]] = -0.05
    orm[:, range(layers), range(layers)] = 1
    pictures = OrmPictures(
        names,
        np.linspace(900, 50, steps),
        np.full(steps, 1 / steps),
        rng.uniform(0.4, 0.6, (steps, layers)),
        orm,
        np.arange(layers) < 2,
    )
    info = ImportanceInfo(
        settings="Importance: exp(-1 gamma), debiased ORM",
        timesteps=tuple(np.linspace(900, 50, steps)),
        weights=(1 / steps,) * steps,
        weighted_bits=90.0,
        linear_bound=100.0,
        calls=16,
        constant=2,
    )
    given = {"predicted_loss": None, "importance": 0.5, "linear_bits": 6.25}
    rows = tuple(row.model_copy(update={"name": name, **given}) for name in names)
    values = {
        "layers": rows,
        "predicted_nmse": None,
        "sensitivity": "orm",
        "importance": info,
        "orm": pictures,
    }
    return make_report(**{**values, **changes})


# JSON


def test_json_has_the_promised_keys(report, tmp_path):
    written = write_reports(report, tmp_path)
    assert [path.name for path in written] == ["report.json", "report.md", "report.html"]
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for key in [
        "budget",
        "size_bytes",
        "fp16_size_bytes",
        "size_ratio",
        "predicted_nmse",
        "measured_nmse",
        "psnr_db",
        "ssim",
    ]:
        assert isinstance(found[key], int | float), key
    for control in ("int8", "int4"):
        assert {"size_ratio", "measured_nmse", "psnr_db"} <= set(found["controls"][control])
    assert {
        "backend",
        "version",
        "file",
        "sha256",
        "weights_bytes",
        "verified",
        "build_seconds",
    } <= set(found["engine"])
    assert {"name", "op", "scheme", "bytes", "predicted_loss", "weights", "refused"} <= set(
        found["layers"][0]
    )
    assert {"name", "seconds", "peak_rss_bytes", "cached", "device"} == set(found["stages"][0])
    assert {"name", "source", "labels", "synthetic"} <= set(found["model"])
    assert {"status", "gap", "seconds"} == set(found["solver"])
    assert (
        found["versions"]
        and found["reproduce"]
        and found["target"]
        and found["schema_version"] == 3
    )
    assert "images" not in found
    assert list(found) == sorted(found)
    assert found["size_ratio"] == found["size_bytes"] / found["fp16_size_bytes"] <= found["budget"]
    assert sum(t["bytes"] for t in found["totals"]) + found["fixed_bytes"] == found["size_bytes"]


@pytest.mark.parametrize("make", [make_report, bare_report, identical_report, orm_report])
def test_json_is_strict_and_repeats(make, tmp_path):
    def refuse(token):
        raise AssertionError(token)

    first, second = (
        write_reports(make(), tmp_path / name)[0].read_text(encoding="utf-8") for name in "ab"
    )
    assert first == second
    json.loads(first, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "field", ["psnr_db", "measured_nmse", "predicted_nmse", "nmse_by_timestep"]
)
def test_numbers_that_are_not_finite_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        make_report(**{field: (value,) if field == "nmse_by_timestep" else value})


def test_a_failed_write_leaves_the_former_reports(report, tmp_path, monkeypatch):
    write_reports(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_reports(bare_report(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Markdown


@pytest.mark.parametrize("make", [make_report, bare_report, identical_report])
def test_markdown_tables_are_well_formed(make):
    text = markdown_report(make())
    assert "<" not in text.replace("\\<", "")
    for block in text.split("\n\n"):
        if block.startswith("|"):
            counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(counts) == 1
            assert re.fullmatch(r"\| ---( \| ---:)* \|", block.splitlines()[1])
    assert text.startswith("## ") and text.endswith("\n")
    assert len(text.splitlines()) < 90


def test_what_computed_is_shown_where_it_was_no_cpu():
    rows = make_report().stages
    rows = (rows[0].model_copy(update={"device": "cuda:1"}), *rows[1:])
    for shown in (markdown_report, html_page):
        assert shown(make_report(stages=rows)).count("on cuda:1") == 1
        assert "on cuda" not in shown(make_report())


def test_markdown_shows_text_as_it_is():
    assert plain("a|b*c_<d>\n# e") == r"a\|b\*c\_\<d\> \# e"
    text = markdown_report(
        make_report(model=ModelInfo(name=HOSTILE, source="x"), reproduce="a ``` b")
    )
    assert "<script>" not in text.replace("\\<", "\\\0")
    assert "````\na ``` b\n````" in text


# HTML


@pytest.mark.parametrize("make", [make_report, bare_report, identical_report])
def test_page_is_well_formed_and_accessible(make):
    page = Page(html_page(make()))
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(page.headings))
    assert all(image.get("alt") for image in page.images)


@pytest.mark.parametrize("make", [make_report, bare_report])
def test_page_reaches_for_nothing_outside(make):
    text = html_page(make())
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    found = re.findall(
        r"""(?:src|href|action|poster)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)""", markup
    )
    targets = [a or b for a, b in found]
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert len(targets) > 4
    assert not re.search(r"https?://|@import|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


def test_every_string_of_the_user_is_escaped():
    row = (
        make_report()
        .layers[0]
        .model_copy(update={"name": HOSTILE, "op": HOSTILE, "refused": {HOSTILE: HOSTILE}})
    )
    hostile = make_report(
        model=ModelInfo(name=HOSTILE, source=HOSTILE, synthetic=HOSTILE),
        target=TargetInfo(name=HOSTILE, title=HOSTILE, dialect=HOSTILE),
        layers=(row,),
        reproduce=HOSTILE,
        notes=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        controls={HOSTILE: make_report().controls["int8"].model_copy(update={"title": HOSTILE})},
        images=ImageSet({"float": pictures(0), "ours": pictures(1)}, (HOSTILE,) * 8),
    )
    text = html_page(hostile)
    page = Page(text)
    assert page.scripts == 2, "the layers' details and the script"
    assert "alert('x')" not in text
    assert "".join(page.text).count("<script>alert('x')</script>") > 10
    assert "`49" not in text
    details = re.search(r'id="layer-details">(.*?)</script>', text, re.DOTALL).group(1)
    assert json.loads(details)[0]["name"] == HOSTILE


def test_page_says_what_it_should(report):
    text = " ".join("".join(Page(html_page(report)).text).split())
    for said in (
        "of the FP16 size:",
        "match the original model's to 56.6 dB PSNR",
        "Everything INT8 takes 50.3 % and reaches 42.2 dB",
        "by image: Everything INT4 +29.1 dB (28.2 to 30.0) on 8 of 16 images.",
        "clear of zero by 0.5 dB",
        "1.7 × 10⁻⁶",
        "Not measured here",
        "Every planned layer has the planned type",
        "mpq-deploy build --budget 0.35",
        "not the target device",
        "up_blocks.2.resnets.2.conv1",
        "The recipe protects 'conv_in'",
        "TensorRT has no INT8 or INT4 ConvTranspose",
        "1.42 GB",
        "onnxruntime",
        "style.safetensors, scale 0.8, SHA-256 abababababababab: 32 layers of unet",
    ):
        assert said in text, said


def test_page_without_evaluation_or_engine_says_so():
    text = " ".join("".join(Page(html_page(bare_report())).text).split())
    for said in (
        "have not been compared",
        "No engine was built.",
        "The target has no builder.",
        "not measured",
    ):
        assert said in text
    assert "identical" in html_page(identical_report())


def test_page_keeps_below_its_limit_with_large_pictures():
    noise = np.random.default_rng(0).integers(0, 256, (9, 256, 256, 3), np.uint8)
    large = make_report(
        images=ImageSet(dict.fromkeys(("float", "ours", "int8", "int4"), noise), LABELS)
    )
    text = html_page(large)
    assert len(text.encode()) < 5_000_000
    assert "of their size" in text and "8 of the 9 samples" in " ".join(text.split())
    assert len(html_page(make_report()).encode()) < 500_000


def test_a_thousand_layers_fit():
    row = make_report().layers[5]
    many = tuple(row.model_copy(update={"name": f"blocks.{i}.attn.to_q"}) for i in range(1000))
    assert len(html_page(make_report(layers=many)).encode()) < 3_000_000
    assert len(network_rows(many)) == 1


def test_orthogonality_of_many_layers_and_timesteps_fits():
    text = html_page(orm_report(layers=800, steps=50))
    assert len(text.encode()) < 4_000_000
    assert "12 timesteps of 50 measured" in text and "4 × 4 layers" in text
    assert "a point is the mean" not in html_page(orm_report())


def test_a_plan_by_orm_claims_no_prediction():
    for text in (html_page(orm_report()), markdown_report(orm_report())):
        assert "not predicted" in text and "90.0 %" in text and "predicted 1.4" not in text
    text = html_page(orm_report())
    assert "Chart of predicted" not in text and 'id="orthogonality"' in text and "6.25 bits" in text
    assert "2 layers that are the same for all calls" in " ".join(text.split())
    assert orm_report().prediction_ratio is None
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
    assert all("alt" in image for image in page.images)


def test_heat_maps_keep_their_values():
    data = orm_report(layers=7).orm
    view = orm_view(data)
    assert view.pooled == 1 and view.low == -0.1
    image = Image.open(io.BytesIO(base64.b64decode(view.maps[2].uri.split(",")[1])))
    colours = [
        ",".join(map(str, colour)) for colour in np.asarray(image.convert("RGB")).reshape(-1, 3)
    ]
    read = (
        view.low
        + (1 - view.low) * np.array([view.palette.index(colour) for colour in colours]) / 100
    )
    assert np.abs(read.reshape(7, 7) - data.orm[2]).max() <= 0.0056
    assert np.allclose(pool(np.arange(9.0).reshape(3, 3), 2), [[2, 3.5], [6.5, 8]])
    assert len(set(view.palette)) == len(view.palette)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pictures_of_any_channels(channels):
    batch = pictures(0)[..., :1].repeat(channels, axis=-1)
    table = picture_table(ImageSet({"float": batch}), {})
    assert (
        table.shown == 8
        and table.width == 32
        and table.reduction == 1
        and table.rows[0].title == "float"
    )


def test_colours_have_enough_contrast():
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0]))
    for changes in blocks:
        colours = {**light, **dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", changes))}
        text = [
            ("ink", "paper"),
            ("quiet", "paper"),
            ("accent", "paper"),
            ("bad", "paper"),
            ("ink", "raised"),
        ]
        text += [("quiet", "raised"), ("ink", "accent-soft"), ("on-w8a8", "w8a8")]
        text += [
            ("on-scheme", scheme) for scheme in ("fp16", "w8a16", "w4a16", "w4a8", "other-scheme")
        ]
        for ink, ground in text:
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for mark in ("accent", "int8", "int4", "strong-line"):
            assert contrast(colours[mark], colours["paper"]) >= 3, mark


def contrast(first, second):
    """WCAG 2.2, contrast ratio."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Words, groups, axes


def test_reasons_for_fp16():
    rows = {entry.reason: entry for entry in kept_in_fp16(make_report())}
    assert rows[CHOSEN_FP16].names == ("time_embedding.linear_1", "conv_out")
    assert rows["the recipe protects 'conv_in'"].count == 1
    assert [entry.kind for entry in kept_in_fp16(make_report())] == [
        "layer",
        "layer",
        "other",
        "other",
    ]
    row = LayerRow(name="a", op="Conv", scheme="fp16", bytes=2, fp16_bytes=2, weights=1)
    assert kept_in_fp16(make_report(layers=(row,), others=()))[0].reason == CHOSEN_FP16


def test_network_keeps_order_and_every_layer(report):
    rows = network_rows(report.layers)
    assert [block.index for row in rows for block in row.blocks] == list(range(len(report.layers)))
    assert sum(row.bytes for row in rows) == sum(layer.bytes for layer in report.layers)
    assert max(sum(block.width for block in row.blocks) for row in rows) == pytest.approx(100)
    assert [row.name for row in rows][:4] == [
        "time_embedding",
        "conv_in",
        "down_blocks.0",
        "down_blocks.1",
    ]


def test_a_control_is_compared_on_the_images_that_it_has():
    report = make_report()
    few = report.controls["int4"].model_copy(update={"title": "Everything INT8"})
    fewer = make_report(controls={"int8": few})
    assert "reaches 27.3 dB on 8 of them" in headline(fewer)[2]
    # Not 56.6 - 27.3: that of the plan is over all of its images.
    assert "+29.1 dB against everything INT8" in html_page(fewer)


def test_headline_is_fair_when_int8_is_better():
    worse = make_report(psnr_db=40.0)
    assert "40.0 dB" in headline(worse)[1] and "42.2 dB" in headline(worse)[2]
    assert "-2.2 dB against everything INT8" in html_page(
        worse
    ) and "more squared pixel error" in html_page(worse)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_700, "1.00 MB"),
        (1_414_000, "1.41 MB"),
        (2.5e9, "2.50 GB"),
    ],
)
def test_sizes(value, said):
    assert size(value) == said


def test_numbers_as_read():
    assert error(1.66e-6) == "1.7 × 10⁻⁶" and error(0.0) == "0" and error(None) == "not measured"
    assert error(12.0) == "1.2 × 10¹"
    assert decibels(None, True) == "identical images" and decibels(None) == "not measured"
    assert [digits(v) for v in (9.996, 0.5, 141.4, 12345.0, 0)] == [
        "10.0",
        "0.500",
        "141",
        "12,300",
        "0",
    ]
    assert [duration(v) for v in (0.42, 12.34, 125.2, 119.7)] == [
        "0.42 s",
        "12.3 s",
        "2 min 5 s",
        "2 min 0 s",
    ]


def test_axes_enclose_their_values():
    for values in ([0.28, 0.503], [42.0], [0.0], [56.6, 27.3, 42.2], [-3.0, 4.0]):
        ticks = nice_ticks(values, 5)
        assert ticks[0] < min(values) and ticks[-1] > max(values) and len(ticks) <= 9
    assert log_ticks([1.4e-6, 2e-3]) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    assert log_ticks([1e-3]) == pytest.approx([1e-3, 1e-2])
    moved = spread_out([10, 11, 12, 100], 17)
    assert all(b - a >= 16.9 for a, b in pairwise(moved))


def test_curve_and_engine_latency_are_drawn():
    curve = tuple(
        CurvePoint(size_ratio=r, predicted_nmse=1e-6, psnr_db=40 + 100 * r)
        for r in (0.26, 0.3, 0.4)
    )
    engine = EngineInfo(
        backend="TensorRT",
        version="10.13",
        file="e",
        sha256="0",
        verified=False,
        latency_ms=12.5,
        latency_source="Orin",
    )
    text = html_page(make_report(curve=curve, engine=engine))
    assert "12.5 ms" in text and "Orin" in text and "Not verified" in text
    assert text.count('class="line series-ours"') == 3


def test_labels_of_plans_of_one_size_do_not_overlap():
    others = {
        name: Control(title=name, size_bytes=1, size_ratio=0.35, psnr_db=56.6)
        for name in ("size-only", "random")
    }
    text = size_quality_chart(make_report(controls=others))
    heights = sorted(float(y) for y in re.findall(r'class="label" x="[\d.]+" y="([\d.]+)"', text))
    assert len(heights) == 3 and min(b - a for a, b in pairwise(heights)) > 15


def test_control_with_identical_images():
    control = Control(title="INT8", size_bytes=1, size_ratio=0.5, measured_nmse=0.0, identical=True)
    text = html_page(make_report(controls={"int8": control}))
    assert "and gives identical images" in text


def test_the_corrected_variant_stands_beside_the_plan_and_is_no_control() -> None:
    report = make_report()
    changed = {"title": "Ours, corrected", "psnr_db": 57.7, "size_bytes": report.size_bytes}
    extra = report.controls["int8"].model_copy(update={**changed, "size_ratio": report.size_ratio})
    data = make_report(extras={"ours+ptqd": extra}, controls={})
    assert list(data.compared) == ["ours+ptqd"]
    for text in (html_page(data), markdown_report(data)):
        assert "Ours, corrected" in text
        assert "57.7 dB" in text
    # Only a control is what the headline compares with.
    assert not any("57.7" in sentence for sentence in headline(data))


def test_the_headline_says_which_latency_was_not_estimated():
    """A dash would be read as none."""
    times = {
        "ours_ms": 2.0,
        "fp16_ms": 3.0,
        "int8_ms": 2.5,
        "others_ms": 0.1,
        "batch": 1,
        "source": "estimated",
    }
    expected = ExpectedLatency(
        **times, basis="peak figures", measured=0, estimated=9, objective="error"
    )
    rows = {row[0]: row[-1] for row in glance_rows(make_report(expected_latency=expected))}
    assert rows["Everything FP16"] == "3.00 ms"
    assert rows["Everything INT4"] == "not estimated"
    known = make_report(expected_latency=expected.model_copy(update={"int4_ms": 2.75}))
    assert {row[0]: row[-1] for row in glance_rows(known)}["Everything INT4"] == "2.75 ms"
    assert ["Everything INT4", "2.75 ms"] in [row[:2] for row in latency_rows(known)]


def test_a_control_with_fewer_images_is_shown_with_those_that_all_have():
    images = ImageSet({"float": pictures(0), "ours": pictures(1), "int8": pictures(2)[:3]})
    table = picture_table(images, {})
    assert table.shown == 3 and table.total == 8
    assert {len(row.pictures) for row in table.rows} == {3}
