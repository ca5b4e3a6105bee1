"""Pass: let attentions compute in FP8, by Q/DQ on queries, keys, probabilities and values.

TensorRT-RTX keeps such an attention in one kernel that reads FP8, and quantizes in the kernels that
make its operands (docs/engine-forms.md); INT8 there would break it apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mpq_deploy.formats.fp8 import FP8_INPUT
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.graph.writers.node_writer import NodeWriter


def quantize_operands(model: ir.Model, operands: Mapping[str, ActivationGrid]) -> None:
    """Insert a pair behind each tensor of ``operands``, which one node reads, in place."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    to = NodeWriter(model)
    for tensor, grid in operands.items():
        value = values[tensor]
        ((node, index),) = value.uses()
        pair = FP8_INPUT.write(to, value, grid, (tensor, FP8_INPUT.form))
        node.replace_input_with(index, to.after(value, pair))
