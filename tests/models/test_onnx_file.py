"""An ONNX file with a YAML: read without torch, exported, and what is said when the two do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.api import record
from mpq_deploy.errors import ModelError, MpqError, UsageError
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.additions import Additions
from mpq_deploy.models.export import export_denoiser, load_exported
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.runtime.ort import OrtDenoiser
from tests.graphs import GraphBuilder
from tests.pipeline.runs import describe
from tests.tiny_models import tiny_onnx_denoiser, tiny_onnx_with_yaml, tiny_scheduler


@pytest.mark.parametrize("opset", [13, 17, 20, 21])
def test_a_file_of_any_opset_gives_the_same_outputs(tmp_path: Path, opset: int) -> None:
    denoiser = open_denoiser(tiny_onnx_with_yaml(tmp_path, opset))
    report = export_denoiser(denoiser, tmp_path / "export")
    assert report.opset == 21 and report.max_relative_error < 1e-5
    exported = load_exported(tmp_path / "export")
    assert exported.spec.labels == ("a", "b", "c", "d") and exported.conditions.rows == 4
    graph = layer_graph(load_model(exported.model))
    assert [layer.name for layer in graph.layers] == ["time", "down", "last"]
    assert ("up.weight", "ConvTranspose") in [(other.name, other.op) for other in graph.others]


def test_torch_is_not_needed(tmp_path: Path) -> None:
    path = tiny_onnx_with_yaml(tmp_path)
    code = f"""
