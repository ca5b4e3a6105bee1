"""Pack the forms that are unproven on a target, one small graph each, for a device to try.

In: a target. Out: a tar of the same bytes each time: ``probe.json``, the graphs with references,
``probe.pyz`` (``device.form_probe`` with all it needs) and ``run.sh``. ``PROBED`` lists the forms.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.delivery.package import alternatives, check_builder, device_program, npz_bytes
from mpq_deploy.device.archive import part_digest
from mpq_deploy.device.form_probe import MODEL, PROBE, Probe, ProbeForm
from mpq_deploy.device.manifest import Reference
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import Target
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.dialects import FP4, FP8, dialect_named
from mpq_deploy.graph.layers import Layer, LayerUse, Window
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED, WEIGHTS
from mpq_deploy.latency.latency_table import LayerShape
from mpq_deploy.latency.one_layer import INPUT, OUTPUT, OneLayer, write_one_layer
from mpq_deploy.system.files import write_bytes
from mpq_deploy.system.locks import scratch_folder
from mpq_deploy.system.release import __version__

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array

CASE, REFERENCE = "probe", "reference.npz"
# What outputs may differ by: values between two INT8 codes round either way in FP16 (our choice).
TOLERANCE = 1e-3
RUN = b"""#!/bin/sh
# Tries every form and writes probe-results.json; call it again to go on where it was stopped.
set -eu
cd "$(dirname "$0")"
exec "${PYTHON:-python3}" probe.pyz "$@"
"""
# GPUs from Ada on compute in FP8, from Blackwell on in FP4.
FIRST_FP8, FIRST_FP4 = 89, 100


@dataclass(frozen=True)
class Probed:
    """A form to try: a layer under ``scheme``, and what a target takes once it is proven.

    ``ops``: whose layers may take the scheme then; ``windowed``: a convolution as a product;
    ``shifted``: one whose input's channels are shifted, which makes a target take no more.
    """

    name: str
    what: str
    scheme: str
    ops: tuple[str, ...]
    windowed: bool = False
    shifted: bool = False

    @property
    def conv(self) -> bool:
        """Whether the layer that is tried is a convolution."""
        return self.ops == ("Conv",)


PRODUCTS = ("Gemm", "MatMul")
PROBED = (
    Probed("w8a8-conv", "INT8 convolution", "w8a8", ("Conv",)),
    Probed("w8a8-product", "INT8 product", "w8a8", PRODUCTS),
    Probed("w4a16-product", "INT4 weights of a product", "w4a16-b64", PRODUCTS),
    Probed("w4a16-windows", "INT4 convolution as a product", "w4a16-b64", ("Conv",), True),
    Probed("w4a16-conv", "INT4 convolution by a reshaped weight", "w4a16-b64", ("Conv",)),
    Probed("w4a8-conv", "4-bit storage, INT8 convolution", "w4a8-b64", ("Conv",)),
    Probed("w4a8-product", "4-bit storage, INT8 product", "w4a8-b64", PRODUCTS),
    Probed("w8a16-conv", "INT8 weights alone of a convolution", "w8a16", ("Conv",)),
    Probed("w8a16-product", "INT8 weights alone of a product", "w8a16", PRODUCTS),
    Probed("scale-conv", "factors of a convolution's channels", "w8a8+scale5", ("Conv",)),
    Probed("shift-conv", "shifted channels", "w8a8+scale5", ("Conv",), shifted=True),
    Probed("scale-product", "factors of a product's channels", "w8a8+scale5", PRODUCTS),
    Probed("cols-conv", "outlier channels beside a convolution", "w8a8+cols1", ("Conv",)),
    Probed("cols-product", "outlier channels beside a product", "w8a8+cols1", PRODUCTS),
    Probed("rows-product", "INT8 rows beside an INT4 product", "w4a16-b128+rows2", PRODUCTS),
    Probed("lowrank-product", "low rank beside an INT4 product", "w4a16-b128+lowrank8", PRODUCTS),
)
CHANNELS, SIZE, ROWS = 128, 16, 64


def make_probe(target: Target, out: Path) -> dict[str, Any]:
    """Write the probe for ``target`` to ``out``; return what was written.

    Raises UsageError for a target without a builder, and OSError.
    """
    check_builder(target)
    parts: dict[str, bytes] = {"probe.pyz": device_program("form_probe"), "run.sh": RUN}
    forms = []
    with scratch_folder("probe") as scratch:
        for one in PROBED:
            form, files = _form(one, target, scratch / one.name)
            forms.append(form)
            parts.update({f"forms/{one.name}/{name}": data for name, data in files.items()})
        for name, what, draw in _narrow_floats(target):
            form, files = _float_form(name, what, draw)
            forms.append(form)
            parts.update({f"forms/{name}/{file}": data for file, data in files.items()})
    digests = {name: part_digest(data) for name, data in parts.items()}
    probe = Probe(__version__, target.build_target, tuple(forms), digests, alternatives(target))
    parts[PROBE] = probe.to_json().encode()
    content = _tar(parts)
    write_bytes(out, content)
    return {
        "file": str(out),
        "sha256": part_digest(content),
        "bytes": len(content),
        "forms": [form.name for form in forms],
    }


def _form(one: Probed, target: Target, folder: Path) -> tuple[ProbeForm, dict[str, bytes]]:
    """Write the layer of a form; return its description and files."""
    folder.mkdir()
    layer = _one_layer(one)
    size = write_one_layer(layer, folder, dialect_named(target.dialect))
    schemes = {layer.layer.name: layer.scheme}
    expected = ExpectedLayers.of([layer.alone], schemes, size)
    x, y = _ran(folder / SIMULATED, layer.shape.input_shape)
    files = {MODEL: (folder / DEPLOYED).read_bytes(), WEIGHTS: (folder / WEIGHTS).read_bytes()}
    files[REFERENCE] = npz_bytes({f"{CASE}/{INPUT}": x, f"{CASE}/{OUTPUT}": y})
    return ProbeForm(one.name, one.what, expected, _reference(), size), files


def _one_layer(one: Probed) -> OneLayer:
    if one.conv:
        weight, sizes = (CHANNELS, CHANNELS, 3, 3), (CHANNELS, SIZE, SIZE)
        attributes = [ir.AttrInt64s("pads", [1] * 4)]
        shape = LayerShape("Conv", (2, *sizes), (2, *sizes), weight)
    else:
        weight, attributes = (2 * CHANNELS, CHANNELS), []  # type: ignore[assignment]
        shape = LayerShape("MatMul", (2, ROWS, 2 * CHANNELS), (2, ROWS, CHANNELS), weight)
    axis = 0 if one.conv else 1
    uses = (LayerUse("layer", INPUT, OUTPUT),)
    layer = Layer("layer", shape.op, "layer.weight", weight, axis, 1, uses)
    if one.windowed:
        layer = replace(layer, window=Window((1, 1), (1, 1), (1,) * 4))
    if one.shifted:
        form = SCHEMES[one.scheme].activation_form
        layer = replace(layer, shifted=frozenset({form}), pads=(1,) * 4)
    node = ir.Node("", shape.op, [None, None], attributes, name="layer")
    return OneLayer(layer, node, shape, SCHEMES[one.scheme])


def _ran(model: Path, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return a random FP16 input and what the FP32-arithmetic twin makes of it."""
    from mpq_deploy.runtime.ort import make_session
    from mpq_deploy.system.compute import CPU_PROVIDER

    x = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    session = make_session(model, 1, [CPU_PROVIDER], fake_quant_only=True)
    return x, np.asarray(session.run(None, {INPUT: x.astype(np.float32)})[0], np.float32)


