"""What is recorded of the exporter: it depends on all that its graph does, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from mpq_deploy.models.open import open_denoiser
from mpq_deploy.models.torch_export import TorchNetwork
from tests.export_record import ARCHIVE, Records, export_key, recorded
from tests.tiny_models import ONE_LEVEL_CLASSES, tiny_unet_folder

pytestmark = pytest.mark.torch


def network(folder: Path, **options: Any) -> TorchNetwork:
    found = open_denoiser(tiny_unet_folder(folder, **{**ONE_LEVEL_CLASSES, **options})).network
    assert isinstance(found, TorchNetwork)
    return found


def test_the_key_depends_on_structure_and_call_and_not_on_weights(tmp_path: Path) -> None:
    one = network(tmp_path / "a")
    key = export_key(one)
    assert export_key(network(tmp_path / "b", seed=5)) == key
    assert export_key(network(tmp_path / "c", norm_num_groups=2)) != key
    other = [replace_shape(item) if item.name == "sample" else item for item in one.inputs]
    assert export_key(one.taking(other)) != key
    assert export_key(TorchNetwork(one.module, one.inputs, one.output, lambda *a: a[1])) != key


def replace_shape(item: Any) -> Any:
    return item.model_copy(update={"shape": (*item.shape[:-1], 2 * item.shape[-1])})


def test_a_graph_of_other_weights_holds_this_modules_own(tmp_path: Path) -> None:
    records = Records(tmp_path)
    made = {seed: network(tmp_path / f"{seed}", seed=seed) for seed in (0, 5)}
    for one in made.values():
        model = records.exported(one)
        own = one.module.state_dict()
        found = {
            name.removeprefix("network."): value.const_value
            for name, value in model.graph.initializers.items()
        }
        assert {name for name in own if name in found}
        for name, tensor in own.items():
            if name in found:
                np.testing.assert_array_equal(found[name].numpy(), tensor.numpy())
        assert not any(isinstance(value, ir.ExternalTensor) for value in found.values())
    assert len(list(tmp_path.glob("*.onnx"))) == 1


def test_what_is_recorded_is_whole() -> None:
    names = recorded()
    graphs = {Path(name).stem for name in names if name.endswith(".onnx")}
    assert graphs == {Path(name).stem for name in names if name.endswith(".json")} and graphs
    assert ARCHIVE.stat().st_size < 1_000_000
