"""Install a package on a device: verify, probe, build, check the layers, run, measure.

In: a ``.mpq.tar``. Out: a folder with its parts, ``engine/`` and ``results.json`` for 'mpq-deploy
report RUN --device results.json' on the build machine. Needs only NumPy and TensorRT.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from mpq_deploy.bench.statistics import call_times
from mpq_deploy.device.archive import (
    MANIFEST,
    PLAN,
    ArchiveError,
    check_parts,
    extract,
    read_archive,
)
from mpq_deploy.device.cuda import Cuda, why_no_gpu
from mpq_deploy.device.manifest import DIGEST, RESULTS, RESULTS_FORMAT, Manifest
from mpq_deploy.device.output_check import compare
from mpq_deploy.device.run import Run, reference_arrays, run_engine
from mpq_deploy.device.signature import read_public_key, verify
from mpq_deploy.device.whole_installer import install_whole, whole_summary
from mpq_deploy.device.whole_manifest import is_whole
from mpq_deploy.engine.build_target import BUILDERS, BuildTarget, version_fits
from mpq_deploy.engine.builder import PACKAGES, BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.engine.trtexec import find_trtexec, trtexec_version
from mpq_deploy.errors import EngineError, MissingDependencyError, MpqError, UsageError
from mpq_deploy.system.children import run_bounded
from mpq_deploy.system.files import disk_error, file_digest, refuse_links, write_text
from mpq_deploy.system.inputs import open_input, read_json_object
from mpq_deploy.system.memory import memory_room
from mpq_deploy.system.names import path_inside, printable
from mpq_deploy.system.progress import PlainTalk, Talk
from mpq_deploy.system.release import __version__
from mpq_deploy.system.typed import typed

ENGINE_FOLDER = "engine"
BANNER_SECONDS = 120.0
# TensorRT-RTX's builder was measured at about three times the weights, on top of what it needs for
# itself.
BUILD_FACTOR, BUILD_BASE_BYTES = 3, 500_000_000


@dataclass(frozen=True)
class Runtime:
    """What builds on this machine: ``builder`` is a Python module or trtexec."""

    builder: str
    version: str


def unpack(archive: Path, out: Path, talk: Talk) -> None:
    """Verify ``archive`` and write its parts into ``out``; ArchiveError if truncated or altered."""
    talk.line(f"verifying {archive}")
    entries = read_archive(archive)
    check_parts(entries, archive)
    extract(archive, entries, out)


@dataclass(frozen=True)
class Trust:
    """What an archive must be: of the digest ``sha256`` and signed by ``key``; None: not asked for.

    ``key``: minisign's public key, a file or its text. An empty text counts as requested, and is
    refused: an unset shell variable gives one.
    """

    sha256: str | None = None
    key: str | None = None

    def check(self, archive: Path) -> None:
        """Raise ArchiveError or SignatureError where ``archive`` is another.

        Raises UsageError for what is no digest or key.
        """
        if self.sha256 is None and self.key is None:
            return
        if archive.is_dir():
            what = f"{archive} is a folder, which has no digest or signature of its own."
            raise UsageError(what, "Give the .mpq.tar file.")
        if self.sha256 is not None:
            expected = self.sha256.strip().lower()
            if not DIGEST.fullmatch(expected):
                raise UsageError(
                    f"'{printable(self.sha256[:80])}' is not a SHA-256.",
                    "Give the 64 digits that 'mpq-deploy package' printed.",
                )
            with open_input(archive, error=ArchiveError):
                found = file_digest(archive)
            if found != expected:
                what = f"{archive} has the SHA-256 {found}, not {expected}."
                raise ArchiveError(what, "Get it again from where it was packed.")
        if self.key is not None:
            key = read_public_key(self.key)
            try:
                verify(archive, key)
            except MissingDependencyError as error:
                raise UsageError(
                    "Signatures cannot be checked here: the Python package cryptography is missing.",
                    "Check with minisign itself (minisign -Vm FILE -p KEY), and give --sha256 here.",
                ) from error


def install(
    archive: Path,
    out: Path,
    talk: Talk,
    force_memory: bool = False,
    trust: Trust = Trust(),
) -> dict[str, Any]:
    """Install ``archive`` (or its unpacked folder) into ``out``; return what results.json holds.

    Nothing of it is read before it is verified as ``trust`` asks. Raises ArchiveError for an
    archive that is truncated or altered, EngineError for a wrong TensorRT or GPU, too little memory
    (unless ``force_memory``) or a builder that fails. An engine that differs from the plan or the
    references only makes ``results["passed"]`` false. Of a whole pipeline all components are installed,
    and its images made.
    """
    trust.check(archive)
    if archive.is_dir():
        out = archive
    refuse_links(out, ArchiveError)
    if not archive.is_dir():
        unpack(archive, out, talk)
    if is_whole(out):
        return install_whole(
            out,
            partial(_install_unpacked, talk=talk, force_memory=force_memory),
            talk,
            force_memory,
        )
    return _install_unpacked(out, talk, force_memory)


def _install_unpacked(
    out: Path, talk: Talk, force_memory: bool, streams: bool = False
) -> dict[str, Any]:
    """Install what lies in ``out``; ``streams``: weights from host memory, where the builder can do that."""
    manifest = Manifest.load(out / MANIFEST)
    check_unpacked(out, manifest)
    runtime = probe(manifest)
    talk.line(
        f"{runtime.builder} {runtime.version or '(version unknown)'} for {manifest.target.name}"
    )
    check_gpu(manifest)
    check_memory(manifest, force_memory)
    streams = streams and runtime.builder != "trtexec"
    check_gpu_memory(manifest, force_memory or streams)
    record = _build(manifest, runtime, out, talk, streams)
    run = run_engine(runtime.builder, out / ENGINE_FOLDER / record.file, out, manifest.reference)
    text = (
        json.dumps(_results(manifest, record, run, out), indent=1, sort_keys=True, allow_nan=False)
        + "\n"
    )
    write_text(out / RESULTS, text)
    results: dict[str, Any] = json.loads(text)
    return results


def check_unpacked(folder: Path, manifest: Manifest) -> None:
    """Verify the parts that lie in ``folder``, and that the references hold what the manifest says.

    Raises ArchiveError naming a part.
    """
    again = "Unpack the package again."
    for name, digest in manifest.parts.items():
        path = path_inside(folder, name, "A part's name", ArchiveError)
        if path.is_symlink() or not path.is_file():
            raise ArchiveError(f"The part '{name}' is missing in {folder}.", again)
        if file_digest(path) != digest:
            raise ArchiveError(f"The part '{name}' in {folder} is altered.", again)
    _check_plan(folder, manifest)
    arrays = reference_arrays(folder, manifest.reference)
    for case in manifest.reference.cases:
        for name in manifest.reference.inputs:
            shape, expected = arrays[f"{case}/{name}"].shape, manifest.shapes[name]
            if not manifest.takes(name, shape[1:]) or not 1 <= shape[0] <= manifest.batches[2]:
                what = (
                    f"The reference '{case}' gives {name} the shape {shape}, not [N, {expected}]."
                )
                raise ArchiveError(what, "Package the run again.")


def _check_plan(folder: Path, manifest: Manifest) -> None:
    """Raise ArchiveError where the manifest expects other layers than the package's own plan has."""
    again = "Package the run again."
    values = read_json_object(folder / PLAN, error=ArchiveError, hint=again)
    try:
        manifest.check_plan(typed(dict[str, str], values.get("schemes")))
    except (ValueError, TypeError) as error:
        what = f"The part '{MANIFEST}' does not fit '{PLAN}': {printable(str(error))}."
        raise ArchiveError(what, again) from error