import sys
from pathlib import Path
from mpq_deploy.models.export import export_denoiser
from mpq_deploy.models.open import open_denoiser
export_denoiser(open_denoiser({str(path)!r}), Path({str(tmp_path / "export")!r}))
assert not {{"torch", "diffusers", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_export_equals_the_file(tmp_path: Path) -> None:
    path = tiny_onnx_with_yaml(tmp_path)
    denoiser = open_denoiser(path)
    export_denoiser(denoiser, tmp_path / "export")
    exported = load_exported(tmp_path / "export")
    x = np.random.default_rng(0).standard_normal((4, 3, 9, 9), np.float32)
    runs = [
        OrtDenoiser(p, exported.spec)(x, 77.0, {"y": np.arange(4)}) for p in (path, exported.model)
    ]
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-6)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision_files_are_widened(tmp_path: Path, kind: int) -> None:
    """ONNX Runtime runs FP16 itself; of bfloat16 only the widened graph can be compared with."""
    model = tiny_onnx_denoiser()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    path = tiny_onnx_with_yaml(tmp_path)
    onnx.save(model, path)
    denoiser = open_denoiser(path)
    report = export_denoiser(denoiser, tmp_path / "export")
    assert report.max_relative_error < 1e-2
    assert (report.max_relative_error == 0) == (kind == TensorProto.BFLOAT16)
    noted = f"{path.name} is in bfloat16; it was compared with its graph in FP32."
    assert (noted in report.notes) == (kind == TensorProto.BFLOAT16)
    exported = load_model(tmp_path / "export" / "model.onnx")
    values = [
        *exported.graph.inputs,
        *exported.graph.outputs,
        *exported.graph.initializers.values(),
    ]
    values += [value for node in exported.graph for value in node.outputs]
    assert not {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} & {value.dtype for value in values}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"samples": "x"}, "Did you mean 'sample'"),
        ({"sample": "z"}, "'z'"),
        ({"conditions": None}, "input 'y'"),
        ({"scheduler": None}, "--scheduler"),
        ({"scheduler": "none.json"}, r"none\.json"),
        ({"labels": None}, r"y: int64 \[rows\]"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"output": "o"}, "outputs are out"),
        ({"sample": {"name": "x", "shape": [3, 8, 8]}}, r"\[3, 9, 9\]"),
        ({"guidance": {"scale": 2.0}}, "uncond_row"),
        ({"pixel_range": [0]}, "pixel_range"),
    ],
)
def test_a_yaml_that_does_not_fit_is_named(
    tmp_path: Path, entries: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        open_denoiser(tiny_onnx_with_yaml(tmp_path, **entries))


def test_the_yaml_itself(tmp_path: Path) -> None:
    path = tiny_onnx_with_yaml(tmp_path)
    description = path.with_suffix(".yaml")
    for content, said in (("a: [", "YAML"), ("just text", "no entries"), ("", "no entries")):
        description.write_text(content, encoding="utf-8")
        with pytest.raises(UsageError, match=said):
            open_denoiser(path)
    description.unlink()
    with pytest.raises(UsageError, match="needs a YAML"):
        open_denoiser(path)


def test_a_yaml_elsewhere_a_scheduler_file_and_guidance(tmp_path: Path) -> None:
    guidance = {"scale": 2.0, "uncond_row": 3}
    path = tiny_onnx_with_yaml(
        tmp_path,
        scheduler="s.json",
        labels=["a", "b", "c"],
        guidance=guidance,
        prediction_type="v_prediction",
    )
    (tmp_path / "s.json").write_text(json.dumps(tiny_scheduler()), encoding="utf-8")
    description = path.with_suffix(".yaml").rename(tmp_path / "other.yaml")
    spec = open_denoiser(path, Additions(description=description)).spec
    assert spec.uncond_row == 3 and spec.labels == ("a", "b", "c", "class 3")
    assert spec.prediction_type == "v_prediction" == spec.scheduler["prediction_type"]


def test_conditions_from_a_file(tmp_path: Path) -> None:
    path = tiny_onnx_with_yaml(tmp_path, labels=None)
    np.savez(tmp_path / "c.npz", y=np.array([3, 1]))
    denoiser = open_denoiser(path, Additions(conditions=tmp_path / "c.npz"))
    np.testing.assert_array_equal(denoiser.conditions.arrays["y"], [3, 1])
    np.savez(tmp_path / "d.npz", y=np.array([0.5]))
    with pytest.raises(UsageError, match="float64"):
        open_denoiser(path, Additions(conditions=tmp_path / "d.npz"))


def _of_batch(path: Path, size: int) -> Path:
    """Fix the first axis of every input and output that has a free one."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim[:1]:
            if dim.dim_param:
                dim.dim_value = size
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


def _tokens_denoiser(size: int) -> GraphBuilder:
    """What exporters write for a fixed batch: it is a number in shapes, and tokens [T, N] become one axis."""
    g = GraphBuilder()
    g.input("sample", [size, 3, 4, 4])
    g.input("timestep", [size])
    column = g.op("Unsqueeze", ["timestep", g.weight("one", [1])], "column")
    time = g.gemm(
        g.op("Mul", [column, g.weight("slow", np.asarray([1e-3], np.float32))], "late"),
        "time",
        8,
        1,
    )
    x = g.conv("sample", "in", 8, 3, strides=[2, 2])
    flat = g.op("Reshape", [x, g.weight("flat", [size, 8, 4])], "flat")
    tokens = g.op("Transpose", [flat], "tokens", perm=[0, 2, 1])
    extra = g.rng.standard_normal((1, 1, 8)).astype(np.float32)
    first = g.weight("class", np.repeat(extra, size, axis=0))
    joined = g.op("Concat", [first, tokens], "joined", axis=1)
    late = g.op("Add", [joined, g.op("Unsqueeze", [time, g.weight("one", [1])], "row")], "shifted")
    mid = g.op("Transpose", [late], "tokens_first", perm=[1, 0, 2])
    rows = g.op("Reshape", [mid, g.weight("rows", [5 * size, 8])], "rows")
    heads = g.op(
        "Reshape", [g.matmul(rows, "to_q", 8, 8), g.weight("h", [5, 2 * size, 4])], "heads"
    )
    queries = g.op("Transpose", [heads], "queries", perm=[1, 0, 2])
    keys = g.op("Transpose", [heads], "keys", perm=[1, 2, 0])
    scores = g.op("Softmax", [g.op("MatMul", [queries, keys], "scores")], "softmax", axis=-1)
    mixed = g.op("Transpose", [g.op("MatMul", [scores, queries], "mix")], "back", perm=[1, 0, 2])
    out = g.op("Reshape", [mixed, g.weight("out_shape", [5, size, 8])], "out")
    whole = g.op("Transpose", [out], "whole", perm=[1, 2, 0])
    ends = [g.weight("begin", [1]), g.weight("end", [5]), g.weight("along", [2])]
    image = g.op("Slice", [whole, *ends], "image")
    square = g.op("Reshape", [image, g.weight("square", [size, 8, 2, 2])], "square")
    sizes = g.weight("sizes", [size, 8, 4, 4])
    g.conv(g.op("Resize", [square, "", "", sizes], "resized", mode="nearest"), "last", 3, 8)
    g.nodes[-1].output[0] = g.output("result", [size, 3, 4, 4])
    return g


@pytest.mark.parametrize("size", [1, 2])
def test_a_fixed_batch_becomes_any(size: int, tmp_path: Path) -> None:
    """The file itself is run with one sample at a time, and the export with one and two."""
    guided = {"scale": 3.0, "uncond_row": 3}
    tiny = _of_batch(tiny_onnx_with_yaml(tmp_path, guidance=guided), size)
    tokens = _tokens_denoiser(size).save(tmp_path / "tokens.onnx")
    # Only its sample's batch is fixed.
    part = tiny_onnx_with_yaml(tmp_path / "part")
    model = onnx.load(part)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    del model.graph.value_info[:]
    onnx.save(model, part)
    for number, path in enumerate((tiny, describe(tokens), part)):
        denoiser = open_denoiser(path)
        assert any("at once alone" in note for note in denoiser.notes)
        report = export_denoiser(denoiser, tmp_path / str(number))
        assert report.max_relative_error < 1e-5
        graph = onnx.load(tmp_path / str(number) / "model.onnx").graph
        assert {v.type.tensor_type.shape.dim[0].dim_param for v in graph.input} == {"batch"}


def test_recorded_calls_of_a_file_of_a_fixed_batch(tmp_path: Path) -> None:
    path = _tokens_denoiser(1).save(tmp_path / "tokens.onnx")
    session, rng = ort.InferenceSession(path), np.random.default_rng(0)
    with record(session, tmp_path / "calls"):
        for _ in range(2):
            for t in (800, 300):
                x = rng.standard_normal((1, 3, 4, 4), np.float32)
                session.run(None, {"sample": x, "timestep": np.asarray([t], np.float32)})
    denoiser = open_denoiser(path, Additions(calls=tmp_path / "calls"))
    assert all(item.batched for item in denoiser.spec.inputs)
    assert export_denoiser(denoiser, tmp_path / "out").max_relative_error < 1e-5


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("ReduceMean", ("axes",), {"keepdims": 1}),
        ("Squeeze", ("axes",), {}),
        ("Gather", ("axes",), {"axis": 0}),
        ("Concat", ("sample",), {"axis": 0}),
    ],
)
def test_a_fixed_batch_that_its_graph_needs_is_refused(
    op: str, inputs: tuple[str, ...], attributes: dict[str, int], tmp_path: Path
) -> None:
    g = GraphBuilder()
    g.input("sample", [1, 3, 4, 4])
    g.input("timestep", [1])
    g.weight("axes", [0])
    mixed = g.op(op, ["sample", *inputs], "mixes", **attributes)
    g.op("Add", [g.op("Mul", [mixed, "timestep"], "late"), g.conv("sample", "c", 3, 3)], "sum")
    g.nodes[-1].output[0] = g.output("result", ["n", 3, 4, 4])
    path = describe(g.save(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match=rf"fixes its batch, and 'mixes' \({op}\)") as refused:
        export_denoiser(open_denoiser(path), tmp_path / "out")
    assert "dynamic first axis" in refused.value.hint


def test_an_input_without_a_batch_is_refused(tmp_path: Path) -> None:
    path = tiny_onnx_with_yaml(tmp_path, sample={"name": "x", "shape": [1, 3, 9, 9]})
    with pytest.raises(ModelError, match="batch axis"):
        open_denoiser(_of_batch(path, 1))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = tiny_onnx_with_yaml(tmp_path)
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == "down.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 0, :2] = np.inf
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"'down\.weight' holds 2 values"):
        export_denoiser(open_denoiser(path), tmp_path / "export")


def test_a_weight_that_fp16_does_not_hold_is_named(tmp_path: Path) -> None:
    """Its codes would be dequantized to infinity in the engine, while every figure here stays finite."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "down.weight")
        values = numpy_helper.to_array(tensor).copy()
        values[0, 0, 0, 0] = -1e6
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    with pytest.raises(ModelError, match=r"'down\.weight' holds 1e\+06, which is beyond FP16"):
        export_denoiser(open_denoiser(edited(tmp_path, change)), tmp_path / "export")


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin", "link.bin", ""]
)
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    path = tiny_onnx_with_yaml(folder)
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == "down.weight")
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        open_denoiser(path)


