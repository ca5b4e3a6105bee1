"""Two run folders compared: what counts as a difference, and what is set aside."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from scripts.same_results import BY_DIGEST, Rules, differing_runs, differing_values, main

REPORT = {
    "psnr_db": 41.2,
    "layers": [{"name": "conv", "loss": 1e-9}],
    "sha256": "ab",
    "groups": None,
}
PLAN = {"schemes": {"conv": "w8a16"}, "size_bytes": 10, "notes": ["one layer is slower"]}


def write_package(file: Path, **parts: bytes) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in parts.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A made-up run folder with every kind of file that is compared."""
    folder = tmp_path / "old"
    texts: dict[str, Any] = {
        "run.json": {},
        "report.json": REPORT,
        "allocate/plan.json": PLAN,
        "engine/build.json": {"sha256": "ab", "kernels": {"gemm": 3}},
        "recover/recovery.json": {"after": 0.1},
    }
    for name, value in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    for name in BY_DIGEST:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    write_package(
        folder / "mine.mpq.tar",
        manifest__json=b'{"name": "a"}',
        weights__bin=b"1",
        install__pyz=b"1",
    )
    return folder


@pytest.fixture
def twin(run: Path) -> Path:
    return Path(shutil.copytree(run, run.parent / "new"))


def change(file: Path, **values: Any) -> None:
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8"
    )


def test_a_copy_is_the_same(run: Path, twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(twin)]) == 0
    assert capsys.readouterr().out == "the results are the same\n"


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"{stage}/{f}"
            for stage in ("quantize", "recover")
            for f in ("model.onnx", "model.fp32.onnx", "weights.bin")
        ),
        "engine/layers.txt",
    ],
)
def test_one_byte_is_found(
    run: Path, twin: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (twin / name).write_bytes((twin / name).read_bytes()[:-1] + b"!")
    assert main([str(run), str(twin)]) == 1
    assert capsys.readouterr().out.startswith(f"{name}: bytes differ (")


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("allocate/plan.json", {"schemes": {"conv": "w8a8"}}, 'schemes.conv: "w8a16" -> "w8a8"'),
        ("allocate/plan.json", {"size_bytes": 10.0}, "size_bytes: 10 -> 10.0"),
        ("engine/build.json", {"kernels": {"gemm": 2}}, "kernels.gemm: 3 -> 2"),
        ("recover/recovery.json", {"after": 0.2}, "after: 0.1 -> 0.2"),
        ("report.json", {"layers": []}, "layers: list of 1 -> list of 0"),
        ("report.json", {"new": 1}, "new: only in NEW"),
    ],
)
def test_one_value_is_found(
    run: Path, twin: Path, name: str, values: dict[str, Any], line: str
) -> None:
    change(twin / name, **values)
    assert differing_runs(run, twin, Rules()) == [f"{name}: {line}"]


def test_a_missing_file_is_found(run: Path, twin: Path) -> None:
    (twin / "quantize" / "weights.bin").unlink()
    (run / "mine.mpq.tar").unlink()
    lines = ["quantize/weights.bin: only in OLD", "mine.mpq.tar: only in NEW"]
    assert differing_runs(run, twin, Rules()) == lines


def test_packages_are_compared_by_part(run: Path, twin: Path) -> None:
    write_package(
        twin / "mine.mpq.tar", manifest__json=b'{"name": "b"}', weights__bin=b"2", install__pyz=b"2"
    )
    lines = differing_runs(run, twin, Rules())
    assert lines[0] == 'mine.mpq.tar/manifest.json: name: "a" -> "b"'
    assert lines[1].startswith("mine.mpq.tar/weights.bin: bytes differ")
    assert len(lines) == 2


def test_what_is_set_aside(run: Path, twin: Path) -> None:
    change(twin / "engine/build.json", sha256="cd", build_seconds=3)
    stages = [{"seconds": 1, "peak_rss_bytes": 2, "cached": True}]
    change(run / "report.json", stages=stages, versions={"numpy": "1"}, cpu_latency=None)
    change(
        twin / "report.json",
        stages=[{}],
        versions={"numpy": "2"},
        cpu_latency={"ours_ms": 1},
        sha256="ef",
    )
    assert differing_runs(run, twin, Rules()) == []


def test_renamed_and_removed_fields(run: Path, twin: Path) -> None:
    report = {k: v for k, v in REPORT.items() if k != "groups"}
    report["layers"] = [{"name": "conv", "predicted_loss": 1e-9}]
    (twin / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert len(differing_runs(run, twin, Rules())) == 3
    assert (
        main([str(run), str(twin), "--renamed", "loss=predicted_loss", "--removed", "groups"]) == 0
    )


def test_wording(run: Path, twin: Path) -> None:
    change(twin / "allocate/plan.json", notes=["one layer takes longer"])
    assert main([str(run), str(twin)]) == 1
    assert main([str(run), str(twin), "--words"]) == 0
    assert list(differing_values("w8a8", "w8a16", Rules(words=True)))


def test_no_run_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(tmp_path / "none")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