def probe(manifest: Manifest) -> Runtime:
    """Find what builds here and refuse a TensorRT that the package's dialect is not written for.

    Raises EngineError that names the version found, and the target to package for instead where one
    is known.
    """
    return runtime_for(manifest.target, manifest.alternatives)


def runtime_for(
    target: BuildTarget,
    alternatives: Mapping[str, tuple[str, ...]],
    what: str = "package",
    again: str = "Package the run again on the build machine: mpq-deploy package RUN",
) -> Runtime:
    """Find what builds for ``target`` here, as ``probe`` does; ``what`` is for it, and how to make it again."""
    runtime = _runtime(target.builder)
    if runtime is None:
        raise EngineError(
            f"The {what} is for {target.title}, but there is no {_needed(target.builder)} here.",
            "JetPack brings it in /usr/src/tensorrt/bin; for RTX targets: pip install tensorrt-rtx.",
        )
    if runtime.version and not target.takes_version(runtime.version):
        versions = " or ".join(f"{version.rstrip('.')}.x" for version in target.versions)
        release = f" (JetPack {target.jetpack})" if target.jetpack else ""
        remedy = (
            "No shipped target has that version; see 'mpq-deploy targets', or write a YAML for it."
        )
        for name, others in alternatives.items():
            if version_fits(runtime.version, others):
                remedy = f"{again} --target {name}."
                break
        raise EngineError(
            f"The {what} is written for TensorRT {versions}{release}, dialect "
            f"{target.dialect}; {runtime.builder} here is {runtime.version}.",
            remedy,
        )
    return runtime


