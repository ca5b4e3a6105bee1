"""Calls recorded in a user's script, and how a model is built from them.

``with mpq_deploy.record(model, "calls"):`` writes what a torch module, the denoiser of a diffusers
pipeline, or an ONNX Runtime session is given. The folder holds the calls (``shards``) and
``calls.json``: the inputs in their order, which of them is the timestep, digests of the files. Of
the outputs it keeps each call's mean and root mean square: by them a file that is given with the
calls shows that it is the model that was recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.calls.recorded import OUTPUT_MEAN, OUTPUT_RMS, CallSet, RecordedCalls, dealt
from mpq_deploy.calls.recorder import CallRecorder, output_statistics, recorded_grid
from mpq_deploy.errors import InputError, UsageError
from mpq_deploy.models.spec import Array, FloatModel
from mpq_deploy.system.files import file_digest, read_sealed, sealed_json
from mpq_deploy.system.names import plain_name, printable

DESCRIPTION, FORMAT = "calls.json", 2
# What exporters and authors call the timestep or noise level.
TIMESTEPS = (
    "timestep",
    "timesteps",
    "t",
    "time",
    "sigma",
    "sigmas",
    "noise_level",
    "timestep_ratio",
)
# Of a script's calls those that weights are rounded and measured on; the others are compared on.
CALIBRATED = 0.75
# How far statistics of the recorded and the given model's outputs may lie apart, in units of the
# root mean square: bfloat16 rounds to 0.4 %, and errors add up over layers (our choice).
SAME_OUTPUT = 0.05
AGAIN = "Record the calls again: with mpq_deploy.record(model, FOLDER): ..."


@contextmanager
def record(model: Any, folder: str | Path) -> Iterator[None]:
    """Record what ``model`` is given inside the block, into a new ``folder``.

    ``model``: a torch module, a diffusers pipeline (its unet or transformer), or an
    ``onnxruntime.InferenceSession``. Raises UsageError for anything else, a folder that is not
    empty, and where nothing was called.
    """
    place = Path(folder)
    if place.exists() and any(place.iterdir()):
        raise UsageError(
            f"{place} is not empty.", "Give a new folder: calls are recorded from the start."
        )
    tape = _Tape(CallRecorder(place))
    with _listening(model, tape):
        yield
    tape.close()


@contextmanager
def _listening(model: Any, tape: _Tape) -> Iterator[None]:
    """Tell ``tape`` of every call of the model."""
    part = next((getattr(model, n) for n in ("unet", "transformer") if hasattr(model, n)), model)
    if hasattr(part, "register_forward_pre_hook"):
        with _hooked(part, tape):
            yield
    elif hasattr(part, "get_inputs") and hasattr(part, "run"):
        with _wrapped(part, tape):
            yield
    else:
        raise UsageError(
            f"A {type(model).__name__} cannot be recorded.",
            "Give a torch module, a diffusers pipeline, or an onnxruntime.InferenceSession.",
        )


@contextmanager
def _hooked(module: Any, tape: _Tape) -> Iterator[None]:
    from mpq_deploy.calls.arguments import Arguments, as_array, first_tensor

    # Taken before the call, which may write into its inputs.
    begun: list[dict[str, Array]] = []

    def called(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = Arguments.of(part.forward, args, kwargs)
        arrays = {name: np.array(as_array(value)) for name, value in given.tensors.items()}
        numbers = {n: np.asarray(v) for n, v in given.constants.items() if n in TIMESTEPS}
        begun.append({**arrays, **numbers})

    def answered(part: Any, args: Any, output: Any) -> None:
        first = first_tensor(output)
        tape.add(begun.pop(), None if first is None else as_array(first))

    before = module.register_forward_pre_hook(called, with_kwargs=True)
    after = module.register_forward_hook(answered)
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextmanager
def _wrapped(session: Any, tape: _Tape) -> Iterator[None]:
    original: Callable[..., Any] = session.run
    outputs = [value.name for value in session.get_outputs()]

    @functools.wraps(original)
    def run(names: Any, feeds: Mapping[str, Any], *more: Any, **options: Any) -> Any:
        results = original(names, feeds, *more, **options)
        named = dict(zip(names or outputs, results))
        given = {name: np.asarray(value) for name, value in feeds.items()}
        # Whoever asks for other outputs alone is not distinguished by the first.
        tape.add(given, named.get(outputs[0]))
        return results

    session.run = run
    try:
        yield
    finally:
        del session.run


class _Tape:
    """Takes calls as they come; what each is of shows at the end."""

    def __init__(self, recorder: CallRecorder) -> None:
        self._recorder = recorder
        self._names: tuple[str, ...] = ()
        self._timestep = ""
        self._values: list[float] = []

    def add(self, given: Mapping[str, Array], output: Array | None) -> None:
        """Record a call: inputs whose first axis is the first one's, others once for every row."""
        if not self._names:
            self._names = tuple(given)
            self._timestep = next((name for name in TIMESTEPS if name in given), "")
        if set(given) != set(self._names):
            raise UsageError(
                f"The model is given {', '.join(given)} here, but was given {', '.join(self._names)} before.",
                "Record only calls with the same inputs.",
            )
        count = max((len(value) for value in given.values() if value.ndim > 1), default=1)
        rows = {}
        for name, value in given.items():
            whole = value.ndim > 0 and len(value) == count
            rows[name] = value if whole else np.broadcast_to(value, (count, *value.shape))
        if self._timestep:
            rows[self._timestep] = rows[self._timestep].reshape(count, -1)[:, 0]
        times = np.unique(rows[self._timestep]) if self._timestep else np.zeros(1)
        if len(times) > 1:
            raise UsageError(
                f"A call has {len(times)} different values of '{self._timestep}'.",
                "Record sampling, in which all samples of a call share a timestep.",
            )
        self._recorder.add(0, len(self._values), float(times[0]), rows, output)
        self._values.append(float(times[0]))

    def close(self) -> None:
        """Write the calls, each with its run and step, and what they are."""
        self._recorder.regroup(runs_and_steps(self._values))
        self._recorder.close()
        folder = self._recorder.folder
        files = sorted(path for path in folder.iterdir() if path.name != DESCRIPTION)
        described = {
            "format": FORMAT,
            "inputs": list(self._names),
            "timestep": self._timestep,
            "calls": len(self._values),
            "files": {path.name: file_digest(path) for path in files},
        }
        (folder / DESCRIPTION).write_text(sealed_json(described), encoding="utf-8")


