"""Try on a device which forms its TensorRT takes: build, look into the engine, run, time.

In: the folder of a probe (``delivery.probe_package``), with one small graph per form. Out:
``probe-results.json`` for 'mpq-deploy targets --take' on the build machine. Each form is built in
its own process, since some may crash the builder; finished forms are not repeated. Needs NumPy, and
trtexec or TensorRT's Python package.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpq_deploy.bench.statistics import call_times
from mpq_deploy.device.archive import ArchiveError
from mpq_deploy.device.installer import ENGINE_FOLDER, Runtime, board, runtime_for
from mpq_deploy.device.manifest import Reference
from mpq_deploy.device.output_check import compare
from mpq_deploy.device.run import Run, run_engine
from mpq_deploy.engine.build_target import BuildTarget
from mpq_deploy.engine.builder import BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.errors import EngineError, InputError, MpqError
from mpq_deploy.system.files import disk_error, file_digest, read_sealed, sealed_json, write_text
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.names import path_inside, plain_name, printable
from mpq_deploy.system.progress import PlainTalk, Talk
from mpq_deploy.system.release import __version__
from mpq_deploy.system.typed import typed

PROBE, RESULTS = "probe.json", "probe-results.json"
FORMAT, RESULTS_FORMAT = 1, 1
MODEL = "model.onnx"
# No form is started after that.
MINUTES = 20.0
RELEASE = Path("/etc/nv_tegra_release")
AGAIN = "Create the probe again: mpq-deploy probe."


@dataclass(frozen=True)
class ProbeForm:
    """One form: ``what`` it is, what its engine must hold (None: looked at, not compared), references.

    Its files lie in ``forms/NAME``. ``bytes``: of its constants.
    """

    name: str
    what: str
    expected: ExpectedLayers | None
    reference: Reference
    bytes: int


@dataclass(frozen=True)
class Probe:
    """What is tried, and for which target. ``digests``: path of every other part -> SHA-256.

    ``alternatives``: target -> versions of TensorRT on the same device.
    """

    made_by: str
    target: BuildTarget
    forms: tuple[ProbeForm, ...]
    digests: dict[str, str]
    alternatives: dict[str, tuple[str, ...]]

    def to_json(self) -> str:
        """Return JSON with sorted keys."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Probe:
        """Read the probe in ``folder``, its parts verified. Raises ArchiveError for another."""
        path = folder / PROBE
        values = read_json_object(path, error=ArchiveError, hint=AGAIN)
        try:
            if values.pop("format", None) != FORMAT:
                raise ValueError("it is of another format")
            probe = typed(cls, values)
            for form in probe.forms:
                plain_name(form.name, "A form's name")
        except (ValueError, MpqError) as error:
            raise ArchiveError(f"{path} cannot be used: {printable(str(error))}.", AGAIN) from error
        for name, digest in probe.digests.items():
            part = folder
            for piece in name.split("/"):
                part = path_inside(part, piece, "A part's name", ArchiveError)
            if part.is_symlink() or not part.is_file() or file_digest(part) != digest:
                raise ArchiveError(f"The part '{name}' of {folder} is missing or altered.", AGAIN)
        return probe


def run_probe(folder: Path, talk: Talk, minutes: float = MINUTES) -> dict[str, Any]:
    """Try every form of the probe in ``folder``; return what its results hold.

    Results of an earlier call with the same probe and builder are kept. Raises ArchiveError for a
    damaged probe, and EngineError where the device has another TensorRT than the target.
    """
    probe = Probe.load(folder)
    runtime = runtime_for(
        *(probe.target, probe.alternatives, "probe"),
        "Create another on the build machine: mpq-deploy probe",
    )
    started = time.monotonic()
    results = _begun(folder, probe, runtime)
    for form in probe.forms:
        if form.name in results["forms"]:
            continue
        if time.monotonic() - started > 60 * minutes:
            talk.warn(f"{minutes:g} minutes are over: run it again for the other forms")
            break
        talk.line(f"{form.name}: {form.what}")
        found, run = _try(probe.target, form, runtime, folder / "forms" / form.name)
        results["forms"][form.name] = found
        if run is not None and run.gpu:
            results["device"].update(gpu=run.gpu, compute_capability=run.compute_capability)
        write_text(folder / RESULTS, sealed_json(results))
    results["finished"] = len(results["forms"]) == len(probe.forms)
    write_text(folder / RESULTS, sealed_json(results))
    return results


