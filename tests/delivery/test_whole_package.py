"""The package of a whole pipeline: packed, installed without PyTorch, its images made again; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from PIL import Image
from typer.testing import CliRunner

from mpq_deploy.cli import app
from mpq_deploy.delivery.deploy import Remote, deploy_whole
from mpq_deploy.delivery.device_results import read_results
from mpq_deploy.delivery.whole_package import make_whole_package
from mpq_deploy.delivery.whole_results import take_in_whole, whole_devices
from mpq_deploy.device import whole_installer
from mpq_deploy.device.archive import (
    MANIFEST,
    SUMS,
    ArchiveError,
    extract,
    read_archive,
    write_archive,
)
from mpq_deploy.device.generate.generator import Generator
from mpq_deploy.device.generate.residency import RUNTIME_BYTES, residency
from mpq_deploy.device.installer import Trust, install, summary
from mpq_deploy.device.whole_manifest import WholeManifest
from mpq_deploy.engine import builder
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import EngineError, InputError, UsageError
from mpq_deploy.report.gate import Limits
from mpq_deploy.report.parts_gate import check_pipeline
from mpq_deploy.report.parts_page import device_facts
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.system.memory import Room
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import Latency
from tests.delivery.test_deploy import needs_sshd, remote, server
from tests.pipeline.runs import Notes, tiny_whole_run
from tests.shared import made_once

__all__ = ["server"]
pytestmark = [pytest.mark.slow, pytest.mark.torch]
PARTS = ("text_encoder", "unet", "vae_decoder")
# What a device need not have: the graphs run in ONNX Runtime, prompts go through tokenizers.
BLOCKED = (
    *("torch", "diffusers", "transformers", "onnx", "onnx_ir", "pydantic", "typer", "yaml"),
    *("networkx", "ml_dtypes", "rich", "highspy"),
)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline's run up to its graphs, planned for RTX."""
    return made_once(tmp_path_factory, "whole", tiny_whole_run) / "run"


def packed(run: Path, out: Path, target: str = "onnxruntime-cpu") -> Path:
    make_whole_package(run, load_target(target), out, Talk())
    return out


