"""Weights and configurations of strangers are looked at before a class is made."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.open import open_denoiser
from tests.tiny_models import tiny_unet_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Marks:
    """Unpickling it leaves a mark."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "part", ["part.bin", "../part.safetensors", "/etc/passwd.safetensors", "part.pt", 5, None, ""]
)
def test_an_index_names_safetensors_of_its_folder_alone(part: Any, tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path) / "unet"
    (folder / WEIGHTS).unlink()
    (folder / "part.bin").write_bytes(pickle.dumps(Marks(str(tmp_path / "mark"))))
    index = {"metadata": {}, "weight_map": {"conv_in.weight": part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        open_denoiser(folder.parent)
    assert "index" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()


NUMBERS: dict[str, Any] = {
    "num_class_embeds": 10**9,
    "layers_per_block": 100_000,
    "block_out_channels": [8, 10**8],
    "sample_size": 30_000,
    "in_channels": 10**7,
    "norm_num_groups": 10**6,
    "attention_head_dim": 2**40,
}


@pytest.mark.parametrize(("key", "value"), NUMBERS.items(), ids=NUMBERS)
def test_a_number_that_no_weight_bears_out_allocates_nothing(
    key: str, value: Any, tmp_path: Path
) -> None:
    folder = tiny_unet_folder(tmp_path)
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, key: value}), encoding="utf-8")
    started = time.monotonic()
    with pytest.raises((ModelError, UsageError)) as caught:
        open_denoiser(folder)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20


HEADERS = {
    "too long": (2**60).to_bytes(8, "little") + b"{}",
    "no json": (4).to_bytes(8, "little") + b"abcd",
    "out of range": json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1600]}}),
    "wrong size": json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}}),
    "negative": json.dumps({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}),
    "empty": b"",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_damaged_headers_are_one_line(header: str | bytes, tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    if isinstance(header, str):
        header = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
    (folder / "unet" / WEIGHTS).write_bytes(header)
    with pytest.raises(ModelError, match="cannot be read") as caught:
        open_denoiser(folder)
    assert "\n" not in str(caught.value)