def _reference() -> Reference:
    made_by = "ONNX Runtime, CPU, FP32 arithmetic on the same integers and scales"
    return Reference(REFERENCE, (CASE,), (INPUT,), OUTPUT, made_by, None, TOLERANCE)


Drawn = tuple[onnx.ModelProto, "Array", "Array"]


def _narrow_floats(target: Target) -> list[tuple[str, str, Callable[[], Drawn]]]:
    """The forms of FP8 and FP4, where every GPU of the target has them."""
    gpus = [int(name.removeprefix("SM")) for name in target.compute_capabilities]
    newest = min(gpus, default=0)
    found: list[tuple[str, str, Callable[[], Drawn]]] = []
    types = dialect_named(target.dialect).types
    if newest >= FIRST_FP8 and FP8 in types:
        found.append(("fp8-product", "FP8 product", _fp8_product))
    if newest >= FIRST_FP4 and FP4 in types:
        found.append(("fp4-product", "FP4 weights of a product", _fp4_product))
    return found


def _float_form(
    name: str, what: str, draw: Callable[[], Drawn]
) -> tuple[ProbeForm, dict[str, bytes]]:
    model, x, y = draw()
    content = model.SerializeToString()
    with scratch_folder("probe") as folder:
        (folder / MODEL).write_bytes(content)
        size = constant_bytes(folder / MODEL)
    files = {MODEL: content, REFERENCE: npz_bytes({f"{CASE}/{INPUT}": x, f"{CASE}/{OUTPUT}": y})}
    return ProbeForm(name, what, None, _reference(), size), files


