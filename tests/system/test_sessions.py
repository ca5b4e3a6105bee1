"""Sessions map the user's weights where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.graph.load import load_model
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session


class Heard(Talk):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("relative", [False, True])
def test_nothing_is_copied_whatever_the_scratch_folder_is_called(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scratch = Path("scratch") if relative else tmp_path / "scratch"
    scratch.mkdir()
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 64]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")]
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(proto, "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    model: ir.Model = load_model(Path("m.onnx"))
    talk, given = Heard(), np.ones((2, 64), np.float32)
    with open_session(model, talk, scratch=scratch) as session:
        copies = [one for one in scratch.rglob("*") if one.is_file() and one.stat().st_size > 4096]
        (found,) = session.run(None, {"x": given})
    assert talk.lines == [] and copies == []
    np.testing.assert_allclose(found, given @ weight, rtol=1e-4, atol=1e-5)
    assert list(scratch.rglob("*.data")) == []
