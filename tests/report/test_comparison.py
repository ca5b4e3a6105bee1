"""Reports read again, and compared: what changed, what cannot be subtracted, damaged and unknown files."""

import json

import pytest
from typer.testing import CliRunner

from mpq_deploy.cli import app
from mpq_deploy.errors import UsageError
from mpq_deploy.report.compare import compare_reports, figure_difference, plan_change
from mpq_deploy.report.comparison import comparison_markdown, comparison_page, comparison_text
from mpq_deploy.report.data import SCHEMA_VERSION, Control, EvaluationInfo, Interval, ModelInfo
from mpq_deploy.report.read import read_report
from mpq_deploy.report.seal import report_json
from mpq_deploy.report.words import intervals_note
from mpq_deploy.report.write import write_reports
from tests.report.sample_report import distance_row, expected_row, layer_rows, make_report

RUNNER = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
EACH = (54.0, 56.0, 58.5, 58.06)


def finite(values):
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        return False
    return True


def evaluated(**changes):
    return EvaluationInfo(**{"samples": 4, "steps": 20, "seed": 1, "sampler": "DDIM", **changes})


@pytest.fixture
def reported(tmp_path):
    def write(data=None, name="report.json", without=(), **changes):
        path = tmp_path / name
        values = {**(data or make_report()).as_json(), **changes}
        values = {key: value for key, value in values.items() if key not in without}
        path.write_text(
            report_json(values) if finite(values) else json.dumps(values), encoding="utf-8"
        )
        return read_report(path)

    return write


def test_a_run_is_the_same_as_itself(reported):
    data = make_report(psnr_db_each=EACH, evaluation=evaluated())
    pair = compare_reports([reported(data), reported(data)]).pairs[0]
    assert (pair.size_bytes, pair.obstacles, pair.nmse_ratio) == (0, (), 1.0)
    assert (pair.psnr_db.value, pair.psnr_db.interval) == (0.0, (0.0, 0.0))
    assert pair.plan.changed == 0


def test_the_plan_s_changes_are_counted_and_the_largest_named(reported):
    rows = list(layer_rows())
    sizes = sorted((row for row in rows if row.scheme == "w4a16-b32"), key=lambda row: -row.bytes)
    moved = {sizes[0].name: "w8a16", sizes[1].name: "w8a16", sizes[-1].name: "fp16"}
    after = tuple(
        row.model_copy(update={"scheme": moved[row.name], "bytes": 2 * row.bytes})
        if row.name in moved
        else row
        for row in rows
    )
    change = plan_change(reported(), reported(make_report(layers=after), "new.json"))
    assert (change.changed, change.common) == (3, len(rows))
    assert [(m.before, m.after, m.layers) for m in change.moves] == [
        ("w4a16-b32", "w8a16", 2),
        ("w4a16-b32", "fp16", 1),
    ]
    assert change.moves[0].bytes_before == sizes[0].bytes + sizes[1].bytes
    assert sum(move.bytes_after for move in change.moves) == 2 * sum(
        move.bytes_before for move in change.moves
    )
    assert [layer.name for layer in change.largest] == [
        sizes[0].name,
        sizes[1].name,
        sizes[-1].name,
    ]


def test_layers_of_one_plan_only_are_named(reported):
    change = plan_change(reported(), reported(make_report(layers=layer_rows()[1:]), "new.json"))
    assert change.only_first == (layer_rows()[0].name,)
    assert change.only_other == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2}, "The seeds of the noise differ: 1 and 2."),
        ({"samples": 5}, "The numbers of images differ: 4 and 5."),
        ({"sampler": "DDPM"}, "The samplers differ: DDIM and DDPM."),
        ({"steps": 10}, "The numbers of steps differ: 20 and 10."),
        ({"image_kind": "latents"}, "The kinds of image differ: pixels and latents."),
    ],
    ids=str,
)
def test_figures_of_other_conditions_are_not_subtracted(reported, changes, said):
    first = reported(make_report(evaluation=evaluated()))
    other = reported(make_report(evaluation=evaluated(**changes)), "new.json")
    comparison = compare_reports([first, other])
    pair = comparison.pairs[0]
    assert pair.obstacles == (said,)
    assert (pair.psnr_db, pair.ssim, pair.nmse_ratio) == (None, None, None)
    flat = " ".join(comparison_text(comparison).split())
    assert said in flat
    assert "quality is not compared" in flat


def test_other_models_are_said_plainly(reported):
    other = make_report(model=ModelInfo(name="digits", source=""), layers=layer_rows()[2:])
    pair = compare_reports([reported(), reported(other, "new.json")]).pairs[0]
    assert pair.obstacles == ("The models differ: emoji and digits.",)
    assert pair.plan is None


