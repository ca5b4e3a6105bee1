"""Pages of mapped constants leave the process and come back unchanged."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mpq_deploy.system.mapped import drop_all_pages, drop_pages

BYTES = 32 << 20


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssFile")))


def mapped(folder: Path) -> ir.ExternalTensor:
    values = np.arange(BYTES // 4, dtype=np.float32)
    values.tofile(folder / "a.data")
    shape = ir.Shape(values.shape)
    return ir.ExternalTensor(
        "a.data", 0, BYTES, ir.DataType.FLOAT, shape=shape, name="a", base_dir=folder
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_go_and_values_stay(tmp_path: Path) -> None:
    tensor = mapped(tmp_path)
    array = tensor.numpy()
    before = resident_bytes()
    total = array.sum(dtype=np.float64)
    assert resident_bytes() - before > BYTES // 2
    drop_pages(tensor)
    assert resident_bytes() - before < BYTES // 4
    assert array.sum(dtype=np.float64) == total
    assert tensor.numpy() is array


def test_constants_in_memory_are_left_alone() -> None:
    tensor = ir.tensor(np.ones(3, np.float32), name="a")
    value = ir.Value(name="a", const_value=tensor)
    model = ir.Model(
        ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}), ir_version=10
    )
    drop_pages(None)
    drop_all_pages(model)
    np.testing.assert_array_equal(tensor.numpy(), 1)