def runs_and_steps(timesteps: list[float]) -> list[tuple[int, int]]:
    """Return run and step of each call from its timestep: a run goes one way, and then starts over.

    Calls of one timestep in a row are of one step: guidance, and batches of more samples.
    """
    found: list[tuple[int, int]] = []
    run = step = direction = 0
    for place, timestep in enumerate(timesteps):
        change = int(np.sign(timestep - timesteps[place - 1])) if place else 0
        if change and direction and change != direction:
            run, step, direction = run + 1, 0, 0
        elif change:
            step, direction = step + 1, change
        found.append((run, step))
    return found


@dataclass(frozen=True)
class ScriptCalls:
    """A folder of recorded calls: its inputs in their order, the timestep among them or ""."""

    folder: Path
    inputs: tuple[str, ...]
    timestep: str

    @classmethod
    def open(cls, folder: Path) -> ScriptCalls:
        """Open what ``record`` wrote. Raises UsageError for no folder, InputError for altered files."""
        if not (folder / DESCRIPTION).is_file():
            raise UsageError(f"There are no recorded calls in {folder}: no {DESCRIPTION}.", AGAIN)
        values = read_sealed(folder / DESCRIPTION)
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']}, not {FORMAT}")
            for name, digest in values["files"].items():
                if file_digest(folder / plain_name(name, "A file of recorded calls")) != digest:
                    raise ValueError(f"{name} was altered")
            return cls(folder, tuple(map(str, values["inputs"])), str(values["timestep"]))
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            said = printable(" ".join(str(error).split()))
            raise InputError(f"{folder / DESCRIPTION} cannot be used: {said}.", AGAIN) from error

    def grid(self, timesteps: int | None) -> CallSet:
        """Return the calls at ``timesteps`` steps of every run (None: at all)."""
        others = [name for name in self.inputs if name != self.timestep]
        return recorded_grid(self.folder, timesteps if self.timestep else 1, others[1:])

    def parts(self, timesteps: int | None) -> tuple[CallSet, CallSet]:
        """Return the calls to calibrate on, and the others, to compare on.

        Raises UsageError for a single call.
        """
        calls = self.grid(timesteps)
        if calls.count < 2:
            raise UsageError(
                f"{self.folder} holds {calls.count} call per timestep.",
                "Record at least two: one to calibrate on, and one to compare on.",
            )
        order = dealt(calls.rows, np.arange(calls.count))
        first = min(calls.count - 1, max(1, round(CALIBRATED * calls.count)))
        return calls.take(np.sort(order[:first])), calls.take(np.sort(order[first:]))


def check_recorded_model(
    compute: Callable[[dict[str, Array]], Array], calls: CallSet, model: FloatModel
) -> None:
    """Compare a call's output at each timestep with what was recorded of it.

    ``compute``: the float model. Outputs that were not seen, and of other names, are not compared.
    Raises UsageError where mean or root mean square differ: the calls are another model's.
    """
    if not {OUTPUT_MEAN, OUTPUT_RMS} <= set(calls.outputs):
        return
    first = calls.take(np.zeros(1, np.int64))
    for batch in RecordedCalls(first, model.spec).batches(1):
        mean, size = (float(first.outputs[n][batch.step, 0]) for n in (OUTPUT_MEAN, OUTPUT_RMS))
        means, sizes = output_statistics(compute(batch.feed), 1)
        apart = max(abs(means[0] - mean), abs(sizes[0] - size))
        if apart > SAME_OUTPUT * max(size, float(sizes[0])):
            raise UsageError(
                f"The calls in {model.calls} were recorded with another model: at timestep "
                f"{batch.timestep:g} its output has mean {mean:.4g} and root mean square {size:.4g}, that of "
                f"{model.spec.name} has {means[0]:.4g} and {sizes[0]:.4g} on the same inputs.",
                "Export the model that was recorded, or record the calls of this one.",
            )
