"""An engine opened for running: execution context, runtime cache, CUDA graphs.

In: the library (tensorrt_rtx or tensorrt), an engine. Out: an ``OpenEngine``, for torch tensors
(``runtime.backends``) and for the device (``device.engine_runner``). Written after the 1.7 bindings
and NVIDIA's documents; not run on a GPU yet (docs/devices.md).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq_deploy.errors import EngineError
from mpq_deploy.system.inputs import read_json_object

RUNTIME_CACHE = "model.runtime-cache"
# What ``engine.builder`` writes beside an engine.
RECORD = "build.json"


@dataclass
class OpenEngine:
    """``cache`` is TensorRT-RTX's IRuntimeCache, None where the library has none.

    ``builtin_graphs``: the library captures CUDA graphs itself (TensorRT-RTX from 1.2).
    """

    engine: Any
    context: Any
    cache: Any
    cache_file: Path
    builtin_graphs: bool

    def keep_cache(self) -> None:
        """Write what the library compiled for this GPU beside the engine, for the next start.

        A folder that cannot be written is only a warning: the next start takes longer.
        """
        if self.cache is None:
            return
        aside = self.cache_file.with_name(f".{self.cache_file.name}.{os.getpid()}")
        try:
            aside.write_bytes(bytes(self.cache.serialize()))
            aside.replace(self.cache_file)
        except OSError as error:
            warnings.warn(
                f"The runtime cache {self.cache_file} cannot be written: {error.strerror}.",
                stacklevel=2,
            )


def refuse_other_gpu(engine: Path, capability: str) -> None:
    """Raise EngineError when the engine's record is for other GPUs than ``capability`` (SM87).

    Without a record (another tool's engine) the library decides.
    """
    record = _record(engine)
    allowed = record.get("compute_capabilities", ())
    if allowed and capability not in allowed:
        raise EngineError(
            f"{engine} is for {', '.join(allowed)} (target {record.get('target')}); the GPU here is {capability}.",
            "Build for this GPU's target: mpq-deploy targets lists them, mpq-deploy doctor says which fit.",
        )


def _record(engine: Path) -> dict[str, Any]:
    path = engine.with_name(RECORD)
    return read_json_object(path, error=EngineError) if path.is_file() else {}


def load_engine(trt: Any, logger: Any, path: Path) -> Any:
    """Return the deserialized engine; one that streams weights keeps on the GPU what the library proposes.

    Raises EngineError before the library sees it where its record has another digest, and where the
    library cannot load it on this GPU.
    """
    content, recorded = path.read_bytes(), _record(path).get("sha256")
    if recorded is not None and hashlib.sha256(content).hexdigest() != recorded:
        what = f"{path} is not the engine that {RECORD} beside it records."
        raise EngineError(what, "Build it again.")
    engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot load {path}.",
            "Engines run on the GPUs and the version they were built for: build it again here.",
        )
    # Of an engine that was built to stream its weights; unproven, no GPU was available.
    if getattr(engine, "streamable_weights_size", 0):
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return engine


def open_context(trt: Any, engine: Any, path: Path, graphs: bool = True) -> OpenEngine:
    """Make the execution context of ``engine`` (from ``path``), with the runtime cache beside it.

    The library refuses a cache of another GPU or version, compiles anew and replaces it.
    """
    kept = path.with_name(RUNTIME_CACHE)
    if not hasattr(engine, "create_runtime_config"):
        return OpenEngine(engine, engine.create_execution_context(), None, kept, False)
    config, cache = engine.create_runtime_config(), None
    if hasattr(config, "create_runtime_cache"):
        cache = config.create_runtime_cache()
        if kept.is_file() and not cache.deserialize(kept.read_bytes()):
            cache.reset()
        if not config.set_runtime_cache(cache):
            cache = None
    builtin = hasattr(trt, "CudaGraphStrategy")
    if builtin:
        strategies = trt.CudaGraphStrategy
        config.cuda_graph_strategy = (
            strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
        )
    context = engine.create_execution_context(config)
    if context is None:
        what = f"{trt.__name__} cannot create an execution context for {path}."
        raise EngineError(what, "Its log says why; it may lack memory.")
    return OpenEngine(engine, context, cache, kept, builtin)
