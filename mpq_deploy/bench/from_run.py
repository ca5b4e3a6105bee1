"""What of a run is timed here: the engine where a GPU can run it, else its graph.

Ours is compared with the model without quantization: the float export on a CPU, the FP16 graph on
CUDA, an FP16 engine of the same builder. The last two are made in ``RUN/bench`` and kept until the
export changes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.bench.bench import Origin
from mpq_deploy.bench.sources import Wish, cuda_provider, library_of, subject_of
from mpq_deploy.bench.timed_subject import ORT, Subject
from mpq_deploy.engine.builder import ENGINE, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.plan_engine import batch_profile
from mpq_deploy.engine.target import Target
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.scheme import FP16
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.save import widened_bytes
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    write_quantized,
)
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

FOLDER, STAMP = "bench", "made-from"


def subjects_of(run: Run, wish: Wish) -> tuple[list[Subject], Origin]:
    """Return ours, the float model's, and their origin; UsageError where nothing runs here."""
    stage = run.deployed_stage
    quantized, target = run.stage(stage), run.target
    digests = {"allocate": run.digest("allocate"), "quantize": run.digest(stage)}
    engine = run.path / "engine" / ENGINE
    name, spec = run.exported.spec.name, run.exported.spec
    if spec.sizes:
        first = {spec.sample.name: (wish.batch, *spec.at_size(0).sample.shape)}
        wish = replace(wish, shapes={**first, **wish.shapes})
    if _takes_engine(engine, wish):
        files = {"ours": engine, "FP16": fp16_engine(run, target)}
        origin = Origin(name, target.name, target.dialect, digests)
    elif wish.device == "cuda" or (wish.device == "auto" and cuda_provider()):
        files = {"ours": quantized / DEPLOYED, "FP16": fp16_graph(run, target)}
        origin = Origin(name, "onnxruntime-cuda", ORT, digests)
    else:
        files = {"ours": quantized / SIMULATED, "float": run.exported.path}
        origin = Origin(name, "onnxruntime-cpu", ORT, digests)
        wish = replace(wish, device="cpu")
    return [subject_of(file, label, wish) for label, file in files.items()], origin


def _takes_engine(engine: Path, wish: Wish) -> bool:
    if wish.backend == ORT or wish.device == "cpu":
        return False
    if wish.backend != "auto" and not engine.is_file():
        raise UsageError(
            f"There is no engine at {engine}.", "Build it, or give --backend onnxruntime."
        )
    if not engine.is_file():
        return False
    try:
        subject_of(engine, "ours", wish)
    except UsageError:
        if wish.backend != "auto":
            raise
        return False
    import importlib.util

    return importlib.util.find_spec(library_of(engine)) is not None


def fp16_graph(run: Run, target: Target) -> Path:
    """Write the FP16 graph without quantization, once per export; return its path."""
    folder = run.path / FOLDER / "fp16"
    stamp = f"{run.digest('export')} {run.digest('calibrate')} {target.dialect}"
    if not _current(folder, stamp):
        exported = run.exported
        folder.mkdir(parents=True, exist_ok=True)
        rewrites = [LayerRewrite(layer, FP16, None) for layer in exported.graph.layers]
        spec, dialect = exported.spec, dialect_named(target.dialect)
        beyond = run.calibration.beyond_fp16
        names = spec.timestep_name, spec.sample.name
        source = FloatGraph(exported.path, *names, beyond_fp16=beyond)
        write_quantized(source, rewrites, {}, folder, dialect)
        (folder / SIMULATED).unlink()
        (folder / STAMP).write_text(stamp, encoding="utf-8")
    return folder / DEPLOYED


def fp16_engine(run: Run, target: Target) -> Path:
    """Build the engine of the FP16 graph, once per export and target; return its path."""
    graph = fp16_graph(run, target)
    folder = run.path / FOLDER / f"fp16-{target.name}"
    stamp = (graph.parent / STAMP).read_text(encoding="utf-8")
    if not _current(folder, stamp):
        layers = run.exported.graph.layers
        schemes = {layer.name: FP16 for layer in layers}
        size = run.plan.fp16_size_bytes
        expected = ExpectedLayers.of(layers, schemes, size, widened_bytes=widened_bytes(graph))
        request = BuildRequest(graph, target.build_target, batch_profile(run))
        build_engine(request, folder, expected, run.talk)
        (folder / STAMP).write_text(stamp, encoding="utf-8")
    return folder / ENGINE


def _current(folder: Path, stamp: str) -> bool:
    path = folder / STAMP
    return path.is_file() and path.read_text(encoding="utf-8") == stamp
