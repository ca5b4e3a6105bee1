"""What this machine has, and what it can build and run. Data only: the command line prints it.

Nothing heavy is imported: versions come from the packages' metadata; only ONNX Runtime is asked for
its providers.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from mpq_deploy.engine.target import Target, known_targets, load_target
from mpq_deploy.engine.trtexec import find_trtexec
from mpq_deploy.system.memory import MACHINE, machine_memory, memory_room
from mpq_deploy.system.threads import available_cores

Status = Literal["ok", "missing", "note"]
Group = Literal["machine", "packages", "builders", "gpu", "targets"]

# What `pip install` gets for what is missing.
PACKAGE_HINTS = {
    "torch": 'pip install "mpq-deploy[torch]" (export of diffusers models, adjoint probes)',
    "diffusers": 'pip install "mpq-deploy[torch]" (diffusers folders)',
    "tensorrt_rtx": 'pip install "mpq-deploy[rtx]" (engines for RTX GPUs; builds without a GPU)',
    "tensorrt": "comes with TensorRT or JetPack (engines for Jetson and data-centre GPUs)",
}
NVIDIA_SMI_SECONDS = 10


@dataclass(frozen=True)
class Finding:
    """One thing about this machine: ``value`` is what was found, ``hint`` how to get what is missing."""

    group: Group
    name: str
    status: Status
    value: str
    hint: str = ""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; ``compute_capability`` such as ``SM86``, empty where it could not be found out."""

    name: str
    driver: str
    compute_capability: str
    memory: str


def inspect_machine() -> list[Finding]:
    """Return what this machine has, group by group, and for each target whether it can be built and run here."""
    gpus = find_gpus()
    return [
        *_machine(),
        *_packages(),
        _compute(),
        *_builders(),
        *_gpu_findings(gpus),
        *(
            finding
            for name in known_targets()
            for finding in target_findings(load_target(name), gpus)
        ),
    ]


def find_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that the driver shows; empty when there is none, or no driver."""
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = "--query-gpu=name,driver_version,compute_cap,memory.total"
        try:
            done = subprocess.run(
                [smi, query, "--format=csv,noheader"],
                capture_output=True,
                encoding="utf-8",
                check=False,
                timeout=NVIDIA_SMI_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return []
        if done.returncode == 0:
            return parse_nvidia_smi(done.stdout)
    return _gpus_of_proc(Path("/proc/driver/nvidia"))


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """Read ``name, driver, compute capability, memory`` lines."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            name, driver, capability, memory = parts
            digits = capability.replace(".", "")
            gpus.append(Gpu(name, driver, f"SM{digits}" if digits.isdigit() else "", memory))
    return gpus


def target_findings(target: Target, gpus: list[Gpu]) -> list[Finding]:
    """Say whether ``target`` can be built here, and whether what it builds can run here, each with the reason."""
    missing = why_not_build(target)
    build = _answer(target.name, "build", missing, _how_it_builds(target))
    stopped = why_not_run(target, gpus)
    run = _answer(
        target.name, "run", stopped, "ONNX Runtime" if target.builder == "none" else _names(gpus)
    )
    return [build, run]


def why_not_build(target: Target) -> str:
    """Return what stands against building for ``target`` on this machine; empty when nothing does."""
    if target.builder == "none":
        return ""
    if target.builder == "trtexec":
        return (
            ""
            if find_trtexec()
            else "trtexec is not installed here: its engines are built on the device"
        )
    if importlib.util.find_spec(target.builder) is None:
        return f"the package {target.builder} is not installed"
    found = _version(target.builder)
    if found and not target.build_target.takes_version(found):
        return f"{target.builder} {found} is installed, but the target is for {' or '.join(target.versions)}"
    return ""


def why_not_run(target: Target, gpus: list[Gpu]) -> str:
    """Return what stands against running an engine of ``target`` on this machine; empty when nothing does."""
    if target.builder == "none":
        return (
            ""
            if _version("onnxruntime") or _version("onnxruntime-gpu")
            else "ONNX Runtime is not installed"
        )
    if not gpus:
        return "no NVIDIA GPU with a driver"
    runtime = "tensorrt" if target.builder == "trtexec" else target.builder
    if importlib.util.find_spec(runtime) is None:
        return f"the package {runtime} is not installed"
    wanted = target.compute_capabilities
    if wanted and not any(gpu.compute_capability in wanted for gpu in gpus):
        return f"its engines are for {', '.join(wanted)}; this machine has {_names(gpus)}"
    return ""


def _answer(name: str, what: str, against: str, how: str) -> Finding:
    if against:
        return Finding("targets", f"{name}: {what} here", "missing", f"no: {against}")
    return Finding("targets", f"{name}: {what} here", "ok", f"yes: {how}")


