"""Where the graph's values lie on a GPU: data there, sizes in the making on the CPU, and nothing is waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from mpq_deploy.graph.layers import layer_graph  # noqa: E402
from mpq_deploy.graph.load import load_model  # noqa: E402
from mpq_deploy.models.export import export_denoiser  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.onnx_torch.host_values import host_inputs, host_nodes  # noqa: E402
from mpq_deploy.onnx_torch.torch_graph import TorchGraph  # noqa: E402
from tests.exported_networks import NETWORKS, Form  # noqa: E402
from tests.fake_gpu import CPU, GPU, fake_gpu  # noqa: E402
from tests.graphs import GraphBuilder, awkward_graph, denoiser_graph  # noqa: E402
from tests.onnx_torch.test_operators import CASES, Case, model_of  # noqa: E402
from tests.pipeline.runs import describe  # noqa: E402
from tests.sensitivity.kinds import kinds  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operators_compute_where_their_data_is(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = host_inputs(case.op)
    case = replace(case, constants=tuple({*case.constants, *numbers} - _absent(case)))
    model = model_of(case)
    fed = {
        f"in{i}": x for i, x in enumerate(case.inputs) if x is not None and i not in case.constants
    }
    plain = TorchGraph(ir.from_proto(model))
    expected = plain.run(plain.feed(fed))
    with fake_gpu(monkeypatch) as gpu:
        graph = TorchGraph(ir.from_proto(model))
        found = graph.run(graph.feed(fed))
        assert gpu.fetched == 0
    for name, value in expected.items():
        assert found[name].device == (CPU if case.op in ("Shape", "Size") else GPU)
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)


def _absent(case: Case) -> set[int]:
    given = {i for i, x in enumerate(case.inputs) if x is not None}
    return set(range(9)) - given


def denoisers() -> list[Callable[[], GraphBuilder]]:
    return [denoiser_graph, awkward_graph, kinds]


@pytest.mark.parametrize("build", denoisers(), ids=lambda build: build.__name__)
def test_a_pass_and_its_gradients_wait_for_nothing(
    build: Callable[[], GraphBuilder], monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = build().model()
    shapes = {
        v.name: [d.dim_value or 2 for d in v.type.tensor_type.shape.dim] for v in proto.graph.input
    }
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with fake_gpu(monkeypatch) as gpu:
        graph = TorchGraph(ir.from_proto(proto))
        feeds = graph.feed(arrays)
        first = next(name for name in graph.values if name not in graph.read_on_host)
        values = graph.run(feeds, keep=graph.values, differentiate=[first])
        (gradient,) = torch.autograd.grad(values[graph.outputs[0]].sum(), [values[first]])
        assert gpu.fetched == 0
        assert gradient.device == GPU and values[graph.outputs[0]].device == GPU
        copies = dict(graph._copies)
        graph.run(feeds)
    assert {name: id(one) for name, one in copies.items()} == {
        name: id(one) for name, one in graph._copies.items()
    }
    assert all(one.device == CPU for one in graph.constants.values())


@pytest.mark.parametrize("open_sizes", [False, True])
@pytest.mark.parametrize("network", ["unet", "transformer", "conv3d"])
def test_exported_networks_wait_for_nothing(
    network: str, open_sizes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With open sizes as optimum leaves them: all of the arithmetic of sizes is in the graph."""
    path = tmp_path / "model.onnx"
    Form(network, "script", 17, "fp32", open_sizes).export(path)
    shape = NETWORKS[network].shape
    described = describe(path, sample={"name": "sample", "shape": list(shape)})
    export_denoiser(open_denoiser(described), tmp_path)
    arrays = {"sample": np.ones((2, *shape), np.float32), "timestep": np.ones(2, np.int64)}
    with fake_gpu(monkeypatch) as gpu:
        graph = TorchGraph(layer_graph(load_model(tmp_path / "model.onnx")).model)
        feeds = graph.feed(arrays)
        feeds["sample"].requires_grad_()
        output = graph.run(feeds)["out_sample"]
        torch.autograd.grad(output.sum(), [feeds["sample"]])
        assert gpu.fetched == 0 and output.shape == (2, *shape)


def test_sizes_in_the_making_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape -> Gather -> Mul -> Reshape on the CPU; the same size as a factor of data goes to the GPU."""
    g = GraphBuilder()
    g.input("x", ["N", 4, 6])
    shape = g.op("Shape", ["x"], "shape")
    rows = g.op("Gather", [shape, g.weight("zero", np.array([0], np.int64))], "rows")
    more = g.op("Mul", [rows, g.weight("two", np.array([2], np.int64))], "more")
    size = g.op("Concat", [more, g.weight("rest", np.array([-1], np.int64))], "size", axis=0)
    wide = g.op("Reshape", ["x", size], "wide")
    factor = g.op("Cast", [more], "factor", to=1)
    steps = g.op(
        "Range",
        [*(g.weight(n, np.array(v, np.float32)) for n, v in (("a", 0), ("b", 12), ("c", 1)))],
        "steps",
    )
    g.op("Add", [g.op("Mul", [wide, factor], "scaled"), steps], "y")
    g.output("y_out", ["M", 12])
    with fake_gpu(monkeypatch) as gpu:
        graph = TorchGraph(ir.from_proto(g.model()))
        values = graph.run(graph.feed({"x": np.ones((3, 4, 6), np.float32)}), keep=graph.values)
        assert gpu.fetched == 0
    at = {name.removesuffix("_out"): value.device for name, value in values.items()}
    assert {name for name, device in at.items() if device == CPU} == {
        "shape",
        "rows",
        "more",
        "size",
    }
    assert tuple(values["y_out"].shape) == (6, 12)


def test_a_size_from_data_keeps_the_graph_on_the_gpu() -> None:
    class Node:
        def __init__(self, op: str, inputs: str, outputs: str) -> None:
            self.op, self.inputs, self.outputs = op, tuple(inputs.split()), tuple(outputs.split())

    nodes = [Node("Conv", "x w", "a"), Node("Cast", "a", "k"), Node("TopK", "a k", "top at")]
    assert host_nodes(nodes, ["x"]) == (set(), {"k"})
