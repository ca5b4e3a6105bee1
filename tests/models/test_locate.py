"""Hub ids: what counts as one, what is fetched, and what is said when it cannot be."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.models.locate import is_hub_id, locate
from mpq_deploy.models.open import open_denoiser
from tests.tiny_models import tiny_unet_folder

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", ["org/name", "some-org/Model-v1.5", "a/b_c"])
def test_ids(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["name", "/abs/path", "./org/name", "a/b/c", "../a", "a/", "org/../name"]
)
def test_paths_are_no_ids(name: str) -> None:
    assert not is_hub_id(name)


def test_without_network_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network\nmore words")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match="cannot be fetched as a hub id: no network Check"):
        open_denoiser("some-org/some-model")


def test_only_harmless_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    folder = tiny_unet_folder(tmp_path)
    asked: dict[str, Any] = {}

    def local(hub_id: str, **options: Any) -> str:
        asked.update(options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local)
    spec = open_denoiser("some-org/some-model").spec
    assert spec.source == "some-org/some-model"

    def taken(name: str) -> bool:
        return any(fnmatch(name, p) for p in asked["allow_patterns"]) and not any(
            fnmatch(name, p) for p in asked["ignore_patterns"]
        )

    assert all(taken(str(f.relative_to(folder))) for f in folder.rglob("*.*"))
    assert taken("unet/diffusion_pytorch_model-00001-of-00002.safetensors") and taken(
        "tokenizer/merges.txt"
    )
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "pipeline.py",
        "model.ckpt",
        "unet/x.fp16.safetensors",
    ):
        assert not taken(name)


@pytest.mark.parametrize("kind", ["fp16", "onnx"])
def test_a_repository_without_plain_weights_is_asked_for_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    import huggingface_hub

    folder = tiny_unet_folder(tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    asked: list[dict[str, Any]] = []

    def local(hub_id: str, **options: Any) -> str:
        asked.append(options)
        if len(asked) == 2 and kind == "fp16":
            weights.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(content)
        elif len(asked) == 2:
            (folder / "unet" / "model.onnx").write_bytes(b"")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local)
    path = locate("some-org/some-model")
    assert path == (folder if kind == "fp16" else folder / "unet" / "model.onnx")
    assert len(asked) == 2 and "*.fp16.*" in asked[0]["ignore_patterns"]
    assert not any(
        pattern.endswith((".bin", ".py", "*"))
        for pattern in asked[1]["allow_patterns"]
        if not pattern.endswith((".safetensors*", ".onnx*"))
    )
