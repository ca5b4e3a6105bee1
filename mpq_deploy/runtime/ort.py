"""A denoiser run by ONNX Runtime: NumPy arrays in, NumPy float32 out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from mpq_deploy.device.lora_inputs import is_slot
from mpq_deploy.errors import ModelError, UsageError, nearest
from mpq_deploy.graph.load import (
    external_files,
    inline_sizes,
    parse_proto,
    read_proto,
)
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec
from mpq_deploy.runtime.fused_attention import fused_proto
from mpq_deploy.system.compute import (
    CPU_PROVIDER,
    CUDA,
    CUDA_PROVIDER,
    Provider,
    computing_on,
    free_cached_memory,
    out_of_memory,
    say_once,
    start_session,
)
from mpq_deploy.system.hub_cache import hub_blobs
from mpq_deploy.system.lanes import lanes_for
from mpq_deploy.system.memory import memory_room
from mpq_deploy.system.threads import may_spin, runtime_threads

# All errors that ONNX Runtime raises for a model it cannot run; they share no base class.
ORT_ERRORS = tuple(
    error
    for error in vars(ort.capi.onnxruntime_pybind11_state).values()
    if isinstance(error, type) and issubclass(error, Exception)
)
# Those of a run. By a binding, as on every GPU, its errors come as Python's own.
RUN_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, RuntimeError)
ERROR_SEVERITY = 3
# Older versions, such as the last for Python 3.10, fuse pairs of FP8 into kernels for integers, which
# fail or compute something else: their pairs stay as written.
VERSION = tuple(int(part) for part in ort.__version__.split(".")[:2])
FUSES_FP8 = (1, 32)
FP8 = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2)
# The folder that names of external files count from where a session is made from bytes (ONNX
# Runtime's onnxruntime_session_options_config_keys.h).
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# From so many bytes of weights on, sessions on the CPU leave them where the file is mapped (our
# choice: smaller models run faster with weights in the layout of each kernel, which are copies).
LARGE_WEIGHTS_BYTES = 1 << 30
# Opening a quantized graph that is dequantized at once takes so many times its weights in float (over 2.15, seen).
FOLD_COPIES = 3
# A session's copies of smaller weights, in the layouts of its kernels, beside the mapped ones
# (fitted to peaks).
SESSION_COPIES = 0.5
# Its arena grows by steps, so it holds more than lives at once; less more where the graph ends in
# gathered rows.
ARENA_SHARE, HESSIAN_ARENA_SHARE = 1.5, 1.2


def session_options(threads: int = 0, fake_quant_only: bool = False) -> ort.SessionOptions:
    """Return the options under which every graph of this package is run.

    ``threads`` 0 takes one per physical core (``runtime.threads``). MatMul with 4- or 8-bit weights
    must not quantize its activations on its own (accuracy level 0: the default costs 5e-3 of
    accuracy); ``fake_quant_only`` keeps Q/DQ pairs as they are written, in float arithmetic,
    instead of fusing them into integer kernels.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or runtime_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = ERROR_SEVERITY
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if not may_spin():
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if fake_quant_only:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def spare_memory(options: ort.SessionOptions) -> None:
    """Make a session use its weights as they are mapped from the file, without copies."""
    # The level above brings the weights of convolutions into blocks of channels.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_prepacking", "1")


def dequantize_in_turn(options: ort.SessionOptions) -> None:
    """Make a session dequantize each weight in every run, and hold none of them in float before or after."""
    spare_memory(options)
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    # The arena would keep areas for weights of every size.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False


