"""What is timed, from files: an engine or an ONNX graph, and what it is compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpq_deploy.bench.timed_subject import BACKENDS, LIBRARIES, ORT, Subject
from mpq_deploy.device.cuda import why_no_gpu
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.errors import UsageError, nearest

ENGINES = (".engine", ".plan", ".trt")


@dataclass(frozen=True)
class Wish:
    """The user's wishes; ``backend`` and ``device`` "auto" take the GPU where one can run the file."""

    backend: str = "auto"
    device: str = "auto"
    batch: int = 1
    threads: int = 0
    graphs: bool = True
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        backends, devices = ("auto", *BACKENDS), ("auto", "cpu", "cuda")
        for value, known in ((self.backend, backends), (self.device, devices)):
            if value not in known:
                raise UsageError(
                    f"'{value}' is not one of {', '.join(known)}.", nearest(value, known)
                )
        if self.batch < 1 or self.threads < 0:
            raise UsageError(f"Invalid batch {self.batch} or number of threads {self.threads}.")


def subject_of(file: Path, name: str, wish: Wish) -> Subject:
    """Return how ``file`` is run here. Raises UsageError for a file that nothing here can run."""
    if not file.is_file():
        raise UsageError(f"There is no {file}.", "Give a run folder, an engine, or an ONNX file.")
    if file.suffix in ENGINES:
        return _engine(file, name, wish)
    if file.suffix != ".onnx":
        raise UsageError(
            f"{file} is neither an .onnx nor an .engine file.",
            "Give one of these, or a run folder.",
        )
    if wish.backend not in ("auto", ORT):
        what = f"{file} is a graph: {wish.backend} runs engines."
        raise UsageError(what, "Build one, or give --backend onnxruntime.")
    device = (
        "cuda" if wish.device == "cuda" or (wish.device == "auto" and cuda_provider()) else "cpu"
    )
    # As mpq_deploy.load: integer kernels of some CPUs saturate, which no target does.
    return Subject(
        name,
        str(file.resolve()),
        ORT,
        device,
        wish.batch,
        wish.threads,
        device == "cpu",
        False,
        wish.shapes,
    )


def _engine(file: Path, name: str, wish: Wish) -> Subject:
    why = why_no_gpu()
    if why or wish.device == "cpu" or wish.backend == ORT:
        raise UsageError(
            f"The engine {file} cannot be timed: {why or 'an engine runs on a GPU, by TensorRT'}.",
            "Time the graph it was built from in ONNX Runtime instead, which says nothing about the engine.",
        )
    library = wish.backend if wish.backend in LIBRARIES else library_of(file)
    return Subject(
        name, str(file.resolve()), library, "cuda", wish.batch, 0, False, wish.graphs, wish.shapes
    )


def library_of(engine: Path) -> str:
    """Which Python package runs ``engine``: by its record, else whichever is installed."""
    record = EngineRecord.beside(engine)
    if record is not None:
        return "tensorrt_rtx" if record.backend == "tensorrt_rtx" else "tensorrt"
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    if not installed:
        what = "Neither tensorrt_rtx nor tensorrt is installed here."
        raise UsageError(what, "Install what built the engine.")
    return installed[0]


def cuda_provider() -> bool:
    """Whether ONNX Runtime here runs on CUDA."""
    if why_no_gpu() or importlib.util.find_spec(ORT) is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read NAME:1x4x64x64. Raises UsageError."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        if not name or not all(one.isdecimal() and int(one) for one in sizes.split("x")):
            what = f"'{text}' is not the shape of an input."
            raise UsageError(what, "Write for example --shape sample:1x4x64x64.")
        shapes[name] = tuple(int(one) for one in sizes.split("x"))
    return shapes
