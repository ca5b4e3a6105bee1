"""Installing: really built by TensorRT-RTX without the rest of the package; trtexec and its device are a MOCK."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mpq_deploy.bench.statistics import call_times
from mpq_deploy.delivery.device_results import read_results
from mpq_deploy.device import installer as install_module
from mpq_deploy.device.archive import ArchiveError
from mpq_deploy.device.installer import (
    Runtime,
    check_gpu,
    check_gpu_memory,
    check_memory,
    install,
    main,
    probe,
)
from mpq_deploy.device.manifest import Manifest
from mpq_deploy.device.output_check import relative_squared_error
from mpq_deploy.errors import EngineError
from mpq_deploy.system import memory
from mpq_deploy.system.progress import Talk

# What a device need not have. Imports of these fail in the child.
BLOCKED = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "pydantic",
    "typer",
    "yaml",
    "networkx",
    "ml_dtypes",
    "rich",
    "highspy",
)
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {BLOCKED!r}:
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Blocker())
"""


def unpacked(archive: Path, folder: Path) -> Manifest:
    install_module.unpack(archive, folder, Talk())
    return Manifest.load(folder / "manifest.json")


def isolated(folder: Path) -> dict[str, str]:
    """An environment whose every Python process, children included, cannot import what a device lacks."""
    (folder / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.rtx
def test_the_installer_in_the_package_builds_with_numpy_and_tensorrt_alone(
    rtx: Path, tmp_path: Path
) -> None:
    """install.pyz from the archive, in a process tree that cannot import anything else."""
    pytest.importorskip("tensorrt_rtx")
    parts = tmp_path / "parts"
    unpacked(rtx, parts)
    environment = isolated(tmp_path)
    probe_code = "import mpq_deploy.device.installer, sys; print(mpq_deploy.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", probe_code],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env={**environment, "PYTHONPATH": f"{tmp_path}:{parts / 'install.pyz'}"},
        cwd=tmp_path,
    )
    assert "install.pyz" in where.stdout
    done = subprocess.run(
        [
            sys.executable,
            str(parts / "install.pyz"),
            str(rtx),
            "-o",
            str(tmp_path / "out"),
            "--json",
        ],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    file = tmp_path / "out" / "results.json"
    assert results == json.loads(file.read_text(encoding="utf-8"))
    assert read_results(file).engine.verified
    assert results["engine"]["verified"]
    assert results["engine"]["problems"] == []
    assert results["engine"]["backend"] == "tensorrt_rtx"
    assert (tmp_path / "out" / "engine" / "model.engine").stat().st_size == results["engine"][
        "bytes"
    ]
    if not results["reference"]["ran"]:
        assert "NVIDIA driver" in results["reference"]["why"]
        assert results["latency"] is None


@pytest.mark.rtx
def test_an_engine_that_is_not_as_planned_fails(
    rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    real = Manifest.load

    def doubled(path: Path) -> Manifest:
        from dataclasses import replace

        manifest = real(path)
        expected = replace(manifest.expected, total_bytes=10 * manifest.expected.total_bytes)
        return replace(manifest, expected=expected)

    monkeypatch.setattr(Manifest, "load", staticmethod(doubled))
    said: list[str] = []
    assert main([str(rtx), "-o", str(tmp_path / "out")], said.append) == 1
    assert "layers   1 differ from the plan (the engine holds" in said[0]


def test_the_blocked_packages_are_really_blocked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import onnx"],
        env=isolated(tmp_path),
        capture_output=True,
        encoding="utf-8",
    )
    assert "blocked: onnx" in done.stderr


def test_the_module_runs_without_what_a_device_lacks(
    orin: Path, mock_device: Path, tmp_path: Path
) -> None:
    """``python -m mpq_deploy.install`` from an installed mpq-deploy, with a MOCK trtexec."""
    package = Path(install_module.__file__).parents[2]
    environment = {**isolated(tmp_path), "PYTHONPATH": f"{tmp_path}:{package}"}
    command = [
        sys.executable,
        "-m",
        "mpq_deploy.install",
        str(orin),
        "-o",
        str(tmp_path / "out"),
        "--force-memory",
    ]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "outputs  agree" in done.stdout


def test_with_a_mock_trtexec_everything_is_checked_and_measured(
    orin: Path, mock_device: Path, tmp_path: Path
) -> None:
    results = install(orin, tmp_path / "out", Talk(), force_memory=True)
    assert results["passed"]
    assert results["engine"]["backend"] == "trtexec"
    assert results["engine"]["version"] == "10.3.0"
    assert results["engine"]["verified"]
    assert results["reference"]["ran"]
    assert set(results["reference"]["cases"].values()) == {0.0}
    assert results["device"]["compute_capability"] == "SM87"
    assert results["latency"]["p50_ms"] == pytest.approx(1.495)
    assert read_results(tmp_path / "out" / "results.json").passed == results["passed"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [("half", "layers   "), ("numbers", "outputs  DIFFER (NMSE")],
)
def test_faults_of_the_mock_device_fail_the_install(
    fault: str,
    says: str,
    orin: Path,
    mock_device: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOCK_FAULT", fault)
    said: list[str] = []
    assert main([str(orin), "-o", str(tmp_path / "out"), "--force-memory"], said.append) == 1
    assert says in said[0]
    if fault == "half":
        assert re.search(r"planned w\da8\S*, but it computes in Half", said[0])


def test_a_refusal_of_the_mock_builder_is_an_error_with_its_words(
    orin: Path, mock_device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCK_FAULT", "build")
    with pytest.raises(EngineError, match="the mock refuses node conv_in"):
        install(orin, tmp_path / "out", Talk(), force_memory=True)


@pytest.mark.parametrize(
    ("digits", "found", "remedy"),
    [
        ("110401", "11.4.1", "--target jetson-agx-orin-jp7"),
        ("101303", "10.13.3", "No shipped target has that version"),
    ],
)
def test_another_tensorrt_is_refused_with_the_target_to_package_for(
    digits: str,
    found: str,
    remedy: str,
    orin: Path,
    mock_device: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOCK_VERSION", digits)
    with pytest.raises(EngineError) as caught:
        install(orin, tmp_path / "out", Talk(), force_memory=True)
    assert (
        "TensorRT 10.3.x (JetPack 6.1 and 6.2), dialect trt-10.3; trtexec here is " + found
        in caught.value.message
    )
    assert remedy in caught.value.hint


def test_build_sh_does_the_same_with_python_and_builds_without(
    orin: Path, mock_device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    subprocess.run(["tar", "xf", str(orin), "-C", str(parts)], check=True)
    environment = {
        **isolated(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment["PATH"] = f"{mock_device}:{environment['PATH']}"
    # A Python that has no folder of its own to leave out checks the layers all the same.
    environment["PYTHONSAFEPATH"] = "1"
    whole = subprocess.run(
        ["./build.sh", "--force-memory"],
        cwd=parts,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        check=False,
    )
    assert whole.returncode == 0, whole.stderr
    assert "outputs  agree" in whole.stdout
    assert read_results(parts / "results.json").passed
    plain = subprocess.run(
        ["./build.sh"],
        cwd=parts,
        capture_output=True,
        encoding="utf-8",
        env={**environment, "MPQ_PLAIN": "1"},
        check=False,
    )
    assert plain.returncode == 0, plain.stderr
    assert "latency  1.25 ms median" in plain.stdout
    assert "NOT checked" in plain.stdout
    assert json.loads((parts / "build.json").read_text(encoding="utf-8"))["trtexec"] == "10.3.0"
    unchecked = subprocess.run(
        ["./build.sh", "--trust", "release.pub"],
        cwd=parts,
        capture_output=True,
        encoding="utf-8",
        env={**environment, "MPQ_PLAIN": "1"},
        check=False,
    )
    assert unchecked.returncode == 2
    assert "'--trust' needs python3 with NumPy" in unchecked.stderr
    monkeypatch.setenv("MOCK_VERSION", "110401")
    wrong = subprocess.run(
        ["./build.sh"],
        cwd=parts,
        capture_output=True,
        encoding="utf-8",
        env={**environment, "MPQ_PLAIN": "1", "MOCK_VERSION": "110401"},
        check=False,
    )
    assert wrong.returncode == 1
    assert "trtexec here is 11.4.1" in wrong.stderr
    assert "--target jetson-agx-orin-jp7" in wrong.stderr
    (parts / "weights.bin").write_bytes(b"x")
    damaged = subprocess.run(
        ["./build.sh"],
        cwd=parts,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        check=False,
    )
    assert damaged.returncode == 1
    assert "weights.bin" in damaged.stdout + damaged.stderr


def test_an_altered_archive_is_refused_before_anything_is_written(
    orin: Path, tmp_path: Path
) -> None:
    content = bytearray(orin.read_bytes())
    with tarfile.open(orin) as tar:
        content[tar.getmember("model.onnx").offset_data + 100] ^= 1
    (tmp_path / "bad.mpq.tar").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"The part 'model\.onnx' of .* is altered"):
        install(tmp_path / "bad.mpq.tar", tmp_path / "out", Talk())
    assert not (tmp_path / "out").exists()


def test_an_altered_part_of_an_unpacked_package_is_named(orin: Path, tmp_path: Path) -> None:
    unpacked(orin, tmp_path / "p")
    (tmp_path / "p" / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArchiveError, match=r"The part 'plan\.json' in .* is altered"):
        install(tmp_path / "p", tmp_path / "p", Talk())
    (tmp_path / "p" / "plan.json").unlink()
    with pytest.raises(ArchiveError, match=r"The part 'plan\.json' is missing"):
        install(tmp_path / "p", tmp_path / "p", Talk())


def test_a_device_without_tensorrt_says_where_it_is(
    orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_module, "_runtime", lambda builder: None)
    with pytest.raises(
        EngineError, match="there is no trtexec and no Python package tensorrt here"
    ) as caught:
        probe(unpacked(orin, tmp_path))
    assert "/usr/src/tensorrt/bin" in caught.value.hint


def test_another_gpu_is_refused(
    orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Thor:
        def name(self) -> str:
            return "NVIDIA Thor"

        def compute_capability(self) -> str:
            return "SM110"

    monkeypatch.setattr(install_module, "why_no_gpu", lambda: "")
    monkeypatch.setattr(install_module, "Cuda", Thor)
    with pytest.raises(EngineError, match=r"for SM87; the GPU here is NVIDIA Thor \(SM110\)"):
        check_gpu(unpacked(orin, tmp_path))


def test_too_little_memory_is_refused_before_building(
    orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = unpacked(orin, tmp_path / "p")
    monkeypatch.setattr(memory, "machine_memory", lambda: memory.Machine(900_000_000, 100_000_000))
    with pytest.raises(
        EngineError, match=r"estimated to take 0\.5 GB of memory, and this machine has 0\.1 GB free"
    ):
        check_memory(manifest, False)
    check_memory(manifest, True)
    monkeypatch.setattr(install_module, "memory_room", lambda: None)
    check_memory(manifest, False)


def test_too_little_gpu_memory_is_refused_before_building(
    orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def name(self) -> str:
            return "Orin"

        def free_bytes(self) -> int:
            return 100_000_000

        def total_bytes(self) -> int:
            return 64_000_000_000

    manifest = unpacked(orin, tmp_path)
    assert manifest.needed_bytes > 500_000_000
    check_gpu_memory(manifest, False)  # no GPU is here: nothing to refuse
    monkeypatch.setattr(install_module, "why_no_gpu", lambda: "")
    monkeypatch.setattr(install_module, "Cuda", Full)
    with pytest.raises(
        EngineError, match=r"take 0\.51 GB at batch 8; Orin has 0\.10 of 64\.00 GB free"
    ) as caught:
        check_gpu_memory(manifest, False)
    assert "--force-memory" in caught.value.hint
    check_gpu_memory(manifest, True)


def test_a_manifest_of_another_format_or_without_a_field_is_refused(
    orin: Path, tmp_path: Path
) -> None:
    unpacked(orin, tmp_path)
    values = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "m1").write_text(json.dumps({**values, "format": 9}), encoding="utf-8")
    with pytest.raises(ArchiveError, match="format 9"):
        Manifest.load(tmp_path / "m1")
    del values["reference"]
    (tmp_path / "m2").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ArchiveError, match="reference"):
        Manifest.load(tmp_path / "m2")


def test_errors_and_latencies_are_summed_up() -> None:
    import numpy as np

    wanted = np.array([3.0, 4.0])
    assert relative_squared_error(wanted, wanted) == 0
    assert relative_squared_error(np.array([3.0, 9.0]), wanted) == 1
    assert relative_squared_error(np.array([3.0]), wanted) == float("inf")
    assert relative_squared_error(np.array([3.0, np.nan]), wanted) == float("inf")
    found = call_times([float(i) for i in range(101)])
    assert found == {"mean_ms": 50.0, "calls": 101, "p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0}


def test_a_runtime_is_found_by_what_the_target_wants(mock_device: Path) -> None:
    assert install_module._runtime("trtexec") == Runtime("trtexec", "10.3.0")
    assert install_module._runtime("tensorrt") == Runtime("trtexec", "10.3.0")
