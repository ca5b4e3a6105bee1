"""The child process that builds one engine: ``python -m mpq_deploy.engine.build_worker job.json``.

In: a job file (``BuildJob``). Out: the serialized engine, the builder's verbose log (one message
per line that starts with its severity), and ``result``: a JSON object with the version, or the
errors. The builder may crash this process (several graph forms do); the parent reads the log up to
that point and reports it.

Only the standard library and the builder's own package are needed, so that this file also runs on a
device.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mpq_deploy.system.children import orders_from_parent
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.memory import peak_rss_bytes
from mpq_deploy.system.typed import typed

# A parser or build failure that was reported in ``result``, as opposed to a crash (negative return
# code).
REPORTED_FAILURE = 3
# A file could not be written: the last line of stderr is "ERRNO message".
DISK_FAILURE = 4


@dataclass(frozen=True)
class InputShapes:
    """The minimum, the usual and the maximum shape of one input: the optimization profile."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


@dataclass(frozen=True)
class BuildJob:
    """What one child process is to build. Paths are absolute."""

    module: str
    model: str
    engine: str
    log: str
    result: str
    compute_capabilities: tuple[str, ...] = ()
    shapes: dict[str, InputShapes] = field(default_factory=dict)
    workspace_bytes: int | None = None
    streams_weights: bool = False

    def save(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> BuildJob:
        """Read what ``save`` wrote."""
        return typed(cls, read_json_object(path))


class BuildFailedError(Exception):
    """The parser or the builder refused the graph; ``errors`` are its own messages, one per node."""

    def __init__(self, stage: str, errors: list[dict[str, str]]) -> None:
        super().__init__(stage)
        self.stage, self.errors = stage, errors


def make_logger(trt: Any, stream: TextIO, problems: list[str], unwritten: list[OSError]) -> Any:
    """Return a logger that writes every message to ``stream`` at once and gathers the errors.

    Errors of writing go to ``unwritten``: an exception that passes through the builder crashes it.
    """

    class FileLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if not unwritten:
                try:
                    stream.write(f"[{severity.name}] {message}\n")
                    stream.flush()
                except OSError as error:
                    unwritten.append(error)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                problems.append(message)

    return FileLogger()


def build(trt: Any, job: BuildJob, logger: Any, problems: list[str]) -> memoryview:
    """Parse, configure and build; return the serialized engine. Raises BuildFailedError."""
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.model):
        raise BuildFailedError("parse", _parser_errors(parser) or _plain(problems))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.streams_weights:
        flag = getattr(trt.BuilderFlag, "WEIGHT_STREAMING", None)
        if flag is None:
            raise BuildFailedError("configure", _plain(["it has no weight streaming"]))
        config.set_flag(flag)
    set_capabilities(trt, config, job.compute_capabilities)
    _add_profile(builder, config, network, job)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildFailedError("build", _plain(problems))
    return memoryview(engine)


def set_capabilities(trt: Any, config: Any, names: tuple[str, ...]) -> None:
    """Say which GPUs TensorRT-RTX builds for; others have no such option and build for the GPU here."""
    kinds = getattr(trt, "ComputeCapability", None)
    if kinds is None or not names:
        return
    known = sorted((n for n in dir(kinds) if n.startswith("SM")), key=lambda n: int(n[2:]))
    unknown = [name for name in names if name not in known]
    if unknown:
        message = f"it builds nothing for {', '.join(unknown)}, only for {', '.join(known)}"
        raise BuildFailedError("configure", _plain([message]))
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(kinds, name), index)


def layer_information(trt: Any, engine: memoryview, logger: Any) -> str:
    """Ask TensorRT proper what it built, as JSON (needs a GPU). Unproven here."""
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        raise BuildFailedError("inspect", _plain(["the engine cannot be loaded"]))
    inspector = loaded.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _network_flags(trt: Any) -> int:
    """Strongly typed wherever the flag exists; TensorRT 11 is always, and may drop it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_errors(parser: Any) -> list[dict[str, str]]:
    names = {"node": "node_name", "operator": "node_operator", "message": "desc"}
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [{key: str(getattr(e, name)()) for key, name in names.items()} for e in errors]


def _plain(problems: list[str]) -> list[dict[str, str]]:
    return [{"node": "", "operator": "", "message": message} for message in problems]


def _add_profile(builder: Any, config: Any, network: Any, job: BuildJob) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor for tensor in inputs if any(size < 0 for size in tensor.shape)]
    if not dynamic:
        return
    missing = [tensor.name for tensor in dynamic if tensor.name not in job.shapes]
    if missing:
        message = f"no shape is given for the dynamic inputs {', '.join(missing)}"
        raise BuildFailedError("profile", _plain([message]))
    profile = builder.create_optimization_profile()
    for tensor in dynamic:
        shapes = job.shapes[tensor.name]
        profile.set_shape(tensor.name, shapes.minimum, shapes.optimum, shapes.maximum)
    config.add_optimization_profile(profile)


def main(arguments: list[str]) -> int:
    """Build the job named on the command line; return the exit code."""
    # If the parent is gone, nobody needs the engine, and the next build writes the same log.
    orders_from_parent()
    job = BuildJob.load(Path(arguments[0]))
    trt = importlib.import_module(job.module)
    result: dict[str, Any] = {"version": trt.__version__}
    try:
        _build_and_save(trt, job, result)
    except OSError as error:
        sys.stderr.write(f"{error.errno} {error.strerror}\n")
        return DISK_FAILURE
    return REPORTED_FAILURE if "errors" in result else 0


def _build_and_save(trt: Any, job: BuildJob, result: dict[str, Any]) -> None:
    """Write the engine, the log and ``result``, to which the outcome is added. Raises OSError."""
    problems: list[str] = []
    unwritten: list[OSError] = []
    started = time.monotonic()
    with Path(job.log).open("w", encoding="utf-8") as stream:
        try:
            logger = make_logger(trt, stream, problems, unwritten)
            engine = build(trt, job, logger, problems)
            if not unwritten:
                Path(job.engine).write_bytes(engine)
            if job.module != "tensorrt_rtx":
                result["layer_information"] = layer_information(trt, engine, logger)
        except BuildFailedError as failure:
            result.update(stage=failure.stage, errors=failure.errors)
    if unwritten:
        raise unwritten[0]
    result["seconds"] = time.monotonic() - started
    result["peak_rss_bytes"] = peak_rss_bytes()
    Path(job.result).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
