"""What a stranger's ONNX file may hold, looked at before anything is expanded."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from mpq_deploy.check.check import check_model
from mpq_deploy.cli import app
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import ModelError
from mpq_deploy.graph.load import load_model
from tests.tiny_models import tiny_onnx_denoiser

RTX = load_target("rtx")


def small(
    *nodes: onnx.NodeProto, functions: tuple[onnx.FunctionProto, ...] = ()
) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y"))
    graph = helper.make_graph(list(nodes), "g", [x], [y])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def function(name: str, *called: str) -> onnx.FunctionProto:
    nodes, value = [], "a"
    for number, op in enumerate(called):
        made = f"v{number}" if number < len(called) - 1 else "b"
        nodes.append(helper.make_node(op, [value], [made], domain="own" if op[0] == "f" else ""))
        value = made
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["a"], ["b"], nodes, opsets)


def named(made: onnx.FunctionProto, name: str) -> onnx.FunctionProto:
    made.node[0].name = name
    return made


def holding(made: onnx.FunctionProto, dims: list[int]) -> onnx.FunctionProto:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=dims)
    made.node[0].attribute.append(helper.make_attribute("t", tensor))
    return made


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(model: onnx.ModelProto, folder: Path, words: str) -> None:
    """Both ways that open a file refuse it, at once and in one line."""
    path = saved(model, folder)
    started = time.monotonic()
    for opened in (load_model, lambda one: check_model(one, RTX)):
        with pytest.raises(ModelError, match=words) as caught:
            opened(path)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert time.monotonic() - started < 5


def test_functions_that_double_are_counted_before_they_are_expanded(tmp_path: Path) -> None:
    doubling = [function(f"f{n}", f"f{n + 1}", f"f{n + 1}") for n in range(26)]
    model = small(
        helper.make_node("f0", ["x"], ["y"], domain="own"),
        functions=(*doubling, function("f26", "Relu")),
    )
    assert len(model.SerializeToString()) < 4000
    refused(model, tmp_path, "more than 1,000,000 nodes")


def test_functions_that_call_themselves_are_refused(tmp_path: Path) -> None:
    model = small(
        helper.make_node("f0", ["x"], ["y"], domain="own"),
        functions=(function("f0", "f1"), function("f1", "f0")),
    )
    refused(model, tmp_path, "calls itself")


def test_usual_functions_are_expanded(tmp_path: Path) -> None:
    model = small(
        helper.make_node("f0", ["x"], ["y"], domain="own"),
        functions=(function("f0", "f1", "f1"), function("f1", "Relu", "Relu")),
    )
    result = check_model(saved(model, tmp_path), RTX)
    assert result.passes(strict=False)
    assert len(load_model(tmp_path / "m.onnx").functions) == 2


def test_nested_subgraphs_are_bounded(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])],
    )
    for _ in range(20):
        node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
        outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])]
        inner = helper.make_graph([node], "inner", [], outputs)
        if len(inner.SerializeToString()) > 1 << 20:
            break
        node.attribute.pop()
        inner = helper.make_graph([node], "inner", [], outputs)
    model = small(helper.make_node("Relu", ["x"], ["y"]))
    model.graph.node.extend(inner.node)
    refused(model, tmp_path, "nests subgraphs|cannot be read")


MUTATIONS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "negative": (lambda m: m.graph.initializer[0].dims.append(-1), "Dimensions cannot be negative"),
    "escape": (lambda m: setattr(m.graph.node[0], "name", "a\x1b[2J"), "control character"),
    "line": (lambda m: setattr(m.graph.input[0], "name", "a\nb"), "control character"),
    "direction": (lambda m: setattr(m.graph.node[0], "op_type", "a\u202eb"), "control character"),
    "no such type": (
        lambda m: setattr(m.graph.initializer[0], "data_type", 2**31 - 1),
        "type 2147483647, which the installed onnx does not know",
    ),
    "no such attribute type": (
        lambda m: m.graph.node[0].attribute.append(
            helper.make_attribute("t", TensorProto(data_type=99, dims=[1]))
        ),
        "has the type 99",
    ),
    "no version": (
        lambda m: setattr(m.opset_import[0], "version", -(2**63)),
        "declares version -9",
    ),
    "version zero": (lambda m: setattr(m.opset_import[0], "version", 0), "declares version 0"),
    "escape in a function": (
        lambda m: m.functions.append(function("f\x1b[2J", "Relu")),
        "control character",
    ),
    "escape in a function's node": (
        lambda m: m.functions.append(named(function("f", "Relu"), "a\x1b[2J")),
        "control character",
    ),
    "negative size in a function": (
        lambda m: m.functions.append(holding(function("f", "Relu"), [-1])),
        "Dimensions cannot be negative",
    ),
}


@pytest.mark.parametrize(("mutate", "words"), MUTATIONS.values(), ids=MUTATIONS)
def test_what_no_exporter_writes_is_refused(
    mutate: Callable[[onnx.ModelProto], object], words: str, tmp_path: Path
) -> None:
    model = tiny_onnx_denoiser()
    mutate(model)
    refused(model, tmp_path, words)


UNSOUND: dict[str, Callable[[onnx.ModelProto], object]] = {
    "unknown input": lambda m: m.graph.node[1].input.__setitem__(0, "nothing"),
    "cycle": lambda m: m.graph.node.insert(0, m.graph.node.pop()),
    "output that nothing makes": lambda m: setattr(m.graph.output[0], "name", "nothing"),
    "weight twice": lambda m: m.graph.initializer.append(m.graph.initializer[0]),
    "data too short": lambda m: setattr(m.graph.initializer[0], "raw_data", b"abc"),
    "unknown operator": lambda m: setattr(m.graph.node[0], "op_type", "Nope"),
    "no such type": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99),
    "metadata twice": lambda m: m.metadata_props.extend(
        onnx.StringStringEntryProto(key="a", value=str(n)) for n in range(2)
    ),
    "no graph name": lambda m: m.graph.ClearField("name"),
    "input unlike its weight": lambda m: m.graph.input.append(
        helper.make_tensor_value_info(m.graph.initializer[0].name, TensorProto.FLOAT, [7, 7])
    ),
    "input of another type than its weight": lambda m: m.graph.input.append(
        helper.make_tensor_value_info(m.graph.initializer[0].name, TensorProto.INT32, None)
    ),
}


@pytest.mark.parametrize("mutate", UNSOUND.values(), ids=UNSOUND)
def test_what_onnx_checker_refuses_check_refuses(
    mutate: Callable[[onnx.ModelProto], object], tmp_path: Path
) -> None:
    model = tiny_onnx_denoiser()
    assert check_model(saved(model, tmp_path), RTX).passes(strict=False)
    mutate(model)
    path = saved(model, tmp_path)
    with pytest.raises(Exception, match=r".+"):
        onnx.checker.check_model(str(path), full_check=True)
    result = check_model(path, RTX)
    assert "onnx-invalid" in {finding.rule for finding in result.findings}
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 1 and "onnx-invalid" in done.stdout


@pytest.mark.parametrize(
    ("offset", "length"), [("x", "4"), ("-1", "4"), ("0", "9" * 30), ("0", "3"), ("1e3", "4")]
)
def test_places_in_data_files_are_numbers_that_fit(
    offset: str, length: str, tmp_path: Path
) -> None:
    model = tiny_onnx_denoiser()
    tensor = model.graph.initializer[0]
    (tmp_path / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    refused(model, tmp_path, "weight|offset")


@pytest.mark.parametrize("op", ["Relu", "Gelu"])
def test_what_lacks_shapes_is_not_refused_for_that(op: str, tmp_path: Path) -> None:
    """Runtimes and parsers take inputs and outputs of unknown rank; a wrong type is still found."""
    model = small(helper.make_node(op, ["x"], ["y"]))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    found = check_model(saved(model, tmp_path), RTX).findings
    assert "onnx-invalid" not in [one.rule for one in found]
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    found = check_model(saved(model, tmp_path), RTX).findings
    assert "onnx-invalid" in [one.rule for one in found]
