"""Constants are added in one way: what exists is shared or refused, never replaced."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mpq_deploy.graph.constants import add_constant
from tests.graphs import GraphBuilder


def some_model() -> ir.Model:
    graph = GraphBuilder()
    graph.op("MatMul", [graph.input("x", ["n", 4]), graph.random("w", 4, 6)], "product")
    graph.nodes[-1].output[0] = graph.output("out", ["n", 6])
    return ir.from_proto(graph.model())


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_an_array_is_stored_with_its_type_and_shape(shape: tuple[int, ...]) -> None:
    model = some_model()
    array = np.ones(shape, np.float16).T
    value = add_constant(model, "added", array)
    assert model.graph.initializers["added"] is value and value.is_initializer()
    assert (value.dtype, value.shape) == (ir.DataType.FLOAT16, ir.Shape(array.shape))
    np.testing.assert_array_equal(
        ir.from_proto(ir.to_proto(model)).graph.initializers["added"].const_value, array
    )


def test_an_equal_constant_is_shared() -> None:
    model = some_model()
    assert add_constant(model, "c", np.arange(3)) is add_constant(model, "c", np.arange(3))


@pytest.mark.parametrize(
    "other",
    [np.arange(1, 4), np.arange(3, dtype=np.int32), np.arange(3).reshape(3, 1)],
    ids=["value", "type", "shape"],
)
def test_another_constant_of_that_name_is_refused(other: np.ndarray) -> None:
    model = some_model()
    add_constant(model, "c", np.arange(3))
    with pytest.raises(ValueError, match="another constant 'c'"):
        add_constant(model, "c", other)


def test_a_lazy_tensor_is_not_read() -> None:
    def fail() -> ir.Tensor:
        raise AssertionError("the tensor was read")

    model = some_model()
    lazy = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([5]), name="lazy")
    assert add_constant(model, "lazy", lazy) is add_constant(model, "lazy", lazy)