def test_external_data_that_is_missing_or_cut_is_named(tmp_path: Path) -> None:
    path = tiny_onnx_with_yaml(tmp_path)
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=64
    )
    export_denoiser(open_denoiser(path), tmp_path / "export")
    content = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="truncated"):
        open_denoiser(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"w\.bin"):
        open_denoiser(path)


def test_a_linked_model_with_linked_data_opens(tmp_path: Path) -> None:
    real = tiny_onnx_with_yaml(tmp_path / "real")
    onnx.save(
        onnx.load(real), real, save_as_external_data=True, location="w.bin", size_threshold=64
    )
    (tmp_path / "links").mkdir()
    for file in real.parent.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    export_denoiser(open_denoiser(tmp_path / "links" / "tiny.onnx"), tmp_path / "export")


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.97])
def test_a_truncated_or_foreign_file_is_named(tmp_path: Path, kept: float) -> None:
    path = tiny_onnx_with_yaml(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ModelError, match=r"tiny\.onnx"):
        open_denoiser(path)


def test_an_input_of_an_unknown_type_is_named(tmp_path: Path) -> None:
    path = tiny_onnx_with_yaml(tmp_path)
    model = onnx.load(path)
    model.graph.input[1].CopyFrom(helper.make_tensor_value_info("t", TensorProto.UINT8, ["batch"]))
    onnx.save(model, path)
    with pytest.raises(MpqError, match="UINT8"):
        open_denoiser(path)


