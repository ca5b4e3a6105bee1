#!/usr/bin/env python3
"""STAND-IN for trtexec in tests: it builds nothing, and dies of a segmentation fault when the graph holds a given form.

``CRASH_WHEN`` is JSON: {"quantized": [layers]} dies when all these layers read a DequantizeLinear, {"present": [nodes]}
when all these nodes are in the graph. ``CRASH_VIA_SHELL`` set: it exits with 139, as a shell script does whose program
died. Everything else is taken, but the name of an input that the graph has not, as trtexec refuses it.
"""

import json
import os
import signal
import sys
from pathlib import Path

import onnx


def flag(name):
    return next((a.split("=", 1)[1] for a in sys.argv if a.startswith(f"--{name}=")), None)


def quantized(graph):
    """Names of nodes that read a DequantizeLinear, through Reshape, Transpose, QuantizeLinear and the like or not."""
    reached = set()
    names = set()
    for node in graph.node:
        through = node.op_type in (
            "Reshape",
            "Transpose",
            "Cast",
            "Identity",
            "Concat",
            "Gather",
            "QuantizeLinear",
        )
        reads = any(name in reached for name in node.input)
        if node.op_type == "DequantizeLinear" or (through and reads):
            reached.update(node.output)
        elif reads:
            names.add(node.name)
    return names


sys.stdout.write("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # STAND-IN\n")
graph = onnx.load(flag("onnx"), load_external_data=False).graph
with Path(os.environ["CRASH_COUNT"]).open("a", encoding="utf-8") as count:
    count.write("x")
inputs = {value.name for value in graph.input}
for shape in (flag("minShapes") or "").split(","):
    if shape.split(":")[0] not in inputs:
        sys.stdout.write(
            f"[E] Cannot find input tensor with name {shape.split(':')[0]!r} in the network inputs!\n"
        )
        sys.exit(1)
wanted = json.loads(os.environ["CRASH_WHEN"])
found = quantized(graph) if "quantized" in wanted else {node.name for node in graph.node}
if set(wanted.get("quantized", wanted.get("present"))) <= found:
    if os.environ.get("CRASH_VIA_SHELL"):
        sys.exit(128 + signal.SIGSEGV)
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGSEGV)
Path(flag("saveEngine")).write_bytes(b"STAND-IN")
Path(flag("exportLayerInfo")).write_text("{}", encoding="utf-8")