@pytest.fixture(scope="module")
def package(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(run, tmp_path_factory.mktemp("packed") / "whole.mpq.tar")


def install_alone(archive: Path, out: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The installer in a process that cannot import what a device lacks."""
    lines = f"import sys\nfor name in {BLOCKED!r}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(lines, encoding="utf-8")
    root = Path(whole_installer.__file__).parents[2]
    command = [sys.executable, "-m", "mpq_deploy.install", str(archive), "-o", str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{root}"}
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, cwd=folder, check=False
    )


def test_it_installs_without_pytorch_and_makes_the_images_of_the_run(
    run: Path, package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = install_alone(package, out, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "images   agree" in done.stdout and "memory, estimated: text_encoder" in done.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["passed"] and results["images"]["ran"] and results["components"] == {}
    with pytest.raises(UsageError, match="of a whole pipeline"):
        read_results(out / "results.json")
    # Into the joint report, if it is of these plans.
    copy, other = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "other.json"
    take_in_whole(copy, out / "results.json", Talk())
    (device,) = whole_devices(copy, PipelineFile.load(copy), 2, Talk())
    assert device.verified is None and device.images_agree
    assert device.image_error is not None and device.image_error < 1e-3
    assert (
        "images agree"
        in device_facts(PipelineFile.load(copy).model_copy(update={"devices": (device,)}))[0]
    )
    foreign = {**results["digests"], "unet": {"quantize": "0" * 64}}
    other.write_text(json.dumps({**results, "digests": foreign}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"with another unet \(quantize\) than"):
        take_in_whole(copy, other, Talk())
    manifest = WholeManifest.load(out / MANIFEST)
    assert tuple(manifest.components) == PARTS and len(manifest.images) == 2
    assert [one.prompt for one in manifest.images] == ["abc", "def"]
    wish: dict[str, Any] = {"steps": 2, "guidance": 3.0, "seed": 4}
    ours = Generator(run / "generation", threads=1)("ghi", **wish)[0].array
    theirs = Generator(out, threads=1)("ghi", **wish)[0].array
    np.testing.assert_array_equal(theirs, ours)
    made = CliRunner().invoke(
        app, ["generate", str(out), "-p", "abc", "--steps", "1", "-o", str(tmp_path / "x.png")]
    )
    assert made.exit_code == 0, made.output
    # The file itself is no folder to generate from.
    with pytest.raises(InputError, match=r"whole\.mpq\.tar is a file"):
        Generator(package)


def test_the_command_packs_the_same_bytes_and_another_digest_is_refused(
    run: Path, package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again.mpq.tar"
    arguments = ["--json", "-q", "package", str(run), "--target", "onnxruntime-cpu", "-o", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == package.read_bytes()
    with pytest.raises(ArchiveError, match="has the SHA-256"):
        install(out, tmp_path / "o", Talk(), trust=Trust(sha256="0" * 64))


def repacked(
    package: Path, out: Path, change: dict[str, bytes | None], manifest: bool = True
) -> Path:
    """The package with other parts, the digests of its manifest made to fit."""
    import hashlib

    extract(package, read_archive(package), out)
    names = [
        p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name != SUMS
    ]
    parts = {name: (out / name).read_bytes() for name in names}
    for name, content in change.items():
        parts.pop(name, None)
        parts |= {} if content is None else {name: content}
    if manifest:
        values = json.loads(parts[MANIFEST])
        others = {name: one for name, one in parts.items() if name != MANIFEST}
        values["parts"] = {name: hashlib.sha256(one).hexdigest() for name, one in others.items()}
        parts[MANIFEST] = json.dumps(values).encode()
    write_archive(out.with_suffix(".mpq.tar"), parts)
    return out.with_suffix(".mpq.tar")


def test_other_images_than_the_build_machines_fail(package: Path, tmp_path: Path) -> None:
    extract(package, read_archive(package), tmp_path / "was")
    pixels = np.asarray(Image.open(tmp_path / "was" / "reference" / "0.png"))
    Image.fromarray(pixels[::-1]).save(tmp_path / "turned.png")
    turned = {"reference/0.png": (tmp_path / "turned.png").read_bytes()}
    archive = repacked(package, tmp_path / "r", turned)
    results = install(archive, tmp_path / "out", Talk())
    assert not results["passed"] and results["images"]["passed"] is False
    assert results["images"]["errors"]["reference/0.png"] > results["images"]["tolerance"]
    assert results["images"]["errors"]["reference/1.png"] <= results["images"]["tolerance"]
    assert "DIFFER" in summary(results, tmp_path / "out")


WRONG: dict[str, tuple[dict[str, bytes | None], str]] = {
    "a component's graph": ({"components/unet/model.fp32.onnx": None}, "no unet, the denoiser"),
    "the description": ({"scheduler_config.json": None}, r"scheduler_config\.json"),
    "another part": ({"components/unet/code.py": b"x"}, r"components/unet/code\.py"),
    "an unknown component": ({"components/safety/model.onnx": b"x"}, r"components/safety"),
    "another tokenizer": ({"tokenizer/tokenizer.json": b"{}"}, "is no tokenizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_packages_that_lack_or_hold_something_else_are_refused(
    package: Path, tmp_path: Path, name: str
) -> None:
    change, message = WRONG[name]
    archive = repacked(package, tmp_path / "r", change)
    with pytest.raises((ArchiveError, InputError), match=message):
        install(archive, tmp_path / "out", Talk())


def test_altered_bytes_are_found(package: Path, tmp_path: Path) -> None:
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.mpq.tar").write_bytes(content)
    with pytest.raises(ArchiveError, match="altered"):
        install(tmp_path / "x.mpq.tar", tmp_path / "out", Talk())
    extract(package, read_archive(package), tmp_path / "folder")
    (tmp_path / "folder" / "components" / "unet" / "weights.bin").write_bytes(b"x")
    with pytest.raises(ArchiveError, match=r"components/unet/weights\.bin.*is altered"):
        install(tmp_path / "folder", tmp_path / "folder", Talk())


def test_the_denoiser_and_the_decoder_share_memory_or_take_turns() -> None:
    sizes = {"text_encoder": 5 * 10**9, "unet": 2 * 10**9, "vae_decoder": 10**9}
    large = ("text_encoder",)
    for free, turns, beyond in ((8, False, ()), (5.6, False, ()), (3.4, True, large)):
        shared = residency(sizes, Room(int(free * 1e9), "orin"))
        assert (shared.take_turns, shared.too_large) == (turns, beyond)
        assert f"orin has {free:.1f} GB free" in shared.words
    least = {**sizes, "text_encoder": 10**9}
    shared = residency(least, Room(RUNTIME_BYTES + 2 * 10**9, "orin"))
    assert shared.take_turns and not shared.too_large


def test_little_memory_is_told_and_too_little_refused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_archive(package)
    extract(package, read, tmp_path / "x")
    sizes = WholeManifest.load(tmp_path / "x" / MANIFEST).components
    monkeypatch.setenv("MPQ_DEPLOY_MEMORY", str(RUNTIME_BYTES + max(sizes.values())))
    notes = Notes()
    assert install(tmp_path / "x", tmp_path / "x", notes)["passed"]
    assert any("unet and vae_decoder take turns" in line for line in notes.lines)
    # Each batch opens both again.
    assert sum("unet loaded" in line for line in notes.lines) == 2
    told = Notes()
    assert Generator(tmp_path / "x", talk=told)._alone and "take turns" in told.lines[0]
    assert not Generator(tmp_path / "x", one_at_a_time=False)._alone
    monkeypatch.setenv("MPQ_DEPLOY_MEMORY", str(RUNTIME_BYTES))
    with pytest.raises(EngineError, match="alone is estimated to take"):
        install(tmp_path / "x", tmp_path / "x", Talk())
    assert install(tmp_path / "x", tmp_path / "x", Talk(), force_memory=True)["passed"]


def test_a_run_that_lacks_a_component_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "components" / "unet")
    with pytest.raises(UsageError, match="no run of its unet, the denoiser"):
        packed(copy, tmp_path / "x.mpq.tar")


def test_a_run_that_was_never_planned_as_a_whole_is_refused(run: Path, tmp_path: Path) -> None:
    """Before its parts are planned one by one, each with another budget than its share."""
    killed = Path(shutil.copytree(run, tmp_path / "run"))
    view = json.loads((killed / "pipeline.json").read_text(encoding="utf-8"))
    for part in view["parts"].values():
        part["size_bytes"] = None
    (killed / "pipeline.json").write_text(json.dumps(view), encoding="utf-8")
    for stage in ("allocate", "quantize"):
        shutil.rmtree(killed / "components" / "unet" / stage)
    with pytest.raises(UsageError, match=r"was not planned as a whole: .*\(text_encoder, unet"):
        packed(killed, tmp_path / "x.mpq.tar")
    assert not (killed / "components" / "unet" / "allocate").exists()


def test_a_plan_for_another_target_is_refused_by_component(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vae_decoder: The plan is not for 'jetson") as caught:
        packed(run, tmp_path / "x.mpq.tar", "jetson-orin-nano")
    assert "--target jetson-orin-nano" in caught.value.hint and not list(tmp_path.iterdir())


@needs_sshd
def test_it_is_deployed_over_ssh(run: Path, server: Path, tmp_path: Path) -> None:
    copy, device = Path(shutil.copytree(run, tmp_path / "run")), remote(server, tmp_path / "device")
    for expected in ("installing on device", "already installed there"):
        notes = Notes()
        results = deploy_whole(copy, load_target("onnxruntime-cpu"), device, notes)
        assert results["passed"] and results["images"]["ran"]
        assert any(expected in line for line in notes.lines)
    assert isinstance(device, Remote)


@pytest.mark.rtx
def test_engines_of_all_components_are_built_in_turn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By TensorRT-RTX, without a GPU: layers are checked, images are not made."""
    pytest.importorskip("tensorrt_rtx")
    copy, out = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "out"
    archive = packed(copy, tmp_path / "rtx.mpq.tar", "rtx")
    notes = Notes()
    results = install(archive, out, notes)
    assert results["passed"] and tuple(results["components"]) == PARTS
    for name, one in results["components"].items():
        assert one["engine"]["verified"]
        assert (out / "components" / name / "engine" / "model.engine").is_file()
    assert [line for line in notes.lines if line.startswith("component ")] == [
        f"component {name}" for name in PARTS
    ]
    # The whole's results go into its run, each component's into its own.
    take_in_whole(copy, out / "results.json", Talk())
    assert all((copy / "components" / name / "devices" / "rtx.json").is_file() for name in PARTS)
    (device,) = whole_devices(copy, PipelineFile.load(copy), 2, Talk())
    assert device.verified and set(device.engine_bytes) == set(PARTS)
    # Times of calls, as of a GPU: an image's are those of its calls.
    times = dict.fromkeys(("mean_ms", "p50_ms", "p90_ms", "p99_ms"), 3.0)
    for one in results["components"].values():
        one["latency"] = {**times, "calls": 9, "samples_per_second": None}
    (tmp_path / "timed.json").write_text(json.dumps(results), encoding="utf-8")
    take_in_whole(copy, tmp_path / "timed.json", Talk())
    view = PipelineFile.load(copy)
    (device,) = whole_devices(copy, view, 2, Talk())
    assert device.image_ms == pytest.approx(sum((p.rows or 0) * 1.5 for p in view.parts.values()))
    view.model_copy(update={"devices": (device,)}).save(copy)
    for limit, passed in ((2 * (device.image_ms or 0), True), ((device.image_ms or 0) / 2, False)):
        limits = Limits(max_latency=Latency.parse(f"{limit}ms"))
        assert check_pipeline(copy, limits, allow_estimate=False).passed is passed
    with pytest.raises(UsageError, match="of one component"):
        take_in_whole(copy, out / "components" / "unet" / "results.json", Talk())
    if not results["images"]["ran"]:
        assert "NVIDIA driver" in results["images"]["why"]
    parts = Generator(out).generation.parts
    assert {part.file.suffix for part in parts.values()} == {".engine"}
    assert all(part.largest_batch and part.memory_bytes for part in parts.values())
    # What an interrupted call has finished is not built again.
    (out / "components" / "vae_decoder" / "results.json").unlink()
    again, asked = Notes(), []
    real = builder._save_job
    monkeypatch.setattr(builder, "_save_job", lambda *job: asked.append(job[0]) or real(*job))
    sizes = WholeManifest.load(out / MANIFEST).components
    little = Room(RUNTIME_BYTES + sizes["vae_decoder"] - 1, "a small GPU")
    monkeypatch.setattr(whole_installer, "free_room", lambda engines: little)
    # One that does not fit is built to stream its weights.
    assert install(out, out, again)["passed"]
    assert [one.streams_weights for one in asked] == [True]
    assert any("vae_decoder alone is estimated" in line for line in again.lines)