def edited(tmp_path: Path, change: Any, **entries: Any) -> Path:
    """The tiny model after ``change(model)``."""
    path = tiny_onnx_with_yaml(tmp_path, **entries)
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64])
def test_a_timestep_in_a_column_of_any_type(tmp_path: Path, kind: int) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[1].CopyFrom(helper.make_tensor_value_info("t", kind, ["batch", 1]))
        column = next(node for node in model.graph.node if node.name == "column")
        column.CopyFrom(
            helper.make_node(
                "Cast", ["t"], list(column.output), name="column", to=TensorProto.FLOAT
            )
        )

    path = edited(tmp_path, change)
    denoiser = open_denoiser(path)
    assert denoiser.spec.timestep is not None and denoiser.spec.timestep.shape == (1,)
    assert export_denoiser(denoiser, tmp_path / "export").max_relative_error < 1e-5
    exported = load_exported(tmp_path / "export")
    x = np.random.default_rng(0).standard_normal((3, 3, 9, 9), np.float32)
    plain = OrtDenoiser(
        tiny_onnx_with_yaml(tmp_path / "plain"),
        open_denoiser(tmp_path / "plain" / "tiny.onnx").spec,
    )
    found = OrtDenoiser(exported.model, exported.spec)(
        x, np.array([3.0, 70.0, 900.0]), {"y": np.arange(3)}
    )
    np.testing.assert_allclose(
        found, plain(x, np.array([3.0, 70.0, 900.0]), {"y": np.arange(3)}), atol=1e-6
    )


def test_a_timestep_that_is_no_number_is_refused(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[1].CopyFrom(
            helper.make_tensor_value_info("t", TensorProto.FLOAT, ["batch", 16])
        )

    with pytest.raises(UsageError, match=r"'t' .* shape \[16\]"):
        open_denoiser(edited(tmp_path, change))


def in_double(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float64), tensor.name))
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE


def in_ir_version_3(model: onnx.ModelProto) -> None:
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )


