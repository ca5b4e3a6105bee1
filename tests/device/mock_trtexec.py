#!/usr/bin/env python3
"""MOCK of trtexec for tests on machines without TensorRT: it builds and runs nothing.

It takes the flags that mpq-deploy passes and writes files of the documented form. ``MOCK_MANIFEST`` names the manifest
whose plan its layer information repeats; ``MOCK_REFERENCE`` the npz whose outputs it gives back. Without them the files
of a probe are taken that lie beside what it builds or runs (``probe.json``, ``reference.npz``). ``MOCK_VERSION`` is
what it says of itself, ``MOCK_FAULT`` what it gets wrong: half, numbers, build.
"""

import json
import os
import sys
from pathlib import Path


def say(text):
    sys.stdout.write(text + "\n")


def flag(name):
    return next((a.split("=", 1)[1] for a in sys.argv if a.startswith(f"--{name}=")), None)


def tensor(name, kind):
    return {"Name": name, "Dimensions": [1], "Format/Datatype": f"Row major linear {kind} format"}


def layers():
    if "MOCK_MANIFEST" in os.environ:
        held = json.loads(Path(os.environ["MOCK_MANIFEST"]).read_text(encoding="utf-8"))
    else:
        form = Path(flag("onnx")).parent
        forms = json.loads((form.parents[1] / "probe.json").read_text(encoding="utf-8"))["forms"]
        held = next(one for one in forms if one["name"] == form.name)
    expected = held["expected"] or {"layers": [], "total_bytes": held["bytes"]}
    half = os.environ.get("MOCK_FAULT") == "half"
    made = []
    for layer in expected["layers"]:
        int8 = layer["scheme"].split("-")[0].split("+")[0] in ("w8a8", "w4a8") and not half
        stored = {"w8": "Int8", "w4": "Int4"}.get(layer["scheme"][:2], "FP16")
        kind = "Int8" if int8 else "FP16"
        for node in layer["nodes"]:
            weights = {"Type": stored, "Count": layer["out_channels"] * layer["reduction"]}
            unpacked = []
            if int8 and stored == "Int4":
                # A kernel of its own turns the weight into INT8.
                unpacked = [tensor(f"{node}.w", "Int8")]
                made.append(
                    {
                        "Name": f"{node}.w",
                        "LayerType": "kgen",
                        "Inputs": [],
                        "Outputs": unpacked,
                        "Weights": weights,
                        "TacticName": "mock",
                        "Metadata": "",
                    }
                )
                weights = {"Type": "FP16", "Count": 0}
            made.append(
                {
                    "Name": node,
                    "LayerType": "CaskConvolution"
                    if layer["op"] == "Conv"
                    else "CaskGemmConvolution",
                    "Inputs": [tensor("x", kind), *unpacked],
                    "Outputs": [tensor("y", "FP16")],
                    "Weights": weights,
                    "TacticName": "mock",
                    "Metadata": f"[ONNX Layer: {node}]",
                }
            )
    return {"Layers": made}, expected["total_bytes"]


def outputs(case_file):
    import numpy as np

    case = Path(case_file).name.split(".")[0]
    beside = Path(case_file).with_name("reference.npz")
    with np.load(os.environ.get("MOCK_REFERENCE", beside)) as data:
        name = json.loads(os.environ.get("MOCK_OUTPUT", '"y"'))
        values = data[f"{case}/{name}"]
    if os.environ.get("MOCK_FAULT") == "numbers":
        values = values[::-1] * 0.5
    dimensions = "x".join(map(str, values.shape))
    return [
        {"name": name, "dimensions": dimensions, "values": [float(v) for v in values.reshape(-1)]}
    ]


def main():
    version = os.environ.get("MOCK_VERSION", "100300")
    say(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # MOCK {' '.join(sys.argv)}")
    if "--help" in sys.argv:
        return 0
    known = (
        "--onnx",
        "--saveEngine",
        "--stronglyTyped",
        "--profilingVerbosity",
        "--exportLayerInfo",
        "--skipInference",
    )
    known += (
        "--verbose",
        "--minShapes",
        "--optShapes",
        "--maxShapes",
        "--loadEngine",
        "--loadInputs",
        "--shapes",
    )
    known += ("--exportOutput", "--exportTimes", "--iterations")
    for argument in sys.argv[1:]:
        if argument.split("=")[0] not in known:
            say(f"[E] Unknown option: {argument}")
            return 1
    if flag("onnx"):
        if os.environ.get("MOCK_FAULT") == "build":
            say("[E] [TRT] ModelImporter.cpp:836: ERROR: the mock refuses node conv_in")
            return 1
        Path(flag("saveEngine")).write_bytes(b"MOCK ENGINE" + Path(flag("onnx")).read_bytes()[:64])
        listed, total = layers()
        Path(flag("exportLayerInfo")).write_text(json.dumps(listed), encoding="utf-8")
        say(f"[I] [TRT] Total Weights Memory: {total} bytes")
        say(
            "[I] GPU Compute Time: min = 1.1 ms, max = 2 ms, mean = 1.3 ms, median = 1.25 ms, percentile(99%) = 2 ms"
        )
    if flag("loadInputs"):
        say("[I] Selected Device: MOCK Orin\n[I] Compute Capability: 8.7")
        for pair in flag("loadInputs").split(","):
            assert Path(pair.split(":", 1)[1]).stat().st_size > 0
        Path(flag("exportOutput")).write_text(
            json.dumps(outputs(flag("exportOutput"))), encoding="utf-8"
        )
        Path(flag("exportTimes")).write_text(
            json.dumps([{"computeMs": 1.0 + 0.01 * i, "latencyMs": 2.0} for i in range(100)]),
            encoding="utf-8",
        )
    return 0


sys.exit(main())
