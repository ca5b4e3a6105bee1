"""Sessions on a GPU: fewer calls at once where its memory ends, and outputs that torch reads there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mpq_deploy.system.compute import Compute, compute_on, computing_on
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session, run_to_tensors, within_gpu_memory
from tests.rounding.test_gpu_memory import Said


@pytest.mark.parametrize(
    ("most", "attempts"),
    [
        (8, [(0, 8)]),
        (2, [(0, 8), (0, 4), (0, 2)]),
        (0, [(0, 8), (0, 4), (0, 2), (0, 1), (None, 8)]),
    ],
    ids=["fits", "two calls fit", "none fits"],
)
def test_calls_are_halved_and_then_the_cpu_is_taken(
    most: int, attempts: list[tuple[int | None, int]]
) -> None:
    tried, said = [], Said()

    def work(size: int) -> str:
        tried.append((computing_on().runtime, size))
        if computing_on().runtime is not None and size > most:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 1")
        return "done"

    with compute_on(Compute(0, None)):
        assert within_gpu_memory(work, 8, "calls", said) == "done"
    assert tried == attempts
    assert len(said.lines) == len(attempts) - 1
    assert all(
        ("on the CPU" in line) == (place is None)
        for line, (place, _) in zip(said.lines, attempts[1:])
    )


def test_running_out_on_the_cpu_and_other_errors_pass() -> None:
    for place, error in ((Compute(), MemoryError()), (Compute(0, None), ValueError("another"))):

        def work(size: int, error: Exception = error) -> None:
            raise error

        with compute_on(place), pytest.raises(type(error)):
            within_gpu_memory(work, 8, "calls", Talk())


def test_outputs_become_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(Compute, "torch_device", lambda self: torch.device("cpu"))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 2]))
    by = ir.Value(name="by", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    nodes = [ir.node("Mul", [x, by]), ir.node("Transpose", [x], attributes={"perm": [1, 0]})]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"y{number}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([x, by], outputs, nodes=nodes, opset_imports={"": 21})
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    with open_session(ir.Model(graph, ir_version=10), Talk()) as session:
        found = run_to_tensors(session, {"x": values[::-1], "by": np.float32(3)}, [(3, 2), (2, 3)])
    np.testing.assert_array_equal(found[0].numpy(), 3 * values[::-1])
    np.testing.assert_array_equal(found[1].numpy(), values[::-1].T)
