"""A finished run in the place of a denoiser: the quantized graph answers, as it was evaluated."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpq_deploy
from mpq_deploy.errors import ModelError, RunFolderError, UsageError
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.models.export import load_exported
from mpq_deploy.runtime.ort import OrtDenoiser
from tests.pipeline.runs import Built, call

torch = pytest.importorskip("torch")


def answers(run: Path, **conditions: Any) -> Any:
    unet = mpq_deploy.load(run, device="cpu")
    sample = torch.randn(3, *unet.spec.sample.shape, generator=torch.Generator().manual_seed(0))
    return sample, unet(sample, 300, **conditions).sample


def test_a_run_answers_with_its_quantized_graph(finished: Built) -> None:
    exported = load_exported(finished.run / "export")
    rows = {name: values[:3] for name, values in exported.conditions.arrays.items()}
    sample, found = answers(
        finished.run, **{name: torch.from_numpy(values) for name, values in rows.items()}
    )
    plan, whole = (
        OrtDenoiser(path, exported.spec, fake_quant_only=True)(sample.numpy(), 300.0, rows)
        for path in (finished.run / "quantize" / SIMULATED, exported.model)
    )
    np.testing.assert_array_equal(found.numpy(), plan)
    assert not np.array_equal(found.numpy(), whole)


def test_a_run_that_is_not_done_or_a_file_of_another_kind(run: Path) -> None:
    for name in (DEPLOYED, SIMULATED):
        (run / "quantize" / name).unlink()
    with pytest.raises(UsageError, match="no quantized ONNX model"):
        mpq_deploy.load(run, backend="onnxruntime")
    with pytest.raises(UsageError, match=r"neither an \.onnx nor an \.engine"):
        mpq_deploy.load(run / "quantize" / "weights.bin")


@pytest.mark.parametrize("name", [SIMULATED, "weights.bin"])
def test_what_was_altered_does_not_answer(run: Path, name: str) -> None:
    """The pipeline would make the stage again; who only loads it is told."""
    path = run / "quantize" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises((RunFolderError, ModelError), match=f"{name} was altered|is not ONNX"):
        mpq_deploy.load(run, backend="onnxruntime")


def test_a_description_that_was_altered_does_not_answer(run: Path) -> None:
    path = run / "export" / "denoiser.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "guidance_scale": 99.0}), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"denoiser\.json was altered"):
        mpq_deploy.load(run, backend="onnxruntime")


@pytest.mark.parametrize("stage", ["quantize", "export"])
def test_a_stage_without_its_record_does_not_answer(run: Path, stage: str) -> None:
    (run / stage / "stage.json").unlink()
    with pytest.raises(RunFolderError, match="is not in the record"):
        mpq_deploy.load(run, backend="onnxruntime")


def test_a_folder_of_hard_links_opens(run: Path, tmp_path: Path) -> None:
    """As `cp -al` makes it, and as a killed process could leave one."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, copy_function=os.link)
    assert (copy / "quantize" / "weights.bin").stat().st_nlink == 2
    assert np.array_equal(answers(copy)[1].numpy(), answers(run)[1].numpy())
    done = call("evaluate", copy)
    assert done.returncode == 0, done.stderr
