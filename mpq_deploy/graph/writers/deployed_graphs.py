"""From a plan to files: the FP16 graph for TensorRT and its FP32-arithmetic twin for ONNX Runtime.

In: the exported model, the scheme and codes of every layer, the activation scales, the dialect.
Out: ``model.onnx`` and ``model.fp32.onnx`` over one ``weights.bin``, which holds the integers and
scales of both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.ranges import ramp_nodes
from mpq_deploy.graph.dialects import Dialect
from mpq_deploy.graph.fp16_region import fp16_region
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.passes.fp16_arithmetic import Fp16ArithmeticPass
from mpq_deploy.graph.passes.fp16_storage import Fp16StoragePass
from mpq_deploy.graph.passes.lower_opset import LowerOpsetPass
from mpq_deploy.graph.passes.raise_opset import RaiseOpsetPass
from mpq_deploy.graph.save import save_sharing
from mpq_deploy.graph.writers.nominal_bytes import nominal_bytes
from mpq_deploy.graph.writers.quantize_attention import quantize_operands
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, quantize_layers
from mpq_deploy.models.spec import Array

DEPLOYED = "model.onnx"
SIMULATED = "model.fp32.onnx"
WEIGHTS = "weights.bin"


@dataclass(frozen=True)
class FloatGraph:
    """The exported FP32 model: its file and the names of two of its inputs.

    ``constants`` take the place of the file's, by name: values that recovery has learned.
    ``beyond_fp16``: names of nodes whose values FP16 does not hold. ``fp8_operands``: tensors that
    attentions read in FP8, with their quantizers.
    """

    path: Path
    timestep: str
    sample: str
    constants: Mapping[str, Array] = field(default_factory=dict)
    beyond_fp16: Collection[str] = ()
    fp8_operands: Mapping[str, ActivationGrid] = field(default_factory=dict)


def write_quantized(
    exported: FloatGraph,
    rewrites: Sequence[LayerRewrite],
    scales: Mapping[str, float | ActivationGrid],
    folder: Path,
    dialect: Dialect | None = None,
) -> int:
    """Write both graphs of a plan into ``folder``; return the bytes of all constants in the file.

    ``scales``: INT8 scales by activation tensor. ``dialect``: what the target reads (None: anything
    that is written). What is simulated has nominal bytes, checked against its codes in the file.
    Raises ModelError for a layer or node that the dialect cannot take.
    """
    if dialect is not None:
        refuse_schemes(rewrites, dialect)
    learned = {name: ir.tensor(array, name=name) for name, array in exported.constants.items()}
    models = {}
    for name, finish in ((DEPLOYED, Fp16ArithmeticPass), (SIMULATED, Fp16StoragePass)):
        model = load_model(exported.path)
        simulating = name == SIMULATED
        if not simulating:
            RaiseOpsetPass(max((r.scheme.weight.opset for r in rewrites), default=0))(model)
        for constant, tensor in learned.items():
            model.graph.initializers[constant].const_value = tensor
        region = fp16_region(model, exported.timestep, exported.sample, exported.beyond_fp16)
        quantize_operands(model, exported.fp8_operands)
        quantize_layers(model, list(rewrites), scales, exported.timestep, simulating)
        finish(region.with_nodes(ramp_nodes()).with_written(model))(model)
        if dialect is not None:
            LowerOpsetPass(dialect.opsets[1])(model)
        models[name] = model
    save_sharing(models, folder, WEIGHTS)
    return nominal_bytes(folder / DEPLOYED, [rewrite.layer for rewrite in rewrites])


def refuse_schemes(rewrites: Sequence[LayerRewrite], dialect: Dialect) -> None:
    """Raise ModelError when a layer takes a form that the builder is documented to refuse.

    Forms that are only unproven there are the target's matter, which a user's YAML may decide.
    """
    for rewrite in rewrites if dialect.tensorrt else ():
        (body, form), *_ = rewrite.scheme.parts(rewrite.layer)
        reason = form.weight.dialect_refusal(body, dialect)
        if reason:
            stored = form.weight.engine_types[0].upper()
            raise ModelError(
                f"{dialect.runtime} refuses the {stored} weight of '{rewrite.layer.name}': its {reason}.",
                f"Protect the layer (recipe: protect), or exclude {stored} for it in the target's YAML.",
            )


def fp16_bytes(model: ir.Model, timestep: str, sample: str) -> int:
    """Bytes of all constants of ``model`` in FP16, without quantization; rewrites ``model``."""
    Fp16ArithmeticPass(fp16_region(model, timestep, sample))(model)
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