def _how_it_builds(target: Target) -> str:
    if target.builder == "none":
        return "the graph itself is deployed"
    if target.builder == "trtexec":
        return f"{find_trtexec()} (unproven)"
    needs_gpu = "" if target.builder == "tensorrt_rtx" else " (unproven; it needs a GPU)"
    return f"{target.builder} {_version(target.builder)}{needs_gpu}".replace("  ", " ")


def _names(gpus: list[Gpu]) -> str:
    return ", ".join(
        f"{gpu.name} ({gpu.compute_capability or 'unknown capability'})" for gpu in gpus
    )


def _machine() -> list[Finding]:
    disk = shutil.disk_usage(Path.cwd())
    free = f"{disk.free / 1e9:.0f} GB free here"
    return [
        Finding(
            "machine",
            "Python",
            "ok",
            f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        ),
        Finding("machine", "CPU cores", "ok", str(available_cores())),
        Finding("machine", "memory", "ok", _memory()),
        Finding("machine", "disk", "ok" if disk.free > 2e9 else "note", free),
    ]


def _memory() -> str:
    """The machine's memory and how much of it is available, in GB, with what else limits it."""
    machine, room = machine_memory(), memory_room()
    total = f"{machine.total / 1e9:.1f} GB" if machine else "unknown"
    if room is None:
        return total
    whose = "" if room.whose == MACHINE else f" ({room.whose})"
    return f"{total}, {room.bytes / 1e9:.1f} GB available{whose}"


def _packages() -> list[Finding]:
    findings = [_onnxruntime()]
    for name in ("torch", "diffusers"):
        found = _version(name)
        hint = "" if found else PACKAGE_HINTS[name]
        findings.append(
            Finding("packages", name, "ok" if found else "missing", found or "not installed", hint)
        )
    return findings


def _onnxruntime() -> Finding:
    try:
        import onnxruntime
    except ImportError as error:
        return Finding("packages", "onnxruntime", "missing", str(error), "pip install onnxruntime")
    providers = ", ".join(onnxruntime.get_available_providers())
    return Finding("packages", "onnxruntime", "ok", f"{onnxruntime.__version__}: {providers}")


def _compute() -> Finding:
    """What ``--device auto`` chooses; a line per library that cannot use the GPU, with the fix."""
    from mpq_deploy.system.compute import (
        AUTO,
        BOTH_INSTALLED,
        INSTALL_RUNTIME,
        find_compute,
        hidden_runtime,
        why_no_gpu,
        whys_no_cuda,
    )

    value, against = str(find_compute(AUTO)), why_no_gpu()
    whys = [] if against else [why for why in whys_no_cuda() if why]
    if hidden_runtime():
        others = [why for why in whys if why != BOTH_INSTALLED]
        whys = [BOTH_INSTALLED, *INSTALL_RUNTIME.split("; "), *others]
    value += f": {against}" if against else ""
    return Finding("packages", "compute device", "note" if whys else "ok", value, "\n".join(whys))


def _builders() -> list[Finding]:
    findings = []
    for name in ("tensorrt_rtx", "tensorrt"):
        here = importlib.util.find_spec(name) is not None
        detail = (_version(name) or "version unknown") if here else "not installed"
        hint = "" if here else PACKAGE_HINTS[name]
        findings.append(Finding("builders", name, "ok" if here else "missing", detail, hint))
    trtexec = find_trtexec()
    hint = (
        ""
        if trtexec
        else "comes with JetPack and the TensorRT packages; engines for Jetson are built there"
    )
    findings.append(
        Finding("builders", "trtexec", "ok" if trtexec else "missing", trtexec or "not found", hint)
    )
    return findings


def _gpu_findings(gpus: list[Gpu]) -> list[Finding]:
    board = Path("/proc/device-tree/model")
    findings = []
    if board.is_file():
        findings.append(
            Finding(
                "gpu",
                "board",
                "note",
                board.read_text(errors="replace", encoding="utf-8").strip("\0\n "),
            )
        )
    if not gpus:
        detail = "none with a driver: RTX engines can be built but not run"
        return [*findings, Finding("gpu", "NVIDIA GPU", "missing", detail)]
    for gpu in gpus:
        detail = f"{gpu.name}, {gpu.compute_capability or 'capability unknown'}, driver {gpu.driver}, {gpu.memory}"
        findings.append(Finding("gpu", "NVIDIA GPU", "ok", detail))
    return findings


def _gpus_of_proc(folder: Path) -> list[Gpu]:
    """Read the driver's own files where nvidia-smi is missing; they do not tell the compute capability."""
    stated = folder / "version"
    if not stated.is_file():
        return []
    words = stated.read_text(errors="replace", encoding="utf-8").split()
    driver = next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
    gpus = []
    for path in sorted(folder.glob("gpus/*/information")):
        fields = dict(
            line.split(":", 1)
            for line in path.read_text(errors="replace", encoding="utf-8").splitlines()
            if ":" in line
        )
        gpus.append(Gpu(fields.get("Model", "NVIDIA GPU").strip(), driver, "", "memory unknown"))
    return gpus


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
