"""What the doctor finds, on this machine and on ones that are described to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpq_deploy.engine.target import known_targets, load_target
from mpq_deploy.system import doctor
from mpq_deploy.system.doctor import (
    Gpu,
    inspect_machine,
    parse_nvidia_smi,
    target_findings,
    why_not_build,
    why_not_run,
)

RTX_3060 = Gpu("NVIDIA GeForce RTX 3060", "570.86", "SM86", "12288 MiB")
H200 = Gpu("NVIDIA H200", "570.86", "SM90", "143771 MiB")


def test_every_finding_is_complete_and_every_target_is_answered_twice() -> None:
    findings = inspect_machine()
    assert all(finding.name and finding.value for finding in findings)
    names = [finding.name for finding in findings if finding.group == "targets"]
    assert names == [
        f"{target}: {what} here" for target in known_targets() for what in ("build", "run")
    ]
    missing = [
        finding
        for finding in findings
        if finding.group in ("packages", "builders") and finding.status == "missing"
    ]
    assert all(finding.hint for finding in missing)


def test_a_no_has_its_reason() -> None:
    for name in known_targets():
        for finding in target_findings(load_target(name), []):
            assert finding.value.startswith("yes: ") == (finding.status == "ok")
            assert len(finding.value.split(": ", 1)[1]) > 3


def test_nvidia_smi_is_read() -> None:
    text = "NVIDIA GeForce RTX 3060, 570.86, 8.6, 12288 MiB\nOrin (nvgpu), 540.4, [N/A], [N/A]\nnonsense\n"
    first, second = parse_nvidia_smi(text)
    assert first == RTX_3060
    assert second.compute_capability == ""


def test_the_drivers_files_are_read_without_nvidia_smi(tmp_path: Path) -> None:
    folder = tmp_path / "gpus" / "0000:01:00.0"
    folder.mkdir(parents=True)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n",
        encoding="utf-8",
    )
    (folder / "information").write_text(
        "Model: \t\t NVIDIA GeForce RTX 3060\nIRQ: 3\n", encoding="utf-8"
    )
    (gpu,) = doctor._gpus_of_proc(tmp_path)
    assert (gpu.name, gpu.driver) == ("NVIDIA GeForce RTX 3060", "570.86.15")
    assert doctor._gpus_of_proc(tmp_path / "none") == []


def test_what_stands_against_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_trtexec", lambda: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "trtexec is not installed here" in why_not_build(load_target("jetson-thor"))
    assert "tensorrt_rtx is not installed" in why_not_build(load_target("rtx"))
    assert why_not_build(load_target("onnxruntime-cpu")) == ""
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_version", lambda package: "11.4.1")
    assert "11.4.1 is installed, but the target is for 10." in why_not_build(
        load_target("tensorrt-10")
    )
    assert why_not_build(load_target("tensorrt-11")) == ""


def test_what_stands_against_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    assert "no NVIDIA GPU" in why_not_run(load_target("rtx"), [])
    assert why_not_run(load_target("rtx"), [RTX_3060]) == ""
    assert "SM90" in why_not_run(load_target("rtx"), [H200])
    assert "for SM89" in why_not_run(load_target("rtx-ada"), [RTX_3060])
    assert why_not_run(load_target("tensorrt-10"), [H200]) == ""
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "tensorrt is not installed" in why_not_run(load_target("jetson-agx-orin"), [RTX_3060])
