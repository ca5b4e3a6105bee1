"""The gate: monotone in its limits, what was not measured fails, baselines pair by image, bad input exits with 2."""

import json
import math
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mpq_deploy.cli import app
from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.interval import mean_interval
from mpq_deploy.report.data import DeviceInfo, EvaluationInfo, Interval, ModelInfo
from mpq_deploy.report.gate import Limits, check_gate, gate_junit, gate_markdown, gate_text
from mpq_deploy.report.read import read_report
from mpq_deploy.report.seal import report_json
from mpq_deploy.system.quantities import Budget, Latency
from tests.report.sample_report import distance_row, expected_row, make_report

RUNNER = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
ORIN = {"target": "rtx", "device": "RTX 4070", "builder": "tensorrt_rtx 1.7", "engine_bytes": 1}


def ms(milliseconds):
    return Latency.parse(f"{milliseconds}ms")


def scored(values, **changes):
    """A report whose images have the PSNRs ``values``."""
    low, high = mean_interval(values)
    return make_report(
        psnr_db=float(np.mean(values)),
        psnr_db_each=tuple(values),
        psnr_db_interval=Interval(low=low, high=high),
        evaluation=EvaluationInfo(samples=len(values), steps=20, seed=1, sampler="DDIM"),
        **changes,
    )


def device(**changes):
    return DeviceInfo(
        **{
            **ORIN,
            "layers_verified": True,
            "outputs_agree": True,
            "median_ms": 80.0,
            "calls": 30,
            **changes,
        }
    )


@pytest.fixture
def reported(tmp_path):
    """Write a report and read it again."""

    def write(data=None, name="report.json", **changes):
        path = tmp_path / name
        path.write_text(
            report_json({**(data or make_report()).as_json(), **changes}), encoding="utf-8"
        )
        return read_report(path)

    return write


def outcome(report, baseline=None, **limits):
    result = check_gate(report, Limits(**limits), baseline)
    assert len(result.outcomes) == 1
    assert result.passed == result.outcomes[0].passed
    return result.outcomes[0]


FIGURES = {"min_psnr": 56.64, "min_ssim": 0.99912, "max_nmse": 1.7e-6}


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(FIGURES)), scale=st.floats(0.5, 2), looser=st.floats(0, 1))
def test_a_looser_limit_passes_whatever_a_stricter_one_passes(
    tmp_path_factory, name, scale, looser
):
    report = sample(tmp_path_factory)
    # SSIM is at most 1.
    limit = min(FIGURES[name] * scale, 1.0) if name == "min_ssim" else FIGURES[name] * scale
    loose = limit * (1 - looser) if name.startswith("min") else limit * (1 + looser)
    strict_passes = outcome(report, **{name: limit}).passed
    assert outcome(report, **{name: loose}).passed or not strict_passes
    assert strict_passes == (
        FIGURES[name] >= limit if name.startswith("min") else FIGURES[name] <= limit
    )


@settings(max_examples=40, deadline=None)
@given(limit=st.floats(0.01, 1), looser=st.floats(0, 1))
def test_the_size_is_held_to_the_byte_and_monotone(tmp_path_factory, limit, looser):
    report = sample(tmp_path_factory)
    passes = outcome(report, max_size=Budget.parse(limit)).passed
    assert passes == (report.size_bytes <= int(limit * report.fp16_size_bytes))
    assert outcome(report, max_size=Budget.parse(limit + (1 - limit) * looser)).passed or not passes


def sample(tmp_path_factory, kept=SimpleNamespace(report=None)):  # noqa: B008
    if kept.report is None:
        path = tmp_path_factory.mktemp("gate") / "report.json"
        path.write_text(report_json(make_report().as_json()), encoding="utf-8")
        kept.report = read_report(path)
    return kept.report


def test_the_size_passes_at_its_own_bytes_and_fails_one_below(reported):
    report = reported()
    assert outcome(report, max_size=Budget.parse(f"{report.size_bytes}B")).passed
    assert not outcome(report, max_size=Budget.parse(f"{report.size_bytes - 1}B")).passed


