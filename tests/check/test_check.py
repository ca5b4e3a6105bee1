"""The command: what it prints, its exit codes, the models that our own writer makes, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from mpq_deploy.check.check import check_model
from mpq_deploy.check.graph_view import open_view, read_known
from mpq_deploy.cli import app
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import ModelError
from tests.check.draft import Draft
from tests.check.forms import BAD, Form, conv8, mm, model_of
from tests.graphs import awkward_graph, denoiser_graph

RUNNER = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def saved(form: Form, folder: Path) -> str:
    onnx.save(model_of(form), folder / "m.onnx")
    return str(folder / "m.onnx")


def form_of(rule: str) -> Form:
    return next(form for form in BAD if form.rule == rule)


@pytest.mark.parametrize(
    ("rule", "options", "code"),
    [
        ("w4a8-product", [], 1),
        ("scale-finite", [], 1),
        ("conv-unpacked", [], 0),
        ("conv-unpacked", ["--strict"], 1),
        ("activation-scale-shape", [], 0),
        ("activation-scale-shape", ["--strict"], 1),
        ("node-names", ["--strict"], 0),
    ],
)
def test_exit_codes(rule: str, options: list[str], code: int, tmp_path: Path) -> None:
    result = RUNNER.invoke(
        app, ["check", saved(form_of(rule), tmp_path), "--target", "rtx", *options]
    )
    assert result.exit_code == code
    assert rule in result.stdout


def test_json_holds_every_finding_and_whether_it_passes(tmp_path: Path) -> None:
    model = saved(form_of("w4a8-product"), tmp_path)
    shown = json.loads(RUNNER.invoke(app, ["check", model, "--json"]).stdout)
    assert shown["passes"] is False
    assert shown["counts"]["refused"] == len(shown["findings"]) == 1
    assert set(shown["findings"][0]) == {"rule", "effect", "proof", "node", "op", "message", "fix"}
    assert shown["findings"][0]["node"].startswith("n.matmul")


@pytest.mark.parametrize(
    "name", ["rtx", "jetson-agx-orin", "jetson-thor", "tensorrt-11", "onnxruntime-cpu"]
)
def test_plain_denoisers_are_refused_nowhere(name: str, tmp_path: Path) -> None:
    for graph in (denoiser_graph(), awkward_graph()):
        result = check_model(graph.save(tmp_path / "m.onnx"), load_target(name))
        assert result.passes(strict=False), result.text()
        assert {finding.rule for finding in result.findings} <= {
            "float32",
            "dynamic-inputs",
            "shared-input",
        }


def test_a_weight_is_traced_through_what_hands_it_on(tmp_path: Path) -> None:
    d = Draft(16, 128)
    y = mm(d, d.op("Transpose", d.int4(128, 128, axis=1), perm=[1, 0]))
    path = d.save(y, tmp_path / "m.onnx")
    (layer,) = open_view(read_known(path), path).layers
    assert (layer.weight.dtype, layer.side, layer.pair) == ("INT4", 1, None)
    assert [node.op for node in layer.weight.path] == ["DequantizeLinear", "Transpose"]


def test_constant_nodes_and_functions_are_seen_through(tmp_path: Path) -> None:
    """A weight in a Constant node inside a local function is the same weight."""
    d = Draft(64, 16, 16)
    y = conv8(d, d.act(d.relu(), d.scale(0.05, (1,))))
    model = d.model(y)
    constants = [
        helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer
    ]
    nodes = [*constants, *model.graph.node]
    opsets = list(model.opset_import)
    function = helper.make_function("mine", "block", ["x"], [y], nodes, opsets)
    call = helper.make_node("block", ["x"], [y], domain="mine", name="call")
    graph = helper.make_graph([call], "g", model.graph.input, model.graph.output)
    whole = helper.make_model(
        graph,
        functions=[function],
        opset_imports=[*opsets, helper.make_opsetid("mine", 1)],
        ir_version=10,
    )
    onnx.save(whole, tmp_path / "m.onnx")
    found = {
        finding.rule for finding in check_model(tmp_path / "m.onnx", load_target("rtx")).findings
    }
    assert found == {"activation-scale-shape", "node-names", "dynamic-inputs"}


def test_operators_inside_branches_are_checked(tmp_path: Path) -> None:
    d = Draft(4)
    inner = helper.make_graph(
        [helper.make_node("BitShift", ["c", "c"], ["o"], name="inside", direction="LEFT")],
        "then",
        [],
        [helper.make_tensor_value_info("o", TensorProto.UINT8, [4])],
        [helper.make_tensor("c", TensorProto.UINT8, [4], bytes(4), raw=True)],
    )
    flag = d.const(np.asarray(True))
    d.op("If", flag, then_branch=inner, else_branch=inner)
    result = check_model(d.save(d.relu(), tmp_path / "m.onnx"), load_target("rtx"))
    assert {f.node for f in result.findings if f.rule == "operator-unsupported"} == {"inside"}


def broken(kind: str, folder: Path) -> Path:
    path = folder / "m.onnx"
    model = model_of(form_of("conv-unpacked"))
    if kind == "cut short":
        path.write_bytes(model.SerializeToString()[:-2000])
    elif kind == "no onnx":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "data missing":
        onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
        (folder / "m.data").unlink()
    elif kind == "data short":
        onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
        (folder / "m.data").write_bytes((folder / "m.data").read_bytes()[:100])
    elif kind == "new opset":
        model.opset_import[0].version = 999
        onnx.save(model, path)
    elif kind == "text":
        path.write_text("hello", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut short", "cannot be read as ONNX"),
        ("no onnx", "m.onnx"),
        ("empty", "holds no ONNX graph"),
        ("data missing", "no file 'm.data'"),
        ("data short", "ends at"),
        ("new opset", "opset 999"),
        ("absent", "There is no file"),
        ("text", "m.onnx"),
    ],
)
def test_a_broken_file_is_one_clear_message(kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        check_model(broken(kind, tmp_path), load_target("rtx"))
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_weights_are_not_read(tmp_path: Path) -> None:
    """External data of the right length is enough: only scales and zero points are read."""
    path = tmp_path / "m.onnx"
    onnx.save(
        model_of(form_of("conv-unpacked")),
        path,
        save_as_external_data=True,
        location="m.data",
        size_threshold=9999,
    )
    size = (tmp_path / "m.data").stat().st_size
    (tmp_path / "m.data").write_bytes(bytes(size))
    assert "conv-unpacked" in {
        finding.rule for finding in check_model(path, load_target("rtx")).findings
    }


def test_a_weight_made_twice_of_the_same_constant_is_still_a_weight(tmp_path: Path) -> None:
    d = Draft(16, 128)
    w = d.int4(128, 128)
    twice = d.op("Add", w, d.op("Mul", w, d.scale(0.5)))
    found = {
        finding.rule
        for finding in check_model(
            d.save(mm(d, twice), tmp_path / "m.onnx"), load_target("rtx")
        ).findings
    }
    assert "weight-sum" in found


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, {"zero-point"}),
        ({"ActivationSymmetric": True, "WeightSymmetric": True}, {"int32-codes", "scalar-codes"}),
        (
            {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
            {"scalar-codes"},
        ),
    ],
)
def test_models_that_onnxruntime_quantized_are_refused_as_tensorrt_refuses_them(
    options: dict[str, bool], rules: set[str], tmp_path: Path
) -> None:
    """What users of its quantizer hand to TensorRT; the builder of TensorRT-RTX was seen to fail on each."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = 2

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[type-arg]
            self.left -= 1
            rng = np.random.default_rng(self.left + 1)
            shapes = {"sample": (1, 3, 8, 8), "timestep": (1,)}
            return (
                {n: rng.random(s, np.float32) for n, s in shapes.items()}
                if self.left >= 0
                else None
            )

    denoiser_graph().save(tmp_path / "m.onnx")
    quantize_static(
        tmp_path / "m.onnx",
        tmp_path / "q.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        extra_options=options,
    )
    result = check_model(tmp_path / "q.onnx", load_target("rtx"))
    refused = {finding.rule for finding in result.findings if finding.effect == "refused"}
    assert refused >= rules if not options else refused == rules