def _dequantized_bytes(proto: onnx.ModelProto) -> int:
    """Return the bytes in float32 of the constants that the graph dequantizes."""
    read = {node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    return sum(4 * prod(one.dims) for one in proto.graph.initializer if one.name in read)


def session_for_few_calls(model: Path) -> ort.InferenceSession:
    """Open ``model`` on the CPU for few calls, which check it: memory of live values, freed with the session."""
    options = session_options()
    # The arena grows by half each time, and each size of calls has an area of its own beside it.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return make_session_with(model, options, [CPU_PROVIDER])


def make_session(
    model: Path | bytes,
    threads: int = 0,
    providers: Sequence[Provider] | None = None,
    fake_quant_only: bool = False,
) -> ort.InferenceSession:
    """Open ``model`` (a file, or bytes without external data), checked, by default on the compute device.

    Raises ModelError for a file that is truncated, not ONNX, has data outside its folder, or that
    ONNX Runtime refuses; UsageError for an unknown execution provider.
    """
    return make_session_with(model, session_options(threads, fake_quant_only), providers)


def make_session_with(
    model: Path | bytes, options: ort.SessionOptions, providers: Sequence[Provider] | None = None
) -> ort.InferenceSession:
    """Open ``model`` as ``make_session`` does, under the given options."""
    chosen = computing_on().providers if providers is None else providers
    names = [provider if isinstance(provider, str) else provider[0] for provider in chosen]
    source: str | bytes = model if isinstance(model, bytes) else str(model.resolve())
    if isinstance(model, bytes):
        proto = parse_proto(model, "The model in memory")
        source = (fused_proto(proto) if names == [CPU_PROVIDER] else None) or model
    else:
        proto = read_proto(model)
        files = external_files(proto, model)
        inlined = inline_sizes(proto, model)
        if files and (inlined or hub_blobs(model) is not None):
            # Shape inference reads no external data, and links into the hub's cache lead to files of
            # other names than the model's own text says.
            source = proto.SerializeToString()
            options.add_session_config_entry(WEIGHTS_FOLDER, str(model.resolve().parent))
        on_cpu = names == [CPU_PROVIDER]
        fused = fused_proto(proto) if on_cpu else None
        if fused is not None:
            source = fused
            options.add_session_config_entry(WEIGHTS_FOLDER, str(model.resolve().parent))
        if on_cpu and sum(file.stat().st_size for file in files) >= LARGE_WEIGHTS_BYTES:
            spare_memory(options)
        room, wide = memory_room(), _dequantized_bytes(proto) if on_cpu else 0
        if wide >= LARGE_WEIGHTS_BYTES and room is not None and not room.holds(FOLD_COPIES * wide):
            dequantize_in_turn(options)
    if VERSION < FUSES_FP8 and any(one.data_type in FP8 for one in proto.graph.initializer):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    available = ort.get_available_providers()
    for provider in names:
        if provider not in available:
            raise UsageError(
                f"ONNX Runtime has no execution provider '{provider}' here.",
                f"{nearest(provider, available)}Available: {', '.join(available)}.",
            )
    try:
        return start_session(source, options, chosen)
    except ORT_ERRORS as error:
        where = "the model in memory" if isinstance(model, bytes) else str(model)
        reason = " ".join(str(error).split())
        raise ModelError(
            f"ONNX Runtime cannot load {where}: {reason}",
            "Check it with onnx.checker; export operators and types that ONNX Runtime lacks on the CPU as "
            "others (bfloat16 as FP32).",
        ) from error


class OrtDenoiser:
    """A denoiser in ONNX Runtime, called as ``denoiser(sample, timestep, conditions)``.

    ``lanes``: how many of its runs go best side by side; one, unless it was opened by ``in_lanes``.
    """

    lanes = 1

    @classmethod
    def in_lanes(
        cls, model: Path, spec: DenoiserSpec, fake_quant_only: bool = False
    ) -> OrtDenoiser:
        """Open a model for runs side by side, as many as its size allows (``lanes_for``)."""
        files = [model, *external_files(read_proto(model), model)]
        lanes = lanes_for(sum(file.stat().st_size for file in files))
        made = cls(model, spec, lanes.threads, fake_quant_only=fake_quant_only)
        made.lanes = lanes.count
        return made

    def __init__(
        self,
        model: Path | bytes,
        spec: DenoiserSpec,
        threads: int = 0,
        providers: Sequence[Provider] | None = None,
        fake_quant_only: bool = False,
    ) -> None:
        self.spec = spec
        self._batches = BatchSession(
            lambda places: make_session(model, threads, places, fake_quant_only),
            spec.output,
            [item.name for item in spec.inputs if item.batched],
            providers,
        )
        given, described = self.session.get_inputs(), {item.name for item in spec.inputs}
        # Slots for LoRAs are the same for all calls, and empty unless somebody fills them.
        self.slots = {
            value.name: np.zeros(value.shape, np.float16)
            for value in given
            if is_slot(value.name) and value.name not in described
        }
        declared = {value.name for value in given} - set(self.slots)
        if declared != described:
            raise ModelError(
                f"The model's inputs are {sorted(declared)}, but its description names {sorted(described)}.",
                "Make the description (denoiser.json, or the YAML beside an ONNX file) name every input.",
            )
        outputs = [value.name for value in self.session.get_outputs()]
        if spec.output not in outputs:
            raise ModelError(
                f"The model has no output '{spec.output}'.",
                f"{nearest(spec.output, outputs)}Its outputs are {', '.join(outputs)}.",
            )

    def __call__(
        self, sample: Array, timestep: float | Array, conditions: dict[str, Array]
    ) -> Array:
        """Return the output, float32 [N, ...], for ``sample`` [N, ...].

        ``timestep`` is one number or [N]; ``conditions`` hold N rows per input. Everything is cast
        to the declared types. A model whose timestep has no batch axis takes one timestep per call.
        Raises ModelError naming a missing input or a row count that is not N.
        """
        return self.run(model_feeds(self.spec, sample, timestep, conditions))

    @property
    def session(self) -> ort.InferenceSession:
        """The session that computes now."""
        return self._batches.session

    def run(self, feeds: dict[str, Array]) -> Array:
        """Return the output, float32 [N, ...], for every input by name, as the model takes it."""
        return self._batches.run({**self.slots, **feeds})


class BatchSession:
    """A session that is given as many rows at once as a GPU's memory holds.

    Where that is not enough for all rows of a call they are run in parts, and where it does not
    suffice for one, on the CPU from then on; both are said.
    """

    def __init__(
        self,
        open_on: Callable[[Sequence[Provider] | None], ort.InferenceSession],
        output: str | None = None,
        batched: Collection[str] | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        """``open_on``: opens the session on providers. ``output``: its name, None: the first.

        ``batched``: the inputs that have as many rows as the output, None: all.
        """
        self.session, self._open_on = open_on(providers), open_on
        self._output = output or self.session.get_outputs()[0].name
        inputs = [value.name for value in self.session.get_inputs()]
        self._batched = inputs if batched is None else batched
        # None: as many rows as there are.
        self._most: int | None = None

    def run(self, feeds: dict[str, Array]) -> Array:
        """Return the output, float32 [N, ...]. Raises ModelError as ``run_session`` does."""
        rows = max((len(feeds[name]) for name in self._batched if feeds[name].ndim), default=1)
        parts: list[Array] = []
        start = 0
        while start < rows or not parts:
            stop = min(start + (self._most or rows), rows)
            part = feeds
            if (start, stop) != (0, rows):
                part = {n: v[start:stop] if n in self._batched else v for n, v in feeds.items()}
            try:
                output = run_session(self.session, self._output, part)
            except ModelError as error:
                if not out_of_memory(error.__cause__) or not on_gpu(self.session):
                    raise
                self._take_less(stop - start)
                continue
            parts.append(np.asarray(output, np.float32))
            start = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _take_less(self, rows: int) -> None:
        """Run fewer rows at once than ``rows``, or go on on the CPU."""
        free_cached_memory()
        what = f"The GPU's memory is not enough for a batch of {rows}"
        inputs = [value for value in self.session.get_inputs() if value.name in self._batched]
        if rows > 1 and not any(isinstance(value.shape[0], int) for value in inputs):
            self._most = rows // 2
            say_once(f"{what}: {self._most} at a time.")
            return
        say_once(f"{what}: the model runs on the CPU.")
        # Freed first: other sessions may need the memory.
        del self.session
        self.session, self._most = self._open_on([CPU_PROVIDER]), None


def on_gpu(session: ort.InferenceSession) -> bool:
    """Whether the session runs on a GPU."""
    return CUDA_PROVIDER in session.get_providers()


def run_session(session: ort.InferenceSession, output: str, feeds: dict[str, Array]) -> Array:
    """Return the output of that name. Raises ModelError with the inputs' shapes on failure."""
    try:
        if on_gpu(session):
            return run_bound(session, output, feeds, CUDA)
        values: Array = session.run([output], feeds)[0]
    except RUN_ERRORS as error:
        shapes = {name: tuple(value.shape) for name, value in feeds.items()}
        reason = " ".join(str(error).split())
        raise ModelError(
            f"ONNX Runtime failed on inputs of shapes {shapes}: {reason}",
            "Give smaller batches, or --device cpu."
            if out_of_memory(error)
            else "Check that the inputs have the shapes that the model was exported for.",
        ) from error
    return values


def run_bound(
    session: ort.InferenceSession, output: str, feeds: dict[str, Array], device: str
) -> Array:
    """Return the output of that name: each input goes to ``device`` once, and the output from there once."""
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value) if value.ndim else value)
    binding.bind_output(output, device, computing_on().runtime or 0)
    session.run_with_iobinding(binding)
    found: Array = binding.copy_outputs_to_cpu()[0]
    return found