@pytest.mark.parametrize(
    ("limits", "missing"),
    [
        ({"min_psnr": 1.0}, {"psnr_db": None}),
        ({"min_ssim": 0.1}, {"ssim": None}),
        ({"max_nmse": 1.0}, {"measured_nmse": None}),
        ({"max_latency": ms(1e9)}, {}),
        ({"max_frechet_increase": 1e9}, {}),
    ],
    ids=str,
)
def test_what_was_not_measured_fails_with_the_way_to_measure_it(reported, limits, missing):
    found = outcome(reported(**missing), **limits)
    assert found.status == "not measured"
    assert not found.passed
    assert "mpq-deploy" in found.detail


def test_a_cpu_s_time_is_no_latency_of_the_engine(reported):
    found = outcome(reported(), max_latency=ms(120.0))
    assert found.value is None
    assert "9.4 ms are not a latency of the engine" in found.detail


def test_an_estimate_counts_only_when_asked_for_and_says_so(reported):
    expected = {**expected_row(3.2, "a roofline"), "news": 1}
    report = reported(expected_latency=expected)
    found = outcome(report, max_latency=ms(5.0))
    assert found.status == "not measured"
    assert "--allow-estimate" in found.detail
    for limit, passes in ((5.0, True), (3.0, False)):
        (taken,) = check_gate(report, Limits(max_latency=ms(limit)), allow_estimate=True).outcomes
        assert taken.passed == passes
        assert "estimated" in taken.measured
        assert "a roofline" in taken.detail
    measured = reported(make_report(devices=(device(),)), expected_latency=expected)
    (taken,) = check_gate(measured, Limits(max_latency=ms(50.0)), allow_estimate=True).outcomes
    assert (taken.status, taken.value) == ("failed", 80.0)
    assert not check_gate(reported(), Limits(max_latency=ms(1e9)), allow_estimate=True).passed


def test_a_device_s_latency_counts_and_is_named(reported):
    slow = device(device="RTX 3050", median_ms=110.0)
    report = reported(make_report(devices=(device(), slow)))
    assert outcome(report, max_latency=ms(120.0)).passed
    found = outcome(report, max_latency=ms(100.0))
    assert (found.status, found.value) == ("failed", 110.0)
    assert "RTX 3050" in found.detail


def test_a_latency_of_another_target_says_so_and_one_of_another_engine_fails(reported):
    other = reported(make_report(devices=(device(target="jetson-agx-orin"),)))
    assert "jetson-agx-orin; the report's is rtx" in outcome(other, max_latency=ms(100.0)).detail
    wrong = reported(make_report(devices=(device(outputs_agree=False),)))
    found = outcome(wrong, max_latency=ms(100.0))
    assert found.status == "failed"
    assert "outputs there differ" in found.detail


def test_a_limit_inside_the_interval_is_said_to_be_so(reported):
    values = list(np.random.default_rng(0).normal(41, 3, 16))
    report = reported(scored(values))
    mean = float(np.mean(values))
    assert "inside it" in outcome(report, min_psnr=mean - 0.1).detail
    assert "inside it" in outcome(report, min_psnr=mean + 0.1).detail
    assert "inside it" not in outcome(report, min_psnr=mean - 10).detail
    assert "No interval" in outcome(reported(), min_psnr=40.0).detail


def test_a_figure_just_below_its_limit_is_not_shown_as_the_limit(reported):
    assert outcome(reported(psnr_db=39.99999), min_psnr=40.0).measured == "39.99999 dB"


def test_a_baseline_pairs_by_image(reported):
    rng = np.random.default_rng(1)
    hard = rng.normal(45, 8, 32)
    after = hard - 1.0 + 0.1 * rng.standard_normal(32)
    baseline, report = reported(scored(list(hard)), "old.json"), reported(scored(list(after)))
    found = outcome(report, baseline, max_psnr_drop=0.5)
    assert found.status == "failed"
    assert found.value == pytest.approx(np.mean(after - hard))
    assert found.interval[1] < -0.9  # far narrower than either report's own interval of about 5 dB
    assert outcome(report, baseline, max_psnr_drop=1.5).passed
    shuffled = reported(scored(list(after[::-1])))
    loose = outcome(shuffled, baseline, max_psnr_drop=1.5)
    assert np.ptp(loose.interval) > 10 * np.ptp(found.interval)