def check_gpu(manifest: Manifest) -> None:
    """Refuse a GPU that the package is not for; without a GPU nothing is refused or run."""
    allowed = manifest.target.compute_capabilities
    if not allowed or why_no_gpu():
        return
    cuda = Cuda()
    capability = cuda.compute_capability()
    # A portable RTX engine holds kernels for the named GPUs; newer ones of the same runtime are
    # left to it.
    if capability not in allowed:
        raise EngineError(
            f"The package is for {', '.join(allowed)}; the GPU here is {cuda.name()} ({capability}).",
            "Package the run for this device's target (mpq-deploy targets lists them).",
        )


def check_memory(manifest: Manifest, force: bool) -> None:
    """Estimate what building takes, and refuse when less is available (where Linux says what is)."""
    needed = BUILD_FACTOR * manifest.expected.total_bytes + BUILD_BASE_BYTES
    room = memory_room()
    if room is None or force or room.bytes >= needed:
        return
    raise EngineError(
        f"Building is estimated to take {needed / 1e9:.1f} GB of memory, and {room}.",
        "Close other programs, or continue anyway with --force-memory.",
    )


def check_gpu_memory(manifest: Manifest, force: bool) -> None:
    """Refuse a GPU with less free memory than the engine is estimated to take."""
    if force or not manifest.needed_bytes or why_no_gpu():
        return
    cuda = Cuda()
    free = cuda.free_bytes()
    if free < manifest.needed_bytes:
        raise EngineError(
            f"The engine is estimated to take {manifest.needed_bytes / 1e9:.2f} GB at batch "
            f"{manifest.batches[2]}; {cuda.name()} has {free / 1e9:.2f} of "
            f"{cuda.total_bytes() / 1e9:.2f} GB free.",
            "Close other programs, package with a smaller engine.batch_max or budget, or continue with --force-memory.",
        )


def _runtime(builder: str) -> Runtime | None:
    """What builds here for ``builder``: trtexec and the Python package stand in for each other."""
    order = {"trtexec": ("trtexec", "tensorrt"), "tensorrt": ("tensorrt", "trtexec")}.get(
        builder, (builder,)
    )
    for name in order:
        if name == "trtexec":
            path = find_trtexec()
            if path is not None:
                return Runtime(name, trtexec_banner_version(path))
        elif name in BUILDERS and importlib.util.find_spec(name) is not None:
            return Runtime(name, _module_version(name))
    return None


