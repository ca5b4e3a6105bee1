"""Build an engine from an ONNX file in a child process, and check it against the plan.

In: a ``BuildRequest`` and what the plan promises. Out: a folder with ``model.engine``,
``layers.txt`` (the builder's own list of kernels) and ``build.json`` (an ``EngineRecord``), the
same bytes when repeated; the full log and the time taken lie outside of it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

from mpq_deploy.engine.build_log import EngineLog, layers_text, parse_engine_log
from mpq_deploy.engine.build_target import BUILDERS, BuildTarget
from mpq_deploy.engine.build_worker import DISK_FAILURE, REPORTED_FAILURE, BuildJob, InputShapes
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.failure import (
    FAULTS,
    BuilderCrashedError,
    crashed,
    fatal_signal,
    located,
    refused,
)
from mpq_deploy.engine.layer_information import parse_layer_information
from mpq_deploy.engine.product_kernels import product_kernels
from mpq_deploy.engine.record import RECORD, BuildTiming, EngineRecord
from mpq_deploy.engine.trtexec import (
    BUILD_SECONDS,
    LAYERS_BYTES,
    build_with_trtexec,
    trtexec_trial,
)
from mpq_deploy.engine.verify import verify
from mpq_deploy.errors import EngineError, MissingDependencyError, UsageError
from mpq_deploy.system.children import run_child
from mpq_deploy.system.files import file_digest, sealed_json
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.progress import Talk

ENGINE, LAYERS = "model.engine", "layers.txt"
# Prefix of the folder of a running build; the process id follows.
BUILDING = ".build-"
# What a child process runs.
WORKER = "mpq_deploy.engine.build_worker"
# The file that ``bisect`` writes its smaller graphs to.
TRIAL = "trial.onnx"
# Seconds for one build of the search; a longer one counts as not crashed (our choice).
TRIAL_SECONDS = 300.0
# Module -> the package that has it, and our extra that installs it.
PACKAGES = {"tensorrt_rtx": ("tensorrt-rtx", "rtx"), "tensorrt": ("tensorrt", "tensorrt")}


@dataclass(frozen=True)
class BatchProfile:
    """The engine's minimum, usual and maximum batch; each input's shape without the batch axis.

    ``least`` and ``usual``: of inputs of several sizes the smallest and the usual shape, where
    ``shapes`` has the largest.
    """

    minimum: int
    optimum: int
    maximum: int
    shapes: Mapping[str, tuple[int, ...]]
    least: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    usual: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise UsageError(
                f"Invalid batch sizes {self.minimum}, {self.optimum}, {self.maximum} of the engine.",
                "They must be ascending: 1 <= batch_min <= batch_opt <= batch_max.",
            )

    def inputs(self) -> dict[str, InputShapes]:
        """Return the whole shapes, batch axis first."""
        return {
            name: InputShapes(
                (self.minimum, *self.least.get(name, shape)),
                (self.optimum, *self.usual.get(name, shape)),
                (self.maximum, *shape),
            )
            for name, shape in self.shapes.items()
        }


@dataclass(frozen=True)
class BuildRequest:
    """What is built: the graph ``model`` (FP16), for which target, and at which batch sizes.

    ``streams_weights``: so that its weights may stay in host memory (by a Python package alone).
    """

    model: Path
    target: BuildTarget
    profile: BatchProfile
    streams_weights: bool = False


@dataclass(frozen=True)
class RawBuild:
    """What a backend returns: its version, the engine's log, and what it took."""

    version: str
    log: EngineLog
    layers: str
    timing: BuildTiming


def build_engine(
    request: BuildRequest, out: Path, expected: ExpectedLayers, talk: Talk, log: Path | None = None
) -> EngineRecord:
    """Build the engine into the folder ``out``, and check it against ``expected``.

    The builder's full log goes to ``log`` (default: beside ``out``, named after it), also when the
    build fails, and the time taken to the file of the same name that ends in .timing.json. Problems
    are warned of and kept in the record; ``EngineRecord.require_verified`` turns them into an
    error.

    Raises UsageError when the target has no builder, MissingDependencyError when the builder is not
    installed, EngineError when it refuses the graph, crashes or is killed, and OSError when its
    files cannot be written.
    """
    log = log or out.with_name(f"{out.name.strip('.')}.log")
    target = request.target
    backend = _backend(target)
    out.mkdir(parents=True, exist_ok=True)
    talk.line(f"building the engine for {target.name} with {target.builder}")
    _remove_leftovers(out)
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{BUILDING}{os.getpid()}-") as folder:
        built = Path(folder) / ENGINE
        try:
            raw = backend(request, built.resolve(), log.resolve())
        except BuilderCrashedError as crash:
            raise _located(crash, request, Path(folder), talk) from crash
        record = _record(built, target, raw, expected)
        built.replace(out / ENGINE)
    (out / LAYERS).write_text(raw.layers, encoding="utf-8")
    log.with_suffix(".timing.json").write_text(sealed_json(asdict(raw.timing)), encoding="utf-8")
    record.save(out / RECORD)
    for problem in record.problems:
        talk.warn(str(problem))
    return record


def _remove_leftovers(out: Path) -> None:
    """Remove what builds that were killed have left in ``out`` (where the system lists processes)."""
    for left in out.glob(f"{BUILDING}*"):
        process = left.name.removeprefix(BUILDING).partition("-")[0]
        if Path("/proc/self").exists() and not Path("/proc", process).exists():
            shutil.rmtree(left, ignore_errors=True)


Backend = Callable[[BuildRequest, Path, Path], RawBuild]


