"""A mapped tensor holds what onnx_ir reads, and maps its own bytes alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import psutil
import pytest

from mpq_deploy.graph.mapped_tensor import MappedTensor

TYPES = [
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.INT64,
    ir.DataType.INT8,
    ir.DataType.INT4,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.BOOL,
]


def at(path: Path, dtype: ir.DataType, offset: int, shape: list[int]) -> ir.ExternalTensor:
    length = int(np.prod(shape)) * dtype.bitwidth // 8
    return ir.ExternalTensor(
        path.name, offset, length, dtype, shape=ir.Shape(shape), name="w", base_dir=path.parent
    )


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [[], [6], [3, 0], [2, 3, 4]], ids=str)
@pytest.mark.parametrize("offset", [0, 64, 4096 + 8])
def test_the_values_are_those_of_onnx_ir(
    tmp_path: Path, dtype: ir.DataType, shape: list[int], offset: int
) -> None:
    path = tmp_path / "weights.data"
    path.write_bytes(bytes(np.random.default_rng(0).integers(0, 2, 9000, np.uint8)))
    if dtype.bitwidth < 8 and shape == []:
        shape = [1, 2]
    expected, found = (at(path, dtype, offset, shape) for _ in range(2))
    mapped = MappedTensor.of(found)
    assert mapped.numpy().dtype == expected.numpy().dtype
    assert mapped.numpy().shape == expected.numpy().shape
    np.testing.assert_array_equal(
        mapped.numpy().view(np.uint8) if mapped.size and shape else mapped.numpy(),
        expected.numpy().view(np.uint8) if mapped.size and shape else expected.numpy(),
    )
    np.testing.assert_array_equal(np.asarray(mapped), expected.numpy())
    if mapped.size:
        assert mapped.tobytes() == expected.tobytes()


def test_many_tensors_of_a_large_file_take_little_address_space(tmp_path: Path) -> None:
    path = tmp_path / "weights.data"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    process = psutil.Process()
    before = process.memory_info().vms
    tensors = [MappedTensor.of(at(path, ir.DataType.FLOAT, i * 4096, [1024])) for i in range(20)]
    held = [tensor.numpy() for tensor in tensors]
    assert all(float(array.sum()) == 0 for array in held)
    assert process.memory_info().vms - before < 1 << 28


def test_an_array_outlives_the_tensor_and_a_second_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "weights.data"
    path.write_bytes(np.arange(8, dtype=np.float32).tobytes())
    tensor = MappedTensor.of(at(path, ir.DataType.FLOAT, 8, [3]))
    kept = tensor.numpy()
    tensor.release()
    np.testing.assert_array_equal(tensor.numpy(), [2, 3, 4])
    del tensor
    np.testing.assert_array_equal(kept, [2, 3, 4])
