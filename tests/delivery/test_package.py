"""Packing a run: the same bytes from two clean runs, what is inside, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from mpq_deploy.delivery.package import INSTALLER, REFERENCE, SCRIPT, make_package
from mpq_deploy.device.archive import extract, read_archive
from mpq_deploy.device.manifest import Manifest
from mpq_deploy.device.output_check import relative_squared_error
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.runtime.correction import load_correction
from mpq_deploy.system.progress import Talk
from tests.device.packages import packed
from tests.pipeline.runs import FEW_SCHEMES, call, write_recipe
from tests.tiny_models import ONE_LEVEL, tiny_text_pipeline_folder


@pytest.fixture(scope="module")
def unpacked(rtx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unpacked")
    extract(rtx, read_archive(rtx), out)
    return out


def test_two_clean_runs_give_the_same_archive(model: Path, rtx: Path, tmp_path: Path) -> None:
    """Another process, another hash seed, another place for the model and the run."""
    copy = Path(shutil.copytree(model.parent, tmp_path / "moved")) / model.name
    recipe = write_recipe(tmp_path / "recipe.yaml", evaluate__correction="ptqd", model=str(copy))
    # 'package' makes the stages that are missing.
    run, archive = tmp_path / "elsewhere", tmp_path / "b.mpq.tar"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    done = call("--json", "package", run, "-o", archive, PYTHONHASHSEED="5")
    assert done.returncode == 0, done.stderr
    assert archive.read_bytes() == rtx.read_bytes()
    assert json.loads(done.stdout)["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.torch
def test_two_clean_runs_of_a_text_pipeline_give_the_same_archive(tmp_path: Path) -> None:
    """From its pipeline folder: its own calls, export, GPTQ and the plan, in another process and here."""
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    places = (tmp_path / "1", tmp_path / "2")
    for place in places:
        folder = tiny_text_pipeline_folder(place, **ONE_LEVEL)
        (place / "prompts.txt").write_text("abc\ndef\n", encoding="utf-8")
        (place / "run").mkdir()
        given = {"model": str(folder), "prompts": str(place / "prompts.txt"), "target": "rtx"}
        write_recipe(place / "run" / "recipe.yaml", **given, **FEW_SCHEMES)
    archives = [place / "made.mpq.tar" for place in places]
    done = call("--json", "package", places[0] / "run", "-o", archives[0], PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    packed(load_recipe(places[1] / "run" / "recipe.yaml"), places[1] / "run", archives[1])
    assert archives[0].read_bytes() == archives[1].read_bytes()
    extract(archives[0], read_archive(archives[0]), tmp_path / "out")
    inputs = Manifest.load(tmp_path / "out" / "manifest.json").reference.inputs
    assert set(inputs) == {"sample", "timestep", "encoder_hidden_states"}


def test_the_manifest_says_what_the_engine_must_be(unpacked: Path) -> None:
    manifest = Manifest.load(unpacked / "manifest.json")
    assert manifest.target.name == "rtx"
    assert manifest.target.takes_version("1.7.1.116")
    assert manifest.expected.layers
    assert manifest.expected.total_bytes < manifest.fp16_bytes
    assert set(manifest.parts) == {p.name for p in unpacked.iterdir()} - {
        "manifest.json",
        "SHA256SUMS",
    }
    assert {INSTALLER, SCRIPT, REFERENCE, "correction.json", "scheduler_config.json"} <= set(
        manifest.parts
    )
    assert manifest.to_json() == (unpacked / "manifest.json").read_text(encoding="utf-8")
    assert str(Path.home()) not in (unpacked / "denoiser.json").read_text(encoding="utf-8")


def test_the_references_are_what_the_packed_graph_gives(unpacked: Path) -> None:
    """Run independently, in FP16, from the unpacked files alone."""
    reference = Manifest.load(unpacked / "manifest.json").reference
    session = onnxruntime.InferenceSession(str(unpacked / "model.onnx"))
    with np.load(unpacked / reference.file) as data:
        for case in reference.cases:
            feeds = {name: data[f"{case}/{name}"] for name in reference.inputs}
            found = session.run([reference.output], feeds)[0].astype(np.float32)
            error = relative_squared_error(found, data[f"{case}/{reference.output}"])
            assert 0 < error <= reference.tolerance_nmse
            # Other numbers of threads round otherwise.
            assert error <= 5 * (reference.fp16_nmse or 0)


def test_the_correction_belongs_to_the_packed_graph(unpacked: Path) -> None:
    assert load_correction(unpacked / "correction.json", unpacked / "model.onnx")


def test_a_plan_for_another_target_is_refused_by_layer(
    rtx_run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    with open_pipeline(*rtx_run, Talk()) as pipeline, pytest.raises(UsageError) as caught:
        make_package(
            pipeline.deployed(corrected=True),
            load_target("jetson-agx-orin"),
            tmp_path / "x.mpq.tar",
        )
    assert "The plan is not for 'jetson-agx-orin'" in caught.value.message
    assert "mpq-deploy build --target jetson-agx-orin" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_target_without_engine_is_refused(rtx_run: tuple[Recipe, Path], tmp_path: Path) -> None:
    with (
        open_pipeline(*rtx_run, Talk()) as pipeline,
        pytest.raises(UsageError, match="has no engine to build"),
    ):
        make_package(
            pipeline.deployed(corrected=True),
            load_target("onnxruntime-cpu"),
            tmp_path / "x.mpq.tar",
        )


def test_the_other_jetpacks_of_a_device_are_alternatives(orin: Path, tmp_path: Path) -> None:
    extract(orin, read_archive(orin), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["alternatives"]) == {"jetson-agx-orin-jp7"}


def test_a_device_with_too_little_memory_is_refused_before_packing(
    rtx_run: tuple[Recipe, Path], tmp_path: Path
) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(
        'extends: rtx\nname: small\nmemory_bytes: {value: 0.2e9, source: "a small board"}\n',
        encoding="utf-8",
    )
    with open_pipeline(*rtx_run, Talk()) as pipeline, pytest.raises(UsageError) as caught:
        make_package(
            pipeline.deployed(corrected=True), load_target(str(small)), tmp_path / "x.mpq.tar"
        )
    assert "estimated to take 0.51 GB at batch 8" in caught.value.message
    assert "small has 0.20 GB" in caught.value.message
    assert "engine.batch_max" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
