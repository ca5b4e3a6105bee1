"""What a device measured, taken in by the report on the build machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.delivery.device_results import device_info, device_infos, read_results, take_in
from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe
from mpq_deploy.report.data import DeviceInfo
from mpq_deploy.report.words import device_row
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import Talk
from tests.pipeline.runs import Notes, call


def results(digests: dict[str, str], **changes: Any) -> dict[str, Any]:
    engine = {
        "backend": "trtexec",
        "version": "10.3.0",
        "bytes": 1000,
        "weights_bytes": 900,
        "activation_bytes": 50,
    }
    values = {
        "format": 1,
        "package": {"name": "m", "manifest_sha256": "0", "digests": digests},
        "target": "jetson-agx-orin",
        "device": {
            "board": "Jetson <AGX> Orin",
            "gpu": "Orin",
            "machine": "aarch64",
            "compute_capability": "SM87",
        },
        "engine": {**engine, "verified": True, "problems": []},
        "reference": {"ran": True, "why": "", "passed": True, "cases": {"a": 1e-6, "b": 2e-6}},
        "latency": {"p50_ms": 12.5, "p90_ms": 13.0, "p99_ms": 14.0, "mean_ms": 12.6, "calls": 100},
        "memory": {},
        "passed": True,
    }
    return {**values, **changes}


@pytest.fixture
def run(rtx_run: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    return rtx_run[0], Path(shutil.copytree(rtx_run[1], tmp_path / "run"))


def digests(run: Path) -> dict[str, str]:
    from mpq_deploy.run.folder import RunFolder

    found = {name: RunFolder(run).record(name) for name in ("allocate", "quantize")}
    return {name: record.digest for name, record in found.items() if record}


def test_the_report_shows_what_the_device_measured(
    run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(digests(run[1]))), encoding="utf-8")
    done = call("report", run[1], "--device", file)
    assert done.returncode == 0, done.stderr
    report = json.loads((run[1] / "report.json").read_text(encoding="utf-8"))
    assert report["devices"][0]["median_ms"] == 12.5
    assert "12.5 ms, 14.0 ms" in (run[1] / "report.md").read_text(encoding="utf-8")
    page = (run[1] / "report.html").read_text(encoding="utf-8")
    assert "Jetson &lt;AGX&gt; Orin (jetson-agx-orin)" in page
    assert "NMSE 2.0 × 10⁻⁶" in page


def test_results_of_another_plan_are_refused_and_former_ones_left_out(
    run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results({**digests(run[1]), "quantize": "0"})), encoding="utf-8")
    notes = Notes()
    with open_pipeline(*run, notes) as pipeline:
        with pytest.raises(UsageError, match="another quantize"):
            take_in(pipeline.deployed(), file)
        file.write_text(json.dumps(results(digests(run[1]))), encoding="utf-8")
        kept = take_in(pipeline.deployed(), file)
        assert len(device_infos(pipeline.run)) == 1
        kept.write_text(json.dumps(results({"allocate": "0", "quantize": "0"})), encoding="utf-8")
        assert device_infos(pipeline.run) == ()
    assert any("earlier plan" in line for line in notes.lines)


def test_a_file_that_is_none_is_refused(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with (
        open_pipeline(*run, Talk()) as pipeline,
        pytest.raises(UsageError, match=r"not a results\.json of format 1"),
    ):
        take_in(pipeline.deployed(), tmp_path / "x.json")


def shown(values: dict[str, Any], folder: Path) -> DeviceInfo:
    (folder / "results.json").write_text(json.dumps(values), encoding="utf-8")
    return device_info(read_results(folder / "results.json"))


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    silent = results(
        {},
        latency=None,
        reference={"ran": False, "why": "no GPU", "passed": None, "cases": {}},
        device={"board": "", "gpu": "", "machine": "x86_64"},
    )
    row = device_row(shown(silent, tmp_path))
    assert row[0] == "x86_64 (jetson-agx-orin)"
    assert row[3:] == ("not run: no GPU", "not measured")
    failed = {"ran": True, "why": "", "passed": False, "cases": {"a": None}}
    bad = results({}, reference=failed, passed=False)
    bad["engine"] = {
        **bad["engine"],
        "verified": False,
        "problems": [{"layer": "l", "message": "m", "severity": "wrong"}],
    }
    row = device_row(shown(bad, tmp_path))
    assert row[2:4] == ("not as planned: l: m", "differ (not finite)")


@pytest.mark.parametrize(
    "target", ["../../escaped", "/tmp/escaped", "", ".hidden", "a/b", "a\nb", "\x1b[2J", 5, None]
)
def test_a_name_from_a_device_never_leaves_the_run(
    target: Any, run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(digests(run[1]), target=target)), encoding="utf-8")
    with open_pipeline(*run, Talk()) as pipeline:
        with pytest.raises(UsageError, match="target") as caught:
            take_in(pipeline.deployed(), file)
        assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
    assert set(tmp_path.rglob("*")) - before == {file, run[1] / ".lock"} - before
    assert not Path("/tmp/escaped.json").exists()


WRONG: dict[str, Any] = {
    "engine": ({"engine": None}, "engine"),
    "engine.bytes": ({"engine": {"backend": "x"}}, "engine.version"),
    "cases": ({"reference": {"ran": True, "why": "", "passed": True, "cases": []}}, "cases"),
    "negative": (
        {"reference": {"ran": True, "why": "", "passed": True, "cases": {"a": -1.0}}},
        "reference.cases.a",
    ),
    "passed": ({"passed": "yes"}, "passed"),
    "device": ({"device": {"board": ["x"]}}, "device.board"),
    "package": ({"package": []}, "package"),
    "format": ({"format": 2}, "format 1"),
    "not run": (
        {"reference": {"ran": False, "why": "", "passed": True, "cases": {}}},
        "though nothing ran",
    ),
    "no cases": ({"reference": {"ran": True, "why": "", "passed": True, "cases": {}}}, "no cases"),
    "above": (
        {
            "reference": {
                **{"ran": True, "why": "", "passed": True, "cases": {"a": 0.1}},
                "tolerance_nmse": 0.01,
            }
        },
        "above its tolerance",
    ),
    "failed": (
        {"reference": {"ran": True, "why": "", "passed": False, "cases": {"a": 0.1}}},
        "not what its engine and references say",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_malformed_results_are_refused_before_anything_is_kept(
    changes: dict[str, Any], message: str, run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**results(digests(run[1])), **changes}), encoding="utf-8")
    with open_pipeline(*run, Talk()) as pipeline, pytest.raises(UsageError, match=message):
        take_in(pipeline.deployed(), file)
    assert not (run[1] / "devices").exists()


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("latency", {"p50_ms": "fast"}),
        ("latency", {"p50_ms": -1.0, "p90_ms": 1.0, "p99_ms": 1.0, "mean_ms": 1.0, "calls": 1}),
        ("bench", {"subjects": [], "ratio": None}),
        ("memory", {"weights_bytes": 1e300}),
        ("build", []),
    ],
)
def test_an_optional_section_that_is_wrong_is_left_out_and_said(
    section: str, value: Any, run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    file, notes = tmp_path / "results.json", Notes()
    file.write_text(json.dumps({**results(digests(run[1])), section: value}), encoding="utf-8")
    with open_pipeline(*run, notes) as pipeline:
        kept = take_in(pipeline.deployed(), file)
        assert len(device_infos(pipeline.run)) == 1
    assert json.loads(kept.read_text(encoding="utf-8"))[section] is None
    assert any(f"{section} left out" in line for line in notes.lines)


def test_an_engine_with_wrong_layers_is_not_verified(tmp_path: Path) -> None:
    values = results({})
    values["engine"]["problems"] = [{"layer": "l", "message": "m", "severity": "wrong"}]
    (tmp_path / "results.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UsageError, match="verified, though layers are wrong"):
        read_results(tmp_path / "results.json")


def test_what_lies_in_the_run_and_is_no_results_file_is_left_out_of_reports(
    run: tuple[Recipe, Path],
) -> None:
    folder, notes = run[1] / "devices", Notes()
    folder.mkdir()
    for number, text in enumerate(("", "[]", "{", '{"format": 1}', '{"format": NaN}')):
        (folder / f"x{number}.json").write_text(text, encoding="utf-8")
    with open_pipeline(*run, notes) as pipeline:
        assert device_infos(pipeline.run) == ()
    assert sum("left out of the report" in line for line in notes.lines) == 5


def test_texts_of_a_device_are_shown_without_control_characters(tmp_path: Path) -> None:
    values = results({}, device={"board": "\x1b[2J\u202eOrin"})
    assert shown(values, tmp_path).device == "\\x1b[2J\\u202eOrin"