def trtexec_banner_version(path: str) -> str:
    """The version that trtexec states in its first line; empty if there is none."""
    try:
        done = run_bounded([path, "--help"], seconds=BANNER_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    return trtexec_version(done.stdout + done.stderr)


def _module_version(name: str) -> str:
    """The version of an installed package, or (JetPack's own has no metadata) of the module."""
    try:
        return package_version(PACKAGES[name][0])
    except PackageNotFoundError:
        return str(getattr(importlib.import_module(name), "__version__", ""))


def _build(
    manifest: Manifest, runtime: Runtime, out: Path, talk: Talk, streams: bool
) -> EngineRecord:
    target = replace(manifest.target, builder=runtime.builder)
    profile = BatchProfile(*manifest.batches, manifest.shapes, manifest.least, manifest.usual)
    request = BuildRequest(out / manifest.model, target, profile, streams)
    return build_engine(request, out / ENGINE_FOLDER, manifest.expected, talk)


def _results(manifest: Manifest, record: EngineRecord, run: Run, out: Path) -> dict[str, Any]:
    reference = compare(run, manifest.reference, out)
    engine = asdict(record)
    del engine["timing"]
    return {
        "format": RESULTS_FORMAT,
        "made_by": __version__,
        "package": {
            "name": manifest.name,
            "manifest_sha256": file_digest(out / MANIFEST),
            "digests": manifest.digests,
        },
        "target": manifest.target.name,
        "dialect": manifest.target.dialect,
        "device": {
            "board": board(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "gpu": run.gpu,
            "compute_capability": run.compute_capability,
        },
        "engine": engine,
        "build": asdict(record.timing) if record.timing else None,
        "reference": reference,
        "latency": call_times(run.milliseconds) if run.milliseconds else None,
        "memory": {
            "weights_bytes": record.weights_bytes,
            "activation_bytes": record.activation_bytes,
            "taken_bytes": run.memory_bytes,
        },
        "passed": record.verified and reference["passed"] is not False,
    }


def board(path: Path = Path("/proc/device-tree/model")) -> str:
    """The board's name if the kernel knows it (Jetson); else empty."""
    return (
        path.read_text(errors="replace", encoding="utf-8").strip("\0\n ") if path.is_file() else ""
    )


def _needed(builder: str) -> str:
    if builder in ("trtexec", "tensorrt"):
        return "trtexec and no Python package tensorrt"
    return PACKAGES[builder][0] if builder in PACKAGES else builder


def summary(results: dict[str, Any], out: Path) -> str:
    """What is printed at the end."""
    if "components" in results:
        return whole_summary(results, out)
    engine, reference, times = results["engine"], results["reference"], results["latency"]
    wrong = [one for one in engine["problems"] if one["severity"] == "wrong"]
    layers = "as planned"
    if not engine["verified"]:
        layers = f"{len(wrong)} differ from the plan ({wrong[0]['message']})"
    worst = max((error for error in reference["cases"].values() if error is not None), default=None)
    if not reference["ran"]:
        numbers = f"not run: {reference['why']}"
    else:
        finite = worst is not None and None not in reference["cases"].values()
        shown = f"NMSE {worst:.2e}" if finite else "not finite"
        verdict = "agree" if reference["passed"] else "DIFFER"
        numbers = f"{verdict} ({shown}, allowed {reference['tolerance_nmse']:.2e})"
    speed = (
        f"{times['p50_ms']:.2f} ms median, {times['p99_ms']:.2f} ms p99"
        if times
        else "not measured"
    )
    rows = (
        ("engine", f"{out / ENGINE_FOLDER / engine['file']}, {engine['bytes']:,} bytes"),
        ("layers", layers),
        ("outputs", numbers),
        ("latency", speed),
        ("results", str(out / RESULTS)),
    )
    return "\n".join(f"{name:<9}{text}" for name, text in rows)


def default_out(archive: Path) -> Path:
    """The folder beside the archive, named after it."""
    name = archive.name.removesuffix(".tar").removesuffix(".mpq")
    return archive.parent / f"{name}.installed"


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    """The command line of ``python -m mpq_deploy.install``; return the exit code."""
    about = "Install a package of mpq-deploy on this device."
    parser = argparse.ArgumentParser(prog="mpq-install", description=about)
    option = parser.add_argument
    option("archive", type=Path, nargs="?", help="the .mpq.tar")
    option(
        "--unpacked",
        type=Path,
        metavar="FOLDER",
        help="a folder that tar unpacked the package into",
    )
    option(
        "-o", "--out", type=Path, help="the folder to install into (default: beside the archive)"
    )
    option("--sha256", help="the digest that the archive must have")
    option("--trust", metavar="PUBKEY", help="minisign's key that must have signed it")
    option(
        "--force-memory",
        action="store_true",
        help="build even if the estimate says that memory is too small",
    )
    option("--json", action="store_true", help="print results.json")
    chosen = parser.parse_args(arguments)
    archive = chosen.unpacked or chosen.archive
    if archive is None:
        parser.error("give the .mpq.tar, or --unpacked FOLDER")
    out = chosen.unpacked or chosen.out or default_out(archive)
    try:
        results = install(
            archive,
            out,
            PlainTalk(),
            chosen.force_memory,
            Trust(chosen.sha256, chosen.trust),
        )
    except (MpqError, OSError) as error:
        shown = error if isinstance(error, MpqError) else disk_error(error, out)
        hint = f"  {printable(shown.hint)}\n" if shown.hint else ""
        sys.stderr.write(f"mpq-install: {printable(shown.message)}\n{hint}")
        return shown.exit_code
    as_json = json.dumps(results, indent=1, sort_keys=True)
    write(f"{as_json if chosen.json else summary(results, out)}\n")
    return 0 if results["passed"] else 1
