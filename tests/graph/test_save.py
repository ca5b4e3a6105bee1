"""What the bytes of a file's constants are, and how many of them repeat others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_tensor_value_info
from onnx.numpy_helper import from_array

from mpq_deploy.graph.save import constant_bytes, repeated_bytes


def test_constants_that_equal_others_are_repeated(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal((16, 64)).astype(np.float32)
    other = random.standard_normal((16, 64)).astype(np.float32)
    arrays = {
        "a": one,
        "b": one.copy(),
        "c": other,
        "d": one.copy(),
        "e": one.reshape(64, 16),
        "f": other[:8],
    }
    arrays |= {
        "g": one.view(np.int32),
        "h": np.zeros((4, 256), np.float32),
        "i": np.ones((4, 256), np.float32),
    }
    nodes = [make_node("Identity", [name], [f"{name}_out"], name=name) for name in arrays]
    outputs = [
        make_tensor_value_info(f"{name}_out", TensorProto.UNDEFINED, None) for name in arrays
    ]
    graph = make_graph(
        nodes, "g", [], outputs, [from_array(array, name) for name, array in arrays.items()]
    )
    path = tmp_path / "m.onnx"
    onnx.save(
        make_model(graph), path, save_as_external_data=True, location="m.data", size_threshold=0
    )
    # The same bytes in another shape or type are another constant.
    assert repeated_bytes(path) == 2 * one.nbytes
    assert constant_bytes(path) == sum(array.nbytes for array in arrays.values())
