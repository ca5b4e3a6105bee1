"""A probe from home to a device and back: what a device shows becomes a target that takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mpq_deploy.check.check import check_model
from mpq_deploy.cli import app
from mpq_deploy.delivery.probe_package import PROBED, make_probe
from mpq_deploy.delivery.probe_results import read_probe_results, take_probe
from mpq_deploy.device.archive import ArchiveError
from mpq_deploy.device.form_probe import RESULTS, Probe, run_probe
from mpq_deploy.device.form_probe import main as probe_main
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import EngineError, UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import Layer
from mpq_deploy.system.files import read_sealed, sealed_json
from mpq_deploy.system.progress import Talk

NANO = load_target("jetson-orin-nano")
MOCK = Path(__file__).parents[1] / "device" / "mock_trtexec.py"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "p.tar"
    make_probe(NANO, path)
    return path


@pytest.fixture
def device(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked probe, on a machine with a MOCK trtexec."""
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text(
        f'#!/bin/sh\nexec {sys.executable} {MOCK} "$@"\n', encoding="utf-8"
    )
    (tools / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path / "probe"


def shortened(device: Path, forms: int = 3) -> Path:
    """Leave the first forms of the probe."""
    values = json.loads((device / "probe.json").read_text(encoding="utf-8"))
    values["forms"] = values["forms"][:forms]
    (device / "probe.json").write_text(json.dumps(values), encoding="utf-8")
    return device


def test_two_probes_are_the_same_bytes_and_name_every_part(packed: Path, tmp_path: Path) -> None:
    make_probe(NANO, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()
    with tarfile.open(packed) as archive:
        names = {member.name for member in archive}
        archive.extractall(tmp_path, filter="data")
    probe = Probe.load(tmp_path / "probe")
    assert names == {"probe/probe.json", *(f"probe/{name}" for name in probe.digests)}
    assert [form.name for form in probe.forms] == [one.name for one in PROBED]
    (tmp_path / "probe" / "forms" / "w8a8-conv" / "model.onnx").write_bytes(b"other")
    with pytest.raises(ArchiveError, match="missing or altered"):
        Probe.load(tmp_path / "probe")


def test_narrow_floats_are_tried_where_every_gpu_has_them(tmp_path: Path) -> None:
    names = {
        target: set(make_probe(load_target(target), tmp_path / "p.tar")["forms"])
        for target in ("rtx", "rtx-ada", "jetson-thor")
    }
    assert "fp8-product" not in names["rtx"] and "fp8-product" in names["rtx-ada"]
    assert {"fp8-product", "fp4-product"} <= names["jetson-thor"]
    assert "fp4-product" not in names["rtx-ada"]


def test_what_a_mock_device_shows_becomes_a_target(device: Path, tmp_path: Path) -> None:
    results = run_probe(device, Talk())
    assert results["finished"] and results["builder"] == {"name": "trtexec", "version": "10.3.0"}
    assert all(
        form["verified"] and form["reference"]["passed"] for form in results["forms"].values()
    )
    out, _ = take_probe(device / RESULTS, tmp_path / "mine.yaml")
    mine = load_target(out)
    assert mine.name == "jetson-orin-nano-proven"
    assert {"w4a16", "w4a8", "w8a16"} <= set(mine.schemes["Conv"])
    assert set(mine.branches["MatMul"]) == {"cols", "lowrank", "rows", "scale"}
    assert set(mine.shown) == {"int4_conv", "requantized", "int8_weights_only"}
    layer = Layer("a", "Conv", "a.weight", (64, 64, 3, 3), 0, 1, ())
    for name in ("w4a16-b64", "w4a8-b64", "w8a16", "w8a8+scale5"):
        assert NANO.refusal(layer, SCHEMES[name]) and not mine.refusal(layer, SCHEMES[name])
    # The check follows: what was doubtful is not any more.
    model = device / "forms" / "w4a16-conv" / "model.onnx"
    doubtful = {one.rule for one in check_model(model, NANO).findings if one.effect == "doubtful"}
    assert doubtful == {"int4-conv-unproven"}
    assert not [one for one in check_model(model, mine).findings if one.effect == "doubtful"]
    assert "MOCK Orin, trtexec 10.3.0" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")


def test_a_form_that_fails_is_said_and_not_taken(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCK_FAULT", "half")
    run_probe(device, Talk())
    out, results = take_probe(device / RESULTS, tmp_path / "mine.yaml")
    mine = load_target(out)
    assert "w4a8" not in mine.schemes["Conv"] and "w4a16" in mine.schemes["Conv"]
    assert "requantized" not in mine.shown and "int4_conv" in mine.shown
    assert "computes in Half" in results.forms["w4a8-conv"].said
    texts = {one["what"]: one["by"] for one in yaml.safe_load(out.read_text("utf-8"))["proven"]}
    assert "computes in Half" in texts["4-bit storage, INT8 convolution (w4a8-b64, Conv)"]


@pytest.mark.parametrize("fault", ["numbers", "build"])
def test_other_outputs_and_refusals_prove_nothing(
    fault: str, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCK_FAULT", fault)
    run_probe(shortened(device), Talk())
    out, results = take_probe(device / RESULTS, tmp_path / "mine.yaml")
    assert len(results.forms) == 3
    assert not any(form.proven for form in results.forms.values())
    assert load_target(out).schemes == NANO.schemes and load_target(out).shown == ()


def test_a_second_call_goes_on(device: Path) -> None:
    said: list[str] = []
    shortened(device)
    assert probe_main([str(device), "--minutes", "0"], said.append) == 1
    first = read_sealed(device / RESULTS)
    assert len(first["forms"]) <= 1 and not first["finished"]
    kept = {"w8a8-conv": {**run_probe(device, Talk())["forms"]["w8a8-conv"], "build_seconds": 77.0}}
    (device / RESULTS).write_text(sealed_json({**first, "forms": kept}), encoding="utf-8")
    again = run_probe(device, Talk())
    assert again["finished"] and len(again["forms"]) == 3
    assert again["forms"]["w8a8-conv"]["build_seconds"] == 77.0


def test_a_device_with_another_tensorrt_is_refused(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCK_VERSION", "80600")
    with pytest.raises(EngineError, match=r"probe is written for TensorRT 10\.3\.x.*8\.6\.0"):
        run_probe(device, Talk())


def test_earlier_results_that_were_altered_are_named_with_what_to_do(
    device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (device / RESULTS).write_text("{}", encoding="utf-8")
    assert probe_main([str(device)], lambda text: None) != 0
    said = capsys.readouterr().err
    assert "it holds no sha256" in said and f"Remove {device / RESULTS}" in said


def test_the_target_of_the_builder_that_is_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_probe(load_target("jetson-agx-orin"), tmp_path / "p.tar")
    with tarfile.open(tmp_path / "p.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "trtexec").write_text(
        f'#!/bin/sh\nexec {sys.executable} {MOCK} "$@"\n', encoding="utf-8"
    )
    (tmp_path / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("MOCK_VERSION", "110400")
    with pytest.raises(EngineError) as caught:
        run_probe(tmp_path / "probe", Talk())
    assert "mpq-deploy probe --target jetson-agx-orin-jp7" in caught.value.hint


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another target": ({"target": "toaster"}, "does not have"),
    "a path": ({"target": "../../x"}, "target"),
    "another dialect": ({"dialect": "trt-11"}, "is for 10.3.x"),
    "older builder": ({"builder": {"name": "trtexec", "version": "8.6.1"}}, "8.6.1"),
    "no version": ({"builder": {"name": "trtexec", "version": "x\n"}}, "builder.version"),
    "a form of another kind": ({"forms": {"w8a8-conv": []}}, "forms.w8a8-conv"),
    "another format": ({"format": 9}, "format"),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_results_of_others_are_refused(
    changes: dict[str, Any], words: str, device: Path, tmp_path: Path
) -> None:
    values = run_probe(device, Talk(), minutes=0.0)
    (tmp_path / "r.json").write_text(sealed_json({**values, **changes}), encoding="utf-8")
    with pytest.raises(UsageError, match=words) as caught:
        take_probe(tmp_path / "r.json", tmp_path / "out.yaml")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out.yaml").exists()


def test_altered_results_are_refused_in_one_line(device: Path, tmp_path: Path) -> None:
    run_probe(device, Talk(), minutes=0.0)
    text = (device / RESULTS).read_text(encoding="utf-8")
    for content in (text.replace("trtexec", "tensorrt"), "{}", "[]", "", text[:100]):
        (tmp_path / "r.json").write_text(content, encoding="utf-8")
        with pytest.raises(UsageError):
            read_probe_results(tmp_path / "r.json")
        done = CliRunner().invoke(app, ["targets", "--take", str(tmp_path / "r.json")])
        assert done.exit_code != 0


@pytest.mark.parametrize("options", [["-o", "x.yaml"], ["rtx", "--take", "x.json"]])
def test_options_that_do_not_go_together_are_refused(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["targets", *options])
    assert isinstance(done.exception, UsageError)


def test_a_target_without_engine_has_no_probe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engine"):
        make_probe(load_target("onnxruntime-cpu"), tmp_path / "p.tar")


@pytest.mark.rtx
def test_the_program_tries_every_form_with_numpy_and_tensorrt_alone(tmp_path: Path) -> None:
    """TensorRT-RTX is the device's builder here; nothing runs without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    make_probe(load_target("rtx"), tmp_path / "p.tar")
    with tarfile.open(tmp_path / "p.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    done = subprocess.run(
        ["sh", str(tmp_path / "probe" / "run.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out, results = take_probe(tmp_path / "probe" / RESULTS, tmp_path / "mine.yaml")
    assert all(form.proven for form in results.forms.values())
    assert json.loads((tmp_path / "probe" / RESULTS).read_text("utf-8"))["finished"]
    assert "not run" in results.forms["w4a16-windows"].said
    assert load_target(out).schemes == load_target("rtx").schemes
