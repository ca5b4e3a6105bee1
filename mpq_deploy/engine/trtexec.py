"""Build with trtexec, the command-line builder that comes with TensorRT and with JetPack.

Unproven here: written from the documentation of TensorRT 10.3 to 11.1; no device was available.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from mpq_deploy.engine.build_target import BuildTarget
from mpq_deploy.engine.build_worker import InputShapes
from mpq_deploy.engine.failure import crashed, fatal_signal
from mpq_deploy.engine.record import BuildTiming
from mpq_deploy.errors import EngineError
from mpq_deploy.system.children import run_bounded
from mpq_deploy.system.inputs import read_text
from mpq_deploy.system.memory import children_peak_bytes

# Where JetPack and the Debian packages put it, besides the search path.
PLACES = ("/usr/src/tensorrt/bin/trtexec",)
# One build: hours on a small device (our choice). What it lists of its layers: some kilobytes each.
BUILD_SECONDS, LAYERS_BYTES = 12 * 3600.0, 256 << 20


def find_trtexec() -> str | None:
    """Return the path of trtexec on this machine, or None."""
    return shutil.which("trtexec") or next(
        (place for place in PLACES if Path(place).is_file()), None
    )


def trtexec_command(
    trtexec: str, model: Path, engine: Path, layers: Path, shapes: Mapping[str, InputShapes]
) -> list[str]:
    """Return the command line that builds ``engine`` and lists its kernels in ``layers``.

    TensorRT 10 needs ``--stronglyTyped``, which precision flags would contradict; 11 ignores it.
    """
    command = [
        trtexec,
        f"--onnx={model}",
        f"--saveEngine={engine}",
        "--stronglyTyped",
        "--profilingVerbosity=detailed",
        f"--exportLayerInfo={layers}",
        "--skipInference",
        "--verbose",
    ]
    for flag, field in (
        ("minShapes", "minimum"),
        ("optShapes", "optimum"),
        ("maxShapes", "maximum"),
    ):
        described = [
            f"{name}:{'x'.join(map(str, getattr(shape, field)))}" for name, shape in shapes.items()
        ]
        if described:
            command.append(f"--{flag}={','.join(described)}")
    return command


def build_with_trtexec(
    model: Path, engine: Path, target: BuildTarget, shapes: Mapping[str, InputShapes], log: Path
) -> tuple[str, str, BuildTiming]:
    """Run trtexec; return its version, the layer information (JSON) and what building took.

    Raises EngineError when trtexec is absent, fails, or has a version that the dialect is not for.
    """
    trtexec = find_trtexec()
    if trtexec is None:
        raise EngineError(
            f"The engine for '{target.name}' is built by trtexec, which is not on this machine.",
            "Build it on the device (JetPack has /usr/src/tensorrt/bin/trtexec), or use the target 'rtx' here.",
        )
    layers = engine.with_name("layers.json")
    started = time.monotonic()
    command = trtexec_command(trtexec, model, engine, layers, shapes)
    with log.open("wb") as stream:
        try:
            done = run_bounded(command, seconds=BUILD_SECONDS, log=stream)
        except subprocess.TimeoutExpired as error:
            what = f"trtexec was stopped after {BUILD_SECONDS / 3600:.0f} hours."
            raise EngineError(what, f"Log: {log}") from error
    text = log.read_text(errors="replace", encoding="utf-8")
    version = trtexec_version(text)
    if version and not target.takes_version(version):
        raise EngineError(
            f"The target '{target.name}' is for TensorRT {' or '.join(target.versions)}, but trtexec is {version}.",
            "Choose the target of that version (mpq-deploy targets).",
        )
    if fatal_signal(done.returncode):
        raise crashed(model, log, done.returncode, "")
    if done.returncode or not engine.is_file():
        errors = [line for line in text.splitlines() if "[E]" in line][:3]
        reason = " / ".join(errors) or "no reason given"
        raise EngineError(f"trtexec refuses the graph: {reason}.", f"Log: {log}")
    timing = BuildTiming(round(time.monotonic() - started, 3), children_peak_bytes())
    return version, read_text(layers, limit=LAYERS_BYTES, error=EngineError), timing


def trtexec_trial(graph: Path, shapes: Mapping[str, InputShapes], seconds: float) -> int:
    """Build a smaller graph with trtexec, keep nothing; return its exit code, 0 after a timeout.

    ``shapes`` are those of the whole graph: trtexec refuses names that the smaller one lacks.
    """
    import onnx

    trtexec = find_trtexec()
    assert trtexec is not None  # the graph has crashed the builder before
    names = {value.name for value in onnx.load(graph, load_external_data=False).graph.input}
    present = {name: shape for name, shape in shapes.items() if name in names}
    engine, layers = graph.with_name("trial.engine"), graph.with_name("trial.json")
    command = trtexec_command(trtexec, graph, engine, layers, present)
    try:
        return run_bounded(command, seconds=seconds).returncode
    except subprocess.TimeoutExpired:
        return 0


def trtexec_version(text: str) -> str:
    """Read the version from trtexec's output: ``[TensorRT v100300]`` is 10.3.0, ``v8603`` 8.6.3."""
    match = re.search(r"\[TensorRT v(\d+)\]", text)
    if match is None:
        return ""
    digits = match.group(1)
    if len(digits) <= 4:
        return ".".join((digits[0], digits[1], digits[2:].lstrip("0") or "0"))
    return ".".join(str(int(part)) for part in (digits[:-4], digits[-4:-2], digits[-2:]))