def test_swapping_two_runs_changes_the_sign(reported):
    first = reported(make_report(psnr_db_each=EACH, evaluation=evaluated()))
    better = tuple(value + 0.1 * number for number, value in enumerate(EACH))
    data = make_report(psnr_db=56.79, psnr_db_each=better, evaluation=evaluated())
    other = reported(data, "new.json")
    there, back = (
        figure_difference(first, other, "psnr_db"),
        figure_difference(other, first, "psnr_db"),
    )
    assert there.value == pytest.approx(-back.value)
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=0.02)


def test_every_form_escapes_what_the_reports_hold(reported):
    evil = "<script>alert(1)</script>|*x*"
    data = make_report(model=ModelInfo(name=evil, source=""))
    comparison = compare_reports([reported(data), reported(data, "new.json")])
    page = comparison_page(comparison)
    assert "<script>alert" not in page
    assert "<script>alert" not in comparison_markdown(comparison)
    assert page.count("http") == page.count('http-equiv="Content-Security-Policy"')


def test_the_terminal_s_table_keeps_80_columns_for_many_runs(reported):
    long = "a_rather_long_name_for_a_block." * 4
    rows = tuple(
        row.model_copy(update={"name": f"{long}{n}"}) for n, row in enumerate(layer_rows())
    )
    moved = tuple(row.model_copy(update={"scheme": "w4a16-b128+rows2"}) for row in rows)
    interval = Interval(low=155.123, high=158.4)
    names = ["report.json", *(f"{n}.json" for n in range(12))]
    data = [
        make_report(layers=rows if n % 2 else moved, psnr_db_interval=interval)
        for n in range(len(names))
    ]
    reports = [
        reported(d, name).model_copy(update={"label": name})
        for d, name in zip(data, names, strict=True)
    ]
    text = comparison_text(compare_reports(reports))
    # Only a name without a space may be longer.
    assert max(len(line) for line in text.splitlines() if long not in line) <= 80
    assert max(len(line) for line in text.splitlines() if " -> " in line) <= 80


def test_keys_of_a_later_release_of_the_same_schema_are_passed_over(reported):
    layers = [{**row.model_dump(mode="json"), "news": 1} for row in layer_rows()]
    assert reported(news={"a": 1}, layers=layers).psnr_db == 56.64


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no report"),
        ("", "is not JSON"),
        (b"\xff\xfe{", "not UTF-8 text"),
        ("[]", "holds a list"),
        ("[" * 100_000, "nested more than"),
        ("{}", "schema_version is None"),
        ('{"schema_version": true}', "schema_version is True"),
        ('{"schema_version": "2"}', "schema_version is '2'"),
        (
            f'{{"schema_version": {SCHEMA_VERSION + 1}}}',
            f"has schema {SCHEMA_VERSION + 1}; this release reads {SCHEMA_VERSION}",
        ),
        (report_json({"schema_version": SCHEMA_VERSION}), "is damaged: model"),
    ],
    ids=str,
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said) as caught:
        read_report(path)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_report_that_was_cut_short_is_refused(tmp_path, share):
    text = json.dumps(make_report().as_json())
    path = tmp_path / "report.json"
    path.write_text(text[: int(share * len(text))], encoding="utf-8")
    with pytest.raises(UsageError, match="is not JSON"):
        read_report(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"psnr_db": float("nan")},
        {"size_bytes": -1},
        {"fp16_size_bytes": 0},
        {"layers": [layer_rows()[0].model_dump(mode="json")] * 2},
        {"psnr_db_each": [40.0]},
    ],
    ids=str,
)
def test_impossible_values_are_refused(reported, changes):
    with pytest.raises(UsageError, match="is damaged" if finite(changes) else "is nan"):
        reported(**changes)


def test_a_run_folder_is_read_and_a_former_plan_s_report_refused(tmp_path):
    data = make_report()
    write_reports(data, tmp_path)
    plan = tmp_path / "allocate" / "plan.json"
    plan.parent.mkdir()
    rows = [{"name": row.name, "scheme": row.scheme} for row in data.layers]
    plan.write_text(json.dumps({"layers": rows}), encoding="utf-8")
    assert read_report(tmp_path).size_bytes == data.size_bytes
    rows[0]["scheme"] = "w8a8"
    for other in ({"layers": rows}, {"layers": 3}, {}):
        plan.write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(UsageError, match="an earlier plan"):
            read_report(tmp_path)


def test_one_run_alone_is_refused(reported):
    with pytest.raises(UsageError, match="Only 1 run"):
        compare_reports([reported()])


