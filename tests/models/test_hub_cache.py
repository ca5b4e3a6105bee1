"""Models as huggingface_hub keeps them: every file of a snapshot is a link into ``blobs/``."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from mpq_deploy.check.check import check_model
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import ModelError
from mpq_deploy.models.locate import source_files
from mpq_deploy.models.open import open_denoiser
from tests.pipeline.runs import build, recipe_for, save_denoiser
from tests.tiny_models import tiny_unet_folder

REVISION = "0123456789abcdef"


def hub_cache(folder: Path, cache: Path) -> Path:
    """Put the files of ``folder`` into a cache as the hub's library does; return the snapshot."""
    root = cache / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / REVISION
    for file in (f for f in folder.rglob("*") if f.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def external(folder: Path, *, one: bool) -> Path:
    """The tiny denoiser with all its weights in one file beside it, or each in its own."""
    path = save_denoiser(folder)
    model = onnx.load(path)
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=one,
        location="model.onnx_data" if one else None,
        size_threshold=0,
    )
    return path


@pytest.mark.parametrize("one", [True, False])
def test_an_onnx_file_with_external_data_opens(tmp_path: Path, one: bool) -> None:
    plain = external(tmp_path / "plain", one=one)
    path = hub_cache(plain.parent, tmp_path / "hub") / "model.onnx"
    built = build(recipe_for(path), tmp_path / "run", "export")
    whole = build(recipe_for(plain), tmp_path / "whole", "export")
    assert built.made == ["export"]
    for name in ("model.onnx", "model.onnx.data"):
        assert (built.run / "export" / name).read_bytes() == (
            whole.run / "export" / name
        ).read_bytes()
    blobs = {file.name for file in (path.parents[2] / "blobs").iterdir()}
    digested = [file.resolve() for _, file in source_files(path)]
    assert {file.name for file in digested} == blobs
    feeds = {"sample": np.zeros((1, 3, 8, 8), np.float32), "timestep": np.zeros(1, np.float32)}
    spec = open_denoiser(path).spec
    feeds["sample"] = np.zeros((1, *spec.sample.shape), np.float32)
    assert np.isfinite(open_denoiser(path).network.reference(feeds)).all()
    assert check_model(path, load_target("rtx")).nodes > 0


def test_a_relative_path_into_the_cache_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = external(tmp_path / "plain", one=True)
    monkeypatch.chdir(hub_cache(plain.parent, tmp_path / "hub"))
    assert open_denoiser("model.onnx").network.to_onnx is not None


@pytest.mark.parametrize("leads_to", ["elsewhere", "another model", "beside blobs"])
def test_a_link_out_of_the_cache_stays_refused(tmp_path: Path, leads_to: str) -> None:
    plain = external(tmp_path / "plain", one=True)
    path = hub_cache(plain.parent, tmp_path / "hub") / "model.onnx"
    places = {
        "elsewhere": tmp_path / "secret",
        "another model": tmp_path / "hub" / "models--org--other" / "blobs" / "secret",
        "beside blobs": path.parents[2] / "secret",
    }
    secret = places[leads_to]
    secret.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(plain.parent / "model.onnx_data", secret)
    data = path.parent / "model.onnx_data"
    data.unlink()
    data.symlink_to(secret)
    with pytest.raises(ModelError, match="outside the model's folder"):
        open_denoiser(path)


def test_a_link_that_no_cache_made_stays_refused(tmp_path: Path) -> None:
    plain = external(tmp_path / "plain", one=True)
    (tmp_path / "other").mkdir()
    data = plain.parent / "model.onnx_data"
    data.rename(tmp_path / "other" / "data")
    data.symlink_to(tmp_path / "other" / "data")
    with pytest.raises(ModelError, match="outside the model's folder"):
        open_denoiser(plain)


@pytest.mark.torch
def test_a_pipeline_folder_in_the_cache_opens(tmp_path: Path) -> None:
    snapshot = hub_cache(tiny_unet_folder(tmp_path / "plain"), tmp_path / "hub")
    assert open_denoiser(snapshot).spec.sample.shape == (3, 8, 8)
    assert "unet/config.json" in [name for name, _ in source_files(snapshot)]


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
)
def test_files_of_a_pipeline_that_lead_out_of_the_cache_are_refused(
    tmp_path: Path, name: str
) -> None:
    plain = tiny_unet_folder(tmp_path / "plain")
    snapshot = hub_cache(plain, tmp_path / "hub")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(plain / name)
    with pytest.raises(ModelError, match=r"links to a file outside of models--org--name"):
        open_denoiser(snapshot)


@pytest.mark.parametrize("name", ["model.onnx", "model.yaml"])
def test_an_onnx_file_that_leads_out_of_the_cache_is_refused(tmp_path: Path, name: str) -> None:
    plain = save_denoiser(tmp_path / "plain")
    path = hub_cache(plain.parent, tmp_path / "hub") / "model.onnx"
    (path.parent / name).unlink()
    (path.parent / name).symlink_to(plain.parent / name)
    with pytest.raises(ModelError, match=r"links to a file outside of models--org--name"):
        open_denoiser(path)