def _fp8_product() -> Drawn:
    """Activations and weights in E4M3, one scale per tensor."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    kind, scale = ml_dtypes.float8_e4m3fn, np.float16(1 / 32)
    codes = (rng.standard_normal((2 * CHANNELS, CHANNELS)) * 16).astype(kind)
    x = rng.standard_normal((2, ROWS, 2 * CHANNELS)).astype(np.float16)
    seen = (x / scale).astype(np.float32).astype(kind).astype(np.float32) * np.float32(scale)
    y = seen @ (codes.astype(np.float32) * np.float32(scale))
    constants = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scale, "s")]
    nodes = [
        helper.make_node(
            "QuantizeLinear", [INPUT, "s"], ["q"], "q", output_dtype=TensorProto.FLOAT8E4M3FN
        ),
        helper.make_node("DequantizeLinear", ["q", "s"], ["dq"], "dq"),
        helper.make_node("DequantizeLinear", ["w", "s"], ["dw"], "dw"),
        helper.make_node("MatMul", ["dq", "dw"], [OUTPUT], "layer"),
    ]
    return _float_model(nodes, constants, 21), x, np.asarray(y, np.float32)


def _fp4_product() -> Drawn:
    """E2M1 weights in blocks of 16 along the reduction, FP16 activations."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    codes = rng.standard_normal((2 * CHANNELS, CHANNELS)).astype(ml_dtypes.float4_e2m1fn)
    scale = (rng.random((2 * CHANNELS // 16, CHANNELS)) / 16 + 1 / 32).astype(np.float16)
    x = rng.standard_normal((2, ROWS, 2 * CHANNELS)).astype(np.float16)
    weight = codes.astype(np.float32) * np.repeat(scale.astype(np.float32), 16, axis=0)
    constants = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scale, "s")]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["dw"], "dw", axis=0, block_size=16),
        helper.make_node("MatMul", [INPUT, "dw"], [OUTPUT], "layer"),
    ]
    y = np.asarray(x.astype(np.float32) @ weight, np.float32)
    return _float_model(nodes, constants, 23), x, y


def _float_model(
    nodes: list[onnx.NodeProto], constants: list[TensorProto], opset: int
) -> onnx.ModelProto:
    kind = TensorProto.FLOAT16
    x = helper.make_tensor_value_info(INPUT, kind, [2, ROWS, 2 * CHANNELS])
    y = helper.make_tensor_value_info(OUTPUT, kind, [2, ROWS, CHANNELS])
    graph = helper.make_graph(nodes, "form", [x], [y], constants)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10 if opset < 23 else 11)


def _tar(parts: dict[str, bytes]) -> bytes:
    """Return a tar of ``parts`` in a folder ``probe``, without times or owners."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(parts):
            info = tarfile.TarInfo(f"probe/{name}")
            info.size, info.mode = len(parts[name]), 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(info, io.BytesIO(parts[name]))
    return content.getvalue()