def test_the_command_line_prints_every_form(tmp_path, reported):
    reported(), reported(name="new.json")
    paths = [str(tmp_path / "report.json"), str(tmp_path / "new.json")]
    page = tmp_path / "compare.html"
    plain = RUNNER.invoke(app, ["compare", *paths, "--html", str(page)])
    assert plain.exit_code == 0, plain.output
    assert "2 against 1" in plain.stdout
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert RUNNER.invoke(app, ["compare", *paths, "--markdown"]).stdout.startswith("## Comparison")
    found = json.loads(RUNNER.invoke(app, ["compare", *paths, "--json"]).stdout)
    assert [run["label"] for run in found["runs"]] == paths
    assert found["against_first"][0]["size_bytes"] == 0


def test_a_report_shows_its_intervals(tmp_path):
    interval = Interval(low=55.31, high=57.92)
    control = Control(
        title="Everything INT8",
        size_bytes=1,
        size_ratio=0.5,
        psnr_db=42.2,
        psnr_db_interval=interval,
    )
    data = make_report(
        psnr_db_interval=interval,
        ssim_interval=Interval(low=0.9, high=1),
        controls={"int8": control},
    )
    _, markdown, page = write_reports(data, tmp_path)
    for path in (markdown, page):
        text = path.read_text(encoding="utf-8")
        assert "56.6 dB (55.3 to 57.9)" in text
        assert "42.2 dB (55.3 to 57.9)" in text
        assert "0.9991 (0.9000 to 1.0000)" in text
        assert intervals_note(data) in text
    assert intervals_note(make_report(measured_nmse=None)) == ""
    assert "no interval" in intervals_note(make_report())
    ends = Interval(low=1.5e-6, high=2.04e-6)
    one = make_report(nmse_interval=ends, predicted_interval=ends, prediction_note="Of 96 calls.")
    _, markdown, page = write_reports(one, tmp_path)
    for path in (markdown, page):
        text = path.read_text(encoding="utf-8")
        assert "1.7 (1.5 to 2.0) × 10⁻⁶" in text and "no interval" not in text
        assert "Of 96 calls." in text


def distance(value, **changes):
    ends = {"low": 0.9 * value, "high": 1.1 * value}
    return distance_row(
        **{"distance": value, "interval": ends, "samples": 200, "seed": 5, **changes}
    )


@pytest.mark.parametrize(
    ("value", "ends"),
    [
        (2.0, "their intervals lie apart."),
        (1.1, "their intervals overlap: no difference is shown."),
    ],
    ids=["apart", "overlapping"],
)
def test_frechet_distances_of_one_kind_are_held_against_each_other(reported, value, ends):
    first = reported(frechet=[distance(1.0), distance(3.0, samples=50)])
    comparison = compare_reports([first, reported(name="new.json", frechet=[distance(value)])])
    said = f"Frechet distance (demo), 200 images, DDIM, seed 5, to the float model's images: {value:g}, the first's 1; "
    for text in (
        comparison_text(comparison),
        comparison_markdown(comparison),
        comparison_page(comparison),
    ):
        flat = " ".join(text.replace("&#39;", "'").split())
        assert said + ends in flat
        assert "50 images" in flat
    assert len(comparison.pairs[0].distances) == 1


def test_distances_that_cannot_be_compared_are_said(reported):
    first = reported(frechet=[distance(1.0)])
    fewer = compare_reports([first, reported(name="new.json", frechet=[distance(1.0, samples=50)])])
    assert "differ in network, images, sampler or seed" in " ".join(comparison_text(fewer).split())
    none = compare_reports([first, reported(name="new.json")])
    assert "has no Frechet distance to compare" in " ".join(comparison_text(none).split())
    other = make_report(model=ModelInfo(name="digits", source=""), layers=layer_rows()[2:])
    assert (
        compare_reports([first, reported(other, "new.json", frechet=[distance(1.0)])])
        .pairs[0]
        .distances
        == ()
    )


def test_estimated_latencies_are_compared_on_one_basis_alone(reported):
    def estimated(name, milliseconds, basis):
        return reported(name=name, expected_latency=expected_row(milliseconds, basis))

    same = compare_reports(
        [estimated("a.json", 2.0, "peak figures"), estimated("b.json", 3.0, "peak figures")]
    )
    assert "Estimated latency: 3.00 ms, the first's 2.00 ms." in " ".join(
        comparison_text(same).split()
    )
    apart = compare_reports(
        [estimated("a.json", 2.0, "peak figures"), estimated("b.json", 3.0, "a table")]
    )
    assert apart.pairs[0].latency is None