def _backend(target: BuildTarget) -> Backend:
    if target.builder == "none":
        raise UsageError(
            f"The target '{target.name}' has no engine builder: ONNX Runtime runs the graph itself.",
            "Leave the engine stage out, or choose a target with a builder (mpq-deploy targets).",
        )
    if target.builder == "trtexec":
        return _build_trtexec
    if target.builder not in PACKAGES:
        raise UsageError(
            f"'{target.builder}' is not a builder.", f"Builders: {', '.join(BUILDERS)}."
        )
    if importlib.util.find_spec(target.builder) is None:
        purpose = f"Building an engine for '{target.name}'"
        raise MissingDependencyError(*PACKAGES[target.builder], purpose)
    return _build_in_child


def _build_trtexec(request: BuildRequest, engine: Path, log: Path) -> RawBuild:
    """Unproven here: written against the documented command line (no device was available)."""
    model, shapes = request.model.resolve(), request.profile.inputs()
    version, layers, timing = build_with_trtexec(model, engine, request.target, shapes, log)
    text = log.read_text(encoding="utf-8")
    return RawBuild(version, parse_layer_information(layers, text), layers, timing)


def _build_in_child(request: BuildRequest, engine: Path, log: Path) -> RawBuild:
    _check_version(request.target)
    job_file, result = _save_job(request, engine, log)
    # The last lines of an earlier build are not those of this one.
    log.unlink(missing_ok=True)
    try:
        done = run_child(WORKER, str(job_file), seconds=BUILD_SECONDS)
    except subprocess.TimeoutExpired as error:
        what = f"The builder was stopped after {BUILD_SECONDS / 3600:.0f} hours."
        raise EngineError(what, f"Log: {log}") from error
    if done.returncode == DISK_FAILURE:
        code, _, text = done.stderr.splitlines()[-1].partition(" ")
        raise OSError(int(code), text, str(engine))
    if done.stderr and log.is_file():
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"[stderr] {done.stderr}")
    if done.returncode not in (0, REPORTED_FAILURE):
        raise crashed(request.model, log, done.returncode, done.stderr)
    values = read_json_object(result, limit=LAYERS_BYTES, error=EngineError)
    if "errors" in values:
        raise refused(values, request.target.builder, log)
    text = log.read_text(encoding="utf-8")
    timing = BuildTiming(round(values["seconds"], 3), values["peak_rss_bytes"])
    if "layer_information" in values:
        layers = values["layer_information"]
        return RawBuild(values["version"], parse_layer_information(layers, text), layers, timing)
    return RawBuild(values["version"], parse_engine_log(text), layers_text(text), timing)


def _save_job(request: BuildRequest, engine: Path, log: Path) -> tuple[Path, Path]:
    """Write the child's job; return the job's file and where its result will be."""
    job_file, result = engine.with_name("job.json"), engine.with_name("result.json")
    BuildJob(
        module=request.target.builder,
        model=str(request.model.resolve()),
        engine=str(engine),
        log=str(log),
        result=str(result),
        compute_capabilities=request.target.compute_capabilities,
        shapes=request.profile.inputs(),
        streams_weights=request.streams_weights,
    ).save(job_file)
    return job_file, result


def _located(
    crash: BuilderCrashedError, request: BuildRequest, folder: Path, talk: Talk
) -> EngineError:
    """Look for the nodes that crash the builder, where graphs can be cut (a device has no onnx)."""
    if importlib.util.find_spec("onnx") is None:
        return crash
    from mpq_deploy.engine.bisect import MAX_TRIALS, find_suspects

    trials = folder / "trials"
    trials.mkdir()
    if request.target.builder == "trtexec":
        run = partial(trtexec_trial, shapes=request.profile.inputs(), seconds=TRIAL_SECONDS)
    else:
        trial = replace(request, model=trials / TRIAL)
        job_file, _ = _save_job(trial, trials / ENGINE, trials / "trial.log")
        run = partial(_trial, job_file)

    def crashes(graph: Path) -> bool:
        return fatal_signal(run(graph)) in FAULTS

    talk.line(
        f"the builder crashed; searching for the nodes with up to {MAX_TRIALS} smaller builds"
    )
    return located(crash, find_suspects(request.model, trials, crashes))


def _trial(job_file: Path, graph: Path) -> int:
    """Build the graph that ``job_file`` names; return the child's exit code, 0 after a timeout."""
    assert graph.name == TRIAL
    try:
        return run_child(WORKER, str(job_file), seconds=TRIAL_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return 0


def _check_version(target: BuildTarget) -> None:
    """Refuse a builder of a version that the target's dialect was not written for."""
    try:
        version = package_version(target.builder)
    except PackageNotFoundError:
        return  # installed without metadata (JetPack's own): the worker's result names the version
    if not target.takes_version(version):
        raise EngineError(
            f"The target '{target.name}' is for {target.builder} {' or '.join(target.versions)}; "
            f"{version} is installed.",
            "Choose the target of that version (mpq-deploy targets), or extend it in a YAML with 'versions: []'.",
        )


def _record(
    engine: Path, target: BuildTarget, raw: RawBuild, expected: ExpectedLayers
) -> EngineRecord:
    problems = tuple(verify(raw.log, expected))
    return EngineRecord(
        target=target.name,
        backend=target.builder,
        version=raw.version,
        file=ENGINE,
        sha256=file_digest(engine),
        bytes=engine.stat().st_size,
        weights_bytes=raw.log.weights_bytes,
        activation_bytes=raw.log.activation_bytes,
        planned_bytes=expected.total_bytes,
        kernels=raw.log.summary(),
        verified=not any(problem.severity == "wrong" for problem in problems),
        problems=problems,
        compute_capabilities=target.compute_capabilities,
        products=product_kernels(raw.log, expected),
        timing=raw.timing,
    )