def test_a_difference_inside_the_noise_is_said_to_be_so(reported):
    rng = np.random.default_rng(2)
    before = rng.normal(45, 3, 16)
    after = before + 0.5 * (rng.standard_normal(16))
    found = outcome(
        reported(scored(list(after))), reported(scored(list(before)), "old.json"), max_psnr_drop=2.0
    )
    assert found.interval[0] < 0 < found.interval[1]
    assert "No difference is shown" in found.detail


def test_a_baseline_of_other_noise_is_not_subtracted(reported):
    values = [40.0, 41.0, 42.0]
    report = reported(scored(values))
    other = reported(scored(values), "old.json")
    other = other.model_copy(update={"evaluation": other.evaluation.model_copy(update={"seed": 7})})
    found = outcome(report, other, max_psnr_drop=100.0)
    assert (found.status, found.value) == ("not measured", None)
    assert "seeds of the noise differ: 7 and 1" in found.detail


def test_a_baseline_without_figures_of_each_image_is_subtracted_without_interval(reported):
    found = outcome(reported(psnr_db=56.0), reported(name="old.json"), max_psnr_drop=1.0)
    assert found.passed
    assert found.value == pytest.approx(-0.64)
    assert found.interval is None
    assert "Not paired" in found.detail


def test_identical_images_are_infinitely_good(reported):
    same = make_report(psnr_db=None, identical=True)
    assert outcome(reported(same), min_psnr=200.0).passed
    assert outcome(reported(same), reported(name="old.json"), max_psnr_drop=0.0).passed
    assert not outcome(reported(), reported(same, "old.json"), max_psnr_drop=1e6).passed


@pytest.mark.parametrize(
    ("digests", "name", "refused"),
    [
        (("a" * 64, "a" * 64), "other", False),
        (("a" * 64, "b" * 64), "emoji", True),
        (("", ""), "other", True),
    ],
)
def test_a_baseline_of_another_model_is_refused(reported, digests, name, refused):
    def model(digest, name):
        return make_report(model=ModelInfo(name=name, source="", digest=digest))

    report, baseline = (
        reported(model(digests[0], "emoji")),
        reported(model(digests[1], name), "old.json"),
    )
    if refused:
        with pytest.raises(UsageError, match="another model"):
            outcome(report, baseline, max_psnr_drop=1.0)
    else:
        assert outcome(report, baseline, max_psnr_drop=1.0).passed


SCORE = {"variant": "ours", "score_digest": "d", "samples": 64, "floor": 0.0, "other_noise": 0.5}
SCORE |= {"sampler": "DDIM", "steps": 20, "seed": 1}
SCORES = (
    {**SCORE, "variant": "int4", "score": "lpips", "title": "LPIPS", "value": 0.9},
    {**SCORE, "score": "lpips", "title": "LPIPS", "value": 0.05},
    {
        **SCORE,
        **{"score": "clip-score", "title": "CLIP score", "value": 25.8, "floor": 26.0},
        "increase_interval": {"low": -0.4, "high": 0.1},
    },
)


@pytest.mark.parametrize(
    ("name", "kept", "broken"), [("max_lpips", 0.06, 0.04), ("max_clip_drop", 0.3, 0.1)]
)
def test_scores_of_the_plan_are_held_and_fail_where_they_are_missing(reported, name, kept, broken):
    report = reported(scores=list(SCORES))
    assert outcome(report, **{name: kept}).passed
    assert outcome(report, **{name: broken}).status == "failed"
    missing = outcome(reported(scores=[SCORES[0]]), **{name: kept})
    assert missing.status == "not measured"
    assert "mpq-deploy metrics RUN --" in missing.detail


def test_a_clip_score_that_shows_no_drop_says_so(reported):
    found = outcome(reported(scores=list(SCORES)), max_clip_drop=0.1)
    assert found.value == pytest.approx(-0.2)
    assert "The limit lies inside" in found.detail


DISTANCE = distance_row(
    against="real",
    samples=1000,
    distance=12.0,
    floor=11.6,
    increase_interval={"low": 0.3, "high": 0.5},
)