def of_one_name(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = "node"


def by_the_longer_domain(model: onnx.ModelProto) -> None:
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"


def of_one_layer_name(model: onnx.ModelProto) -> None:
    """The layer ``down`` by its weight's name, and one whose short weight leaves it its node's."""
    for tensor in model.graph.initializer:
        tensor.name = "w" if tensor.name == "last.weight" else tensor.name
    for node in model.graph.node:
        if node.name == "last":
            node.name, node.input[1] = "down", "w"
        elif node.name == "down":
            node.name = "first"


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        (in_double, "layers in double precision"),
        (of_one_name, "several nodes of one name"),
        (in_ir_version_3, "converted to opset 21"),
        (by_the_longer_domain, "has opset 17"),
        (of_one_layer_name, "has opset 17"),
    ],
)
def test_unusual_files_are_the_same_model(tmp_path: Path, change: Any, noted: str) -> None:
    old = 13 if change is in_ir_version_3 else 17
    path = tiny_onnx_with_yaml(tmp_path, old)
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    report = export_denoiser(open_denoiser(path), tmp_path / "export")
    assert report.max_relative_error < 1e-5
    assert any(noted in note for note in report.notes)
    exported = load_exported(tmp_path / "export")
    names = [layer.name for layer in layer_graph(load_model(exported.model)).layers]
    assert len(names) == len(set(names)) == 3
    plain = tiny_onnx_with_yaml(tmp_path / "plain", old)
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 9), np.float32)
    runs = [
        OrtDenoiser(p, exported.spec)(x, 77.0, {"y": np.arange(2)}) for p in (plain, exported.model)
    ]
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-5)


def test_an_operator_of_a_later_opset_as_onnx_runtime_writes_it(tmp_path: Path) -> None:
    """Its optimizers put LayerNormalization (opset 17) into files of older ones, and declare no types."""
    path = tiny_onnx_with_yaml(tmp_path, 14)
    model = onnx.load(path)
    place = next(i for i, node in enumerate(model.graph.node) if node.name == "act")
    old = model.graph.node[place].output[0]
    model.graph.node[place].output[0] = "before_norm"
    gain = numpy_helper.from_array(np.full(5, 1.5, np.float32), "norm.weight")
    norm = helper.make_node("LayerNormalization", ["before_norm", "norm.weight"], [old], "norm")
    model.graph.node.insert(place + 1, norm)
    model.graph.initializer.append(gain)
    del model.graph.value_info[:]
    onnx.save(model, path)
    assert export_denoiser(open_denoiser(path), tmp_path / "export").max_relative_error < 1e-5
    exported = load_model(tmp_path / "export" / "model.onnx")
    assert ("", "LayerNormalization") in [(node.domain, node.op_type) for node in exported.graph]