def _begun(folder: Path, probe: Probe, runtime: Runtime) -> dict[str, Any]:
    """Return the results of an earlier call, or empty ones."""
    release = RELEASE.read_text(encoding="utf-8", errors="replace") if RELEASE.is_file() else ""
    fresh: dict[str, Any] = {
        "format": RESULTS_FORMAT,
        "made_by": __version__,
        "probe_sha256": file_digest(folder / PROBE),
        "target": probe.target.name,
        "dialect": probe.target.dialect,
        "builder": {"name": runtime.builder, "version": runtime.version},
        "device": {
            "board": printable(board()),
            "release": printable(release.strip().partition("\n")[0][:200]),
            "machine": platform.machine(),
            "gpu": "",
            "compute_capability": "",
        },
        "forms": {},
        "finished": False,
    }
    path = folder / RESULTS
    if not path.is_file():
        return fresh
    try:
        earlier = read_sealed(path)
    except InputError as error:
        raise InputError(error.message, f"Remove {path}, and every form is tried again.") from error
    same = all(earlier.get(key) == fresh[key] for key in ("probe_sha256", "builder", "made_by"))
    return dict(earlier) if same else fresh


def _try(
    target: BuildTarget, form: ProbeForm, runtime: Runtime, folder: Path
) -> tuple[dict[str, Any], Run | None]:
    """Build, verify, run and time one form; return its results."""
    found: dict[str, Any] = {
        **{"built": False, "error": "", "verified": None, "problems": [], "kernels": {}},
        **{"weights_bytes": None, "constant_bytes": form.bytes, "build_seconds": None},
        **{"reference": None, "latency": None},
    }
    started = time.monotonic()
    request = BuildRequest(
        folder / MODEL, replace(target, builder=runtime.builder), BatchProfile(1, 1, 1, {})
    )
    expected = form.expected or ExpectedLayers((), form.bytes)
    try:
        record = build_engine(request, folder / ENGINE_FOLDER, expected, Talk())
    except MpqError as error:
        return {**found, "error": printable(error.message)[:500]}, None
    found.update(built=True, build_seconds=round(time.monotonic() - started, 1))
    found.update(_contents(record, form))
    try:
        engine = folder / ENGINE_FOLDER / record.file
        run = run_engine(runtime.builder, engine, folder, form.reference)
    except EngineError as error:
        why = printable(error.message)[:500]
        reference = {"ran": False, "why": why, "passed": False, "cases": {}}
        return {**found, "reference": reference}, None
    found["reference"] = compare(run, form.reference, folder)
    found["latency"] = call_times(run.milliseconds) if run.milliseconds else None
    return found, run


def _contents(record: EngineRecord, form: ProbeForm) -> dict[str, Any]:
    problems = [asdict(one) for one in record.problems]
    return {
        "verified": record.verified if form.expected is not None else None,
        "problems": problems if form.expected is not None else [],
        "kernels": record.kernels,
        "weights_bytes": record.weights_bytes,
    }


def summary(results: dict[str, Any]) -> str:
    """Return a line for each form."""
    lines = []
    for name, form in results["forms"].items():
        if not form["built"]:
            said = f"refused: {form['error'][:50]}"
        elif form["verified"] is False:
            said = "built, but not as planned"
        else:
            slow = any(one["severity"] == "slow" for one in form["problems"])
            said = "built, unpacked at each call" if slow else "built as planned"
            if form["verified"] is None:
                said = "built"
            reference = form["reference"] or {}
            ran = {True: ", outputs agree", False: ", outputs DIFFER", None: ", not run"}
            said += ran[reference.get("passed")]
        lines.append(f"{name:<28}{said}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    """The command line of probe.pyz; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="probe.pyz", description="Try which forms this device's TensorRT takes."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--minutes", type=float, default=MINUTES, help="start no form after that")
    chosen = parser.parse_args(arguments)
    try:
        results = run_probe(chosen.folder, PlainTalk(), chosen.minutes)
    except (MpqError, OSError) as error:
        shown = error if isinstance(error, MpqError) else disk_error(error, chosen.folder)
        hint = f"  {printable(shown.hint)}\n" if shown.hint else ""
        sys.stderr.write(f"probe: {printable(shown.message)}\n{hint}")
        return shown.exit_code
    write(f"{summary(results)}\nresults  {chosen.folder / RESULTS}\n")
    return 0 if results["finished"] else 1