def test_a_frechet_increase_is_over_the_float_model_s_or_the_baseline_s(reported):
    report = reported(frechet=[DISTANCE])
    assert outcome(report, max_frechet_increase=0.5).value == pytest.approx(0.4)
    own = reported(frechet=[{**DISTANCE, "against": "float", "floor": 0.0}])
    assert (
        "1,000 images, DDIM, seed 5, to the float model's images; over the float"
        in outcome(own, max_frechet_increase=0.5).detail
    )
    assert not outcome(report, max_frechet_increase=0.3).passed
    baseline = reported(name="old.json", frechet=[{**DISTANCE, "distance": 11.8}])
    assert outcome(report, baseline, max_frechet_increase=0.3).value == pytest.approx(0.2)
    fewer = reported(name="old.json", frechet=[{**DISTANCE, "samples": 50}])
    assert outcome(report, fewer, max_frechet_increase=9.0).status == "not measured"


def test_junit_says_what_ci_systems_read(reported):
    data = make_report(model=ModelInfo(name='<b>&"\x00\x1b[31m\ufffe', source=""))
    result = check_gate(
        reported(data), Limits(Budget.parse("0.36"), 40.0, max_nmse=1e-9, max_latency=ms(120.0))
    )
    text = gate_junit(result)
    root = ET.fromstring(text)
    assert root.tag == "testsuites"
    (suite,) = root.findall("testsuite")
    cases = suite.findall("testcase")
    failures = suite.findall("testcase/failure")
    for element in (root, suite):
        assert int(element.get("tests")) == len(cases) == 4
        assert int(element.get("failures")) == len(failures) == 2
    assert {failure.get("type") for failure in failures} == {"failed", "not-measured"}
    assert all(
        case.get("name") and case.get("classname") and float(case.get("time")) == 0
        for case in cases
    )
    assert not suite.findall("testcase/skipped")
    assert gate_junit(result) == text


def test_markdown_and_text_name_every_limit(reported):
    result = check_gate(reported(), Limits(Budget.parse("0.36"), 40.0, 0.9, 1e-4, 0.5, ms(120.0)))
    for name in ("size", "PSNR", "SSIM", "output error (NMSE)", "Frechet increase", "latency"):
        assert f"\n| {name} |" in gate_markdown(result)
        assert f" {name}: " in gate_text(result)
    assert "FAILED: 4 of 6 limits met." in gate_text(result)
    assert max(map(len, gate_text(result).splitlines())) <= 80


def test_simulated_plans_say_so(reported):
    assert any(
        "simulated" in note
        for note in check_gate(reported(simulated=True), Limits(Budget.parse("0.9"))).notes
    )


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, "No limit"),
        ({"max_psnr_drop": 1.0}, "needs a baseline"),
        ({"min_psnr": math.nan}, "finite"),
        ({"max_nmse": -1.0}, "negative"),
        ({"min_ssim": 1.01}, "at most 1"),
    ],
    ids=str,
)
def test_limits_that_make_no_sense_are_refused(reported, limits, said):
    with pytest.raises(UsageError, match=said):
        check_gate(reported(), Limits(**limits))


def test_a_baseline_that_nothing_uses_is_refused(reported):
    with pytest.raises(UsageError, match="no limit uses it"):
        check_gate(reported(), Limits(Budget.parse("0.9")), reported(name="old.json"))


def test_the_command_line_exits_with_0_1_and_2(tmp_path, reported):
    reported()
    path = str(tmp_path / "report.json")
    files = ["--junit", str(tmp_path / "new" / "gate.xml"), "--markdown", str(tmp_path / "gate.md")]
    nowhere = RUNNER.invoke(app, ["gate", path, "--max-size", "0.9", *files])
    assert isinstance(nowhere.exception, UsageError)
    assert "no folder" in nowhere.exception.message and not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    good = RUNNER.invoke(app, ["gate", path, "--max-size", "0.9", "--min-psnr", "40", *files])
    assert good.exit_code == 0, good.output
    assert ET.parse(tmp_path / "new" / "gate.xml").getroot().get("failures") == "0"
    assert "Passed: 2 of 2" in (tmp_path / "gate.md").read_text(encoding="utf-8")
    bad = RUNNER.invoke(
        app, ["gate", path, "--max-size", "0.9", "--max-latency", "120ms", "--json", *files]
    )
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["passed"] is False
    assert ET.parse(tmp_path / "new" / "gate.xml").getroot().get("failures") == "1"
    for wrong in (["--max-latency", "120"], ["--max-size", "big"], ["--max-size", "1.5"], []):
        found = RUNNER.invoke(app, ["gate", path, *wrong])
        assert isinstance(found.exception, UsageError)
        assert found.exception.exit_code == 2