def test_an_input_without_a_shape_has_that_of_the_yaml(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.ClearField("shape")

    given = {
        "sample": {"name": "x", "shape": [3, 9, 9]},
        "conditions": [{"name": "y", "shape": []}],
    }
    with pytest.raises(UsageError, match="no shape for 't'"):
        open_denoiser(edited(tmp_path, change, **given))
    path = edited(tmp_path / "given", change, **given, timestep={"name": "t", "shape": []})
    assert export_denoiser(open_denoiser(path), tmp_path / "export").max_relative_error < 1e-5
    # TensorRT cannot read a convolution of an input without a rank.
    x = load_model(tmp_path / "export" / "model.onnx").graph.inputs[0]
    assert x.shape is not None and tuple(x.shape)[1:] == (3, 9, 9)


def test_one_of_several_outputs_is_to_be_named(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.output.append(
            helper.make_tensor_value_info("down_out", TensorProto.FLOAT, None)
        )

    with pytest.raises(UsageError, match="has 2 outputs") as caught:
        open_denoiser(edited(tmp_path, change))
    assert "out, down_out" in caught.value.hint


@pytest.mark.parametrize("as_node", [False, True])
def test_a_sparse_weight_is_refused_by_name(tmp_path: Path, as_node: bool) -> None:
    def change(model: onnx.ModelProto) -> None:
        weights = model.graph.initializer
        tensor = next(one for one in weights if one.name == "last.weight")
        flat = numpy_helper.to_array(tensor).ravel()
        places = numpy_helper.from_array(np.arange(len(flat)), "places")
        values = numpy_helper.from_array(flat, "last.weight")
        sparse = helper.make_sparse_tensor(values, places, list(tensor.dims))
        if as_node:
            node = helper.make_node("Constant", [], ["last.weight"], sparse_value=sparse)
            model.graph.node.insert(0, node)
        else:
            model.graph.sparse_initializer.append(sparse)
        weights.remove(tensor)

    with pytest.raises(ModelError, match=r"sparse tensor 'last\.weight'"):
        open_denoiser(edited(tmp_path, change))


def test_further_outputs_are_left_out(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.output.insert(
            0, helper.make_tensor_value_info("down_out", TensorProto.FLOAT, None)
        )
        model.graph.output.append(
            helper.make_tensor_value_info("down.weight", TensorProto.FLOAT, None)
        )

    denoiser = open_denoiser(edited(tmp_path, change, output="out"))
    assert export_denoiser(denoiser, tmp_path / "export").max_relative_error < 1e-5
    assert [
        value.name for value in load_model(tmp_path / "export" / "model.onnx").graph.outputs
    ] == ["out"]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "said"),
    [
        ("RandomNormalLike", (), {}, r"'other' .* draws random numbers"),
        ("Dropout", ("ratio", "training"), {}, r"'other' .* draws random numbers"),
        ("LpNormalization", (), {"axis": 0}, "mixes the samples of a batch"),
    ],
)
def test_a_model_whose_output_is_not_of_its_sample_alone_is_refused(
    op: str, inputs: tuple[str, ...], attributes: dict[str, int], said: str, tmp_path: Path
) -> None:
    def change(model: onnx.ModelProto) -> None:
        act = next(node for node in model.graph.node if node.name == "act")
        given = [*act.input, *inputs]
        act.CopyFrom(helper.make_node(op, given, list(act.output), name="other", **attributes))
        for name, value in (("ratio", np.float32(0.5)), ("training", np.array(True))):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    with pytest.raises(ModelError, match=said) as caught:
        export_denoiser(open_denoiser(edited(tmp_path, change)), tmp_path / "export")
    assert "evaluation mode" in caught.value.hint


def test_a_graph_that_is_none_is_named(tmp_path: Path) -> None:
    def twice(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = model.graph.node[0].output[0]

    with pytest.raises(ModelError, match="single static assignment") as caught:
        open_denoiser(edited(tmp_path, twice))
    assert "onnx.checker" in caught.value.hint

    def unfitting(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "last.weight")
        tensor.CopyFrom(numpy_helper.from_array(np.ones((3, 9, 3, 3), np.float32), tensor.name))

    with pytest.raises(ModelError, match=r"ONNX Runtime (failed|cannot load)"):
        export_denoiser(open_denoiser(edited(tmp_path / "b", unfitting)), tmp_path / "export")


def test_a_weight_without_values_is_no_layer(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        ends = {"none": [0], "from": [0], "along": [1]}
        graph.initializer.extend(
            numpy_helper.from_array(np.array(value), name) for name, value in ends.items()
        )
        graph.initializer.append(
            numpy_helper.from_array(np.zeros((0, 8), np.float32), "empty.weight")
        )
        place = next(i for i, node in enumerate(graph.node) if node.name == "both")
        graph.node[place].output[0] = "both_before"
        added = [
            helper.make_node(
                "Slice", ["both_before", "from", "none", "along"], ["nothing"], name="slice"
            ),
            helper.make_node("MatMul", ["nothing", "empty.weight"], ["zeros"], name="empty"),
            helper.make_node("Add", ["both_before", "zeros"], ["both_out"], name="both_after"),
        ]
        for number, node in enumerate(added):
            graph.node.insert(place + 1 + number, node)

    path = edited(tmp_path, change)
    export_denoiser(open_denoiser(path), tmp_path / "export")
    graph = layer_graph(load_model(tmp_path / "export" / "model.onnx"))
    assert [layer.name for layer in graph.layers] == ["time", "down", "last"]
