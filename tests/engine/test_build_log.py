"""Reading the builder's log: kernels, totals, and refusing what is not understood."""

from __future__ import annotations

import pytest

from mpq_deploy.engine.build_log import EngineTensor, compute_dtype, layers_text, parse_engine_log
from mpq_deploy.errors import EngineError

TENSOR = "{{ Name: {0}, Dimensions: [{1}], Strides: [1], StrideOrder: [0], Datatype: {2}, Format: (Linear) Row major }}"
CONV = (
    "Name: down.conv1/Conv_myl0_2, LayerType: correlation, "
    f"Inputs: [ {TENSOR.format('x', '-1,32,16,16', 'Int8')}], "
    f"Constants: [ {TENSOR.format('w', '64,32,3,3', 'Int8')}, {TENSOR.format('s', '', 'Float')}], "
    f"Outputs: [ {TENSOR.format('y', '-1,64,16,16', 'Float')}], TacticName: sm80_xmma, StreamId: 0, "
    "Metadata: [ONNX Layer: down.conv1/Conv][ONNX Layer: x/dequantize][ONNX Layer: down.conv1/Conv]"
)
SIGNAL = (
    "Name: __mye1100_myl0_2, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , "
    "StreamId: 0, EventId: 1, Metadata: "
)
LOG = (
    "[INFO] Total Activation Memory: 8486912 bytes\n[INFO] Total Weights Memory: 20994 bytes\n"
    f"[VERBOSE] Layers:\n{CONV}\n{SIGNAL}\n\nI/O Tensors:\n Name: x, IOMode: Input\n"
)


def test_a_kernel_is_read_with_its_operands_and_nodes() -> None:
    log = parse_engine_log(LOG)
    conv, signal = log.layers
    assert (conv.type, conv.tactic, conv.nodes) == (
        "correlation",
        "sm80_xmma",
        ("down.conv1/Conv", "x/dequantize"),
    )
    assert conv.inputs == (EngineTensor("x", (-1, 32, 16, 16), "Int8"),)
    assert conv.constants[0].elements == 64 * 32 * 9
    assert conv.constants[1] == EngineTensor("s", (), "Float")
    assert compute_dtype(conv) == "Int8"
    assert not signal.compute
    assert signal.nodes == ()


def test_totals_and_summary() -> None:
    log = parse_engine_log(LOG)
    assert (log.weights_bytes, log.activation_bytes) == (20994, 8486912)
    assert log.summary() == {"correlation Int8": 1, "signal": 1}


def test_the_kernels_text_is_only_the_list() -> None:
    assert layers_text(LOG) == f"{CONV}\n{SIGNAL}\n"


def test_a_log_without_layers_is_an_error() -> None:
    with pytest.raises(EngineError, match="no 'Layers:' message"):
        parse_engine_log("[INFO] Total Weights Memory: 3 bytes\n")


def test_jumps_of_a_loop_are_read() -> None:
    """What an LSTM becomes."""
    jump = SIGNAL.replace("signal", "cjmp").replace(
        "EventId: 1,", "JumpTargetThen: __mye20454_myl0_61, JumpTargetElse: __mye19541_myl0_167,"
    )
    log = parse_engine_log(LOG.replace(SIGNAL, jump))
    assert [layer.type for layer in log.layers] == ["correlation", "cjmp"]


def test_a_layer_of_another_form_is_an_error_not_skipped() -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        parse_engine_log("[VERBOSE] Layers:\nName: a, LayerKind: b\n")
