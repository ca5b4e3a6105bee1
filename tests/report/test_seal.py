"""The digest in report.json: changed figures are refused, another layout is read."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mpq_deploy.cli import app
from mpq_deploy.errors import UsageError
from mpq_deploy.report.read import read_report
from mpq_deploy.report.seal import report_json, values_digest
from mpq_deploy.report.write import write_reports
from tests.report.sample_report import make_report

RUNNER = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
NUMBER = re.compile(r"(?<=[ \[])-?\d+(?:\.\d+)?(?:e-?\d+)?(?=[,\n\]])")


@pytest.fixture
def report(tmp_path):
    return write_reports(make_report(), tmp_path)[0]


def refused(path, said):
    with pytest.raises(UsageError, match=said) as caught:
        read_report(path)
    assert caught.value.exit_code == 2 and str(path) in caught.value.message
    assert "\n" not in caught.value.message and "mpq-deploy report RUN" in caught.value.hint


def test_a_report_as_it_was_written_is_verified(report):
    assert (
        read_report(report).psnr_db == read_report(report.parent).psnr_db == make_report().psnr_db
    )


def test_any_digit_that_was_changed_is_noticed(report):
    text = report.read_text(encoding="utf-8")
    places = list(NUMBER.finditer(text))
    assert len(places) > 100
    for found in places[:: len(places) // 25]:
        # Another first digit: the JSON is whole, and the value another (which a seventeenth digit need not change).
        at = found.start() + found.group().startswith("-")
        report.write_text(text[:at] + str(int(text[at]) % 9 + 1) + text[at + 1 :], encoding="utf-8")
        # A schema that this release does not know is refused as such.
        refused(
            report,
            "has schema"
            if '"schema_version": ' in text[at - 20 : at]
            else "was changed after it was",
        )
    report.write_text(text, encoding="utf-8")
    assert read_report(report).label == str(report)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["model"].update(name="another"),
        lambda values: values.pop("pooled_psnr_db"),
        lambda values: values.update(news=1),
        lambda values: values["layers"].reverse(),
        lambda values: values.update(psnr_db=None),
        lambda values: values.update(psnr_db=float("nan")),
        lambda values: values.update(sha256="0" * 64),
        lambda values: values.update(sha256=None),
        lambda values: values.pop("sha256"),
    ],
    ids=[
        "word",
        "key lost",
        "key more",
        "order",
        "null",
        "NaN",
        "digest",
        "no digest",
        "digest lost",
    ],
)
def test_every_other_change_is_noticed(report, change):
    values = json.loads(report.read_text(encoding="utf-8"))
    change(values)
    report.write_text(json.dumps(values), encoding="utf-8")
    nan = isinstance(values.get("psnr_db"), float) and values["psnr_db"] != values["psnr_db"]
    refused(report, "'psnr_db' is nan" if nan else "was changed after it was written: its sha256")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_report_cut_short_is_no_json(report, share):
    text = report.read_text(encoding="utf-8")
    report.write_text(text[: int(share * len(text))], encoding="utf-8")
    refused(report, "is not JSON")


def as_javascript(value):
    """Numbers as JavaScript writes them: no fraction where there is none."""
    if isinstance(value, dict):
        return {key: as_javascript(value[key]) for key in reversed(list(value))}
    if isinstance(value, list):
        return [as_javascript(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize(
    "layout",
    [
        lambda values: json.dumps(values),
        lambda values: json.dumps(values, indent=4, ensure_ascii=False),
        lambda values: json.dumps(dict(reversed(list(values.items()))), separators=(",", ":")),
        lambda values: json.dumps(as_javascript(values), indent=2),
        lambda values: re.sub(r"(\d)e-0?(\d)", r"\1E-000\2", json.dumps(values)),
        lambda values: "\r\n" + json.dumps(values, indent="\t") + "\n\n",
    ],
    ids=["one line", "indented", "reversed", "javascript", "exponents", "tabs"],
)
def test_another_layout_of_the_same_values_is_verified(tmp_path, layout):
    data = make_report(
        psnr_db=57.0,
        ssim=1.0,
        measured_nmse=1.7e-06,
        psnr_db_interval={"low": 0.1 + 0.2, "high": 60},
    )
    path = write_reports(data, tmp_path)[0]
    before, figures = path.read_text(encoding="utf-8"), read_report(path)
    path.write_text(layout(json.loads(before)), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before
    assert read_report(path) == figures


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_values_go_through_json_without_another_digest(value):
    text = report_json({"value": value})
    assert (
        json.loads(text)["sha256"]
        == values_digest(text)
        == values_digest(json.dumps(json.loads(text)))
    )


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_two_floats_share_a_digest_only_where_they_are_equal(a, b):
    assert (values_digest(json.dumps({"x": a})) == values_digest(json.dumps({"x": b}))) == (a == b)


def test_neighbouring_numbers_and_types_differ():
    digests = [
        values_digest(f'{{"x": {x}}}')
        for x in (2**53, 2**53 + 1, 2**60, 2**60 + 1, "true", "1", '"1"', "0.1")
    ]
    digests += [
        values_digest('{"x": 0.10000000000000002}'),
        values_digest("{}"),
        values_digest('{"y": 1}'),
    ]
    assert len(set(digests)) == len(digests)
    assert (
        values_digest('{"x": 1.0}')
        == values_digest('{"x": 1}')
        == values_digest('{"x": 1e0, "sha256": "a"}')
    )


def test_the_commands_refuse_a_changed_report(report):
    report.write_text(
        report.read_text(encoding="utf-8").replace('"psnr_db": 56.64', '"psnr_db": 66.64'),
        encoding="utf-8",
    )
    gate = ["gate", str(report), "--min-psnr", "40"]
    for command in (gate, ["compare", str(report), str(report)]):
        changed = RUNNER.invoke(app, command)
        assert (
            isinstance(changed.exception, UsageError) and "was changed" in changed.exception.message
        )