def model_feeds(
    spec: DenoiserSpec, sample: Array, timestep: float | Array, conditions: dict[str, Array]
) -> dict[str, Array]:
    """Return every input by name, cast and shaped as the model declares it."""
    count = len(sample)
    feeds = {spec.sample.name: _cast(sample, spec.sample)}
    if spec.timestep is not None:
        rows = _timestep_rows(timestep, count, spec.timestep)
        fraction = first_fraction(rows) if spec.timestep.dtype.startswith("int") else None
        if fraction is not None:
            raise ModelError(
                f"The timestep '{spec.timestep.name}' is {spec.timestep.dtype}, and {fraction:g} is not a whole "
                "number.",
                "Use a scheduler of whole timesteps, or export the model with a float timestep.",
            )
        feeds[spec.timestep.name] = _cast(rows, spec.timestep)
    for item in spec.conditions:
        if item.name not in conditions:
            raise ModelError(
                f"The condition '{item.name}' is missing.", f"Its shape is [N, {item.shape}]."
            )
        values = np.asarray(conditions[item.name])
        if len(values) != count:
            raise ModelError(
                f"The condition '{item.name}' has {len(values)} rows for {count} samples."
            )
        feeds[item.name] = _cast(values, item)
    return feeds


def first_fraction(values: Array) -> float | None:
    """Return the first of ``values`` that is not a whole number; None: all are."""
    fractions = values[values != np.round(values)]
    return float(fractions.flat[0]) if fractions.size else None


def _timestep_rows(timestep: float | Array, count: int, item: InputSpec) -> Array:
    """Return the timestep as [N] or [N, 1], or as one number where the model has no batch axis."""
    values = np.asarray(timestep, np.float64)
    if item.batched:
        rows = np.broadcast_to(values, (count,)) if values.ndim == 0 else values
        if rows.size == count:
            # One for each of a sample's tokens, where the model takes as many.
            rows = np.broadcast_to(
                rows.reshape(count, *(1,) * len(item.shape)), (count, *item.shape)
            )
        return rows.reshape(count, *item.shape)
    if values.ndim and len(np.unique(values)) > 1:
        raise ModelError(
            f"The model takes one timestep per call, but {len(np.unique(values))} different ones were given."
        )
    return np.asarray(values.reshape(-1)[0]).reshape(item.shape)


def _cast(values: Array, item: InputSpec) -> Array:
    return (
        np.ascontiguousarray(values, dtype=item.dtype) if values.ndim else values.astype(item.dtype)
    )
