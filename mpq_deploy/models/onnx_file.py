"""An ONNX file as a denoiser: a small YAML beside it says what its inputs mean.

Example, ``model.yaml`` beside ``model.onnx``::

    sample: {name: x, shape: [3, 32, 32]}   # the shape may be left out when the file fixes it
    timestep: t
    conditions: [class_labels]
    output: out_sample
    prediction_type: epsilon
    scheduler: scheduler_config.json         # or the configuration itself
    pixel_range: [-1, 1]
    labels: [cat, dog]
    guidance: {scale: 3.0, uncond_row: 2}
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.calls.sampler import ONE_CALL
from mpq_deploy.calls.script_calls import CALIBRATED, ScriptCalls
from mpq_deploy.errors import ModelError, UsageError, nearest
from mpq_deploy.graph.already_quantized import refuse_quantized
from mpq_deploy.graph.known_values import Sizes
from mpq_deploy.graph.layers import LAYER_OPS
from mpq_deploy.graph.load import load_model, normalise, widened
from mpq_deploy.graph.passes.raise_opset import QUANTIZED_OPSET
from mpq_deploy.graph.passes.widen import uses_bfloat16, uses_halves
from mpq_deploy.models.additions import Additions, predicted, read_scheduler
from mpq_deploy.models.conditions import Conditions, WantedInput, check_conditions, list_inputs
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.optimum_folder import CONFIG, own_description
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec, PredictionType
from mpq_deploy.system.hub_cache import refuse_links_out
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.yaml_file import read_yaml

if TYPE_CHECKING:
    import onnxruntime as ort

TOLERANCE = 1e-3
# Recorded calls that the export is compared on.
EXAMPLES = 8
# The source rounds every activation to half precision, the export does not.
HALF_TOLERANCE = 5e-2
DTYPES = {"FLOAT": "float32", "FLOAT16": "float32", "BFLOAT16": "float32", "DOUBLE": "float32"}
DTYPES |= {"INT64": "int64", "INT32": "int32", "BOOL": "bool"}


class NamedInput(BaseModel):
    """An input by name; the shape (without batch axis) where the file leaves it open."""

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: tuple[int, ...] | None = None


class Guidance(BaseModel):
    """Classifier-free guidance: the scale, and the row of the empty condition."""

    model_config = ConfigDict(extra="forbid")

    scale: float = 1.0
    uncond_row: int | None = Field(None, ge=0)


class OnnxDescription(BaseModel):
    """The YAML beside an ONNX file."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    sample: NamedInput
    timestep: NamedInput | None = None
    conditions: tuple[NamedInput, ...] = ()
    output: str | None = None
    prediction_type: PredictionType | None = None
    scheduler: str | dict[str, Any] | None = None
    pixel_range: tuple[float, float] | None = None
    labels: tuple[str, ...] = ()
    guidance: Guidance = Guidance()

    @field_validator("sample", "timestep", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("conditions", mode="before")
    @classmethod
    def _short_list(cls, value: Any) -> Any:
        return [cls._short(item) for item in value] if isinstance(value, list) else value

    @field_validator("labels", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return [str(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class FixedBatch:
    """The inputs of a file whose first axis is ``size`` samples and no other number."""

    size: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, inputs: Sequence[ir.Value], sample: str, rank: int | None) -> FixedBatch | None:
        """Return what the ``sample`` fixes, and open it in ``inputs``; None where it fixes none.

        ``rank``: of one sample, where that is known.
        """
        found = next(value for value in inputs if value.name == sample)
        declared = tuple(found.shape or ())
        if not declared or not isinstance(size := declared[0], int) or size < 1:
            return None
        if rank is not None and len(declared) != rank + 1:
            return None
        first = {v: v.shape[0] for v in inputs if v.shape is not None and len(v.shape)}
        # Some exports leave it open for a part of the inputs alone.
        fixed = [v for v, one in first.items() if one == size or not isinstance(one, int)]
        for value in fixed:
            value.shape = ir.Shape([None, *tuple(value.shape or ())[1:]])
        return cls(size, (sample, *(v.name or "" for v in fixed if v is not found)))

    def filled(self, feeds: dict[str, Array], row: int) -> dict[str, Array]:
        """Return the feeds of one sample, as often as the file takes samples."""
        return {
            name: np.repeat(value[row : row + 1], self.size, 0) if name in self.names else value
            for name, value in feeds.items()
        }


class OnnxNetwork:
    """An ONNX file: normalised for the export, run as it is for the comparison.

    ``batch``: what the file fixes of it; the file is then run with one sample at a time.
    One that ONNX Runtime does not run on the CPU as it is (``not_run``) is widened to FP32 for that.
    """

    def __init__(
        self,
        path: Path,
        output: str,
        inputs: Sequence[InputSpec],
        batch: FixedBatch | None = None,
    ) -> None:
        self.path, self._output, self.inputs = path, output, tuple(inputs)
        self.batch = batch
        self._session: ort.InferenceSession | None = None
        model = load_model(path)
        self._widened = bool(not_run(model))
        rounds = uses_halves(model) and not self._widened
        self.tolerance = HALF_TOLERANCE if rounds else TOLERANCE

    @property
    def _inputs(self) -> Sizes:
        """The sizes of each input, None for those that vary."""
        shapes = {
            item.name: tuple(None if i in item.open_axes else n for i, n in enumerate(item.shape))
            for item in self.inputs
        }
        return {i.name: (None, *shapes[i.name]) if i.batched else i.shape for i in self.inputs}

    def taking(self, inputs: Sequence[InputSpec]) -> OnnxNetwork:
        """Return the file with other shapes of its inputs. UsageError where it fixes them."""
        fixed = {v.name or "": tuple(v.shape or ()) for v in load_model(self.path).graph.inputs}
        for item in inputs:
            if any(isinstance(fixed[item.name][1 + axis], int) for axis in item.open_axes):
                raise UsageError(
                    f"{self.path} fixes the size of its input '{item.name}'.",
                    "Export it with a dynamic height and width (dynamic_axes or dynamic_shapes), or leave --sizes out.",
                )
        return OnnxNetwork(self.path, self._output, inputs, self.batch)

    def to_onnx(self, talk: Talk) -> ir.Model:
        """Return the file's graph in the form that the export writes."""
        talk.line(f"  reading {self.path.name}")
        model = load_model(self.path)
        for value in model.graph.inputs:
            # TensorRT's parser needs the rank of what a convolution reads.
            if value.shape is None and (value.name or "") in self._inputs:
                value.shape = ir.Shape(self._inputs[value.name or ""])
        outputs = model.graph.outputs
        # Other outputs are not read, but would be computed and kept on each call.
        output = [value for value in outputs if value.name == self._output]
        outputs.clear()
        outputs.extend(output)
        return normalise(model, self._inputs, self.batch.names if self.batch else ())

    def reference(self, feeds: dict[str, Array]) -> Array:
        """Return what the file itself gives, through ONNX Runtime."""
        from mpq_deploy.runtime.ort import run_session

        if self._session is None:
            self._session = self._opened()
        session = self._session
        types = {"tensor(float16)": np.float16, "tensor(double)": np.float64}
        given = {
            i.name: feeds[i.name].astype(types.get(i.type, feeds[i.name].dtype))
            for i in session.get_inputs()
        }
        if self.batch is None:
            return np.asarray(run_session(session, self._output, given), np.float32)
        rows = [
            run_session(session, self._output, self.batch.filled(given, row))[:1]
            for row in range(len(given[self.batch.names[0]]))
        ]
        return np.concatenate(rows).astype(np.float32)

    def _opened(self) -> ort.InferenceSession:
        from mpq_deploy.runtime.ort import session_for_few_calls

        if not self._widened:
            return session_for_few_calls(self.path)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / "model.onnx"
            model = widened(load_model(self.path), self._inputs)
            ir.save(model, copy, external_data=f"{copy.name}.data")
            return session_for_few_calls(copy)

    def release(self) -> None:
        """Close the file; the next call opens it again."""
        self._session = None


def not_run(model: ir.Model) -> str:
    """Say why ONNX Runtime does not run ``model`` on the CPU, although its graph can be; else nothing."""
    if uses_bfloat16(model):
        return "is in bfloat16"
    names = [node.name for node in model.graph if node.name]
    if len(set(names)) < len(names):
        return "has several nodes of one name"
    weights = [node.inputs[1] for node in model.graph if node.op_type in LAYER_OPS]
    doubles = any(value is not None and value.dtype == ir.DataType.DOUBLE for value in weights)
    return "has layers in double precision" if doubles else ""


def description_path(model: Path, given: Path | None) -> Path:
    """Return the YAML of an ONNX file. Raises UsageError when there is none."""
    candidates = (
        [given] if given is not None else [model.with_suffix(".yaml"), model.with_suffix(".yml")]
    )
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise UsageError(
            f"{model} needs a YAML that says what its inputs mean; there is no {candidates[0]}.",
            "Write one: sample: NAME, timestep: NAME, conditions: [NAME, ...], prediction_type, scheduler.",
        )
    return file


def described(
    model: Path, given: Path | None, inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[OnnxDescription, Path]:
    """Return what the file's YAML says, or the folder's own configurations (optimum), and its path.

    Raises UsageError where there is neither.
    """
    beside = any(model.with_suffix(ending).is_file() for ending in (".yaml", ".yml"))
    own = {} if given is not None or beside else own_description(model, inputs, outputs)
    if own:
        return OnnxDescription.model_validate(own), model.parent / CONFIG
    path = description_path(model, given)
    return read_description(path), path


def read_description(path: Path) -> OnnxDescription:
    """Return the checked YAML at ``path``. Raises UsageError naming the entry that is wrong."""
    content = read_yaml(path, error=UsageError)
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no entries.", "Begin with sample: NAME and timestep: NAME.")
    try:
        return OnnxDescription.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(str(part) for part in first["loc"])
        known = list(OnnxDescription.model_fields)
        hint = f"{nearest(entry, known)}Entries: {', '.join(known)}."
        raise UsageError(
            f"{path}: '{entry}': {first['msg']} (found {first['input']!r}).", hint
        ) from error


def open_onnx(path: Path, source: str, additions: Additions, talk: Talk) -> Denoiser:
    """Open an ONNX file with its YAML.

    Raises UsageError when the YAML does not fit the file or something is missing, ModelError for a
    file that cannot be used (no dynamic batch axis, unknown input types).
    """
    refuse_links_out([path])
    model = load_model(path)
    refuse_quantized(model, path)
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    declared = {value.name or "": value for value in inputs}
    outputs = [value.name or "" for value in model.graph.outputs]
    if additions.calls is not None:
        return open_with_calls(path, source, additions, model, talk)
    description, yaml_path = described(path, additions.description, list(declared), outputs)
    refuse_links_out([yaml_path])
    _check_names(declared, description, yaml_path)
    batch = _described_batch(inputs, description.sample)
    sample = _input(declared[description.sample.name], description.sample, path)
    if description.timestep is None:
        return _open_once(path, source, additions, description, (yaml_path, model, batch))
    timestep = _input(declared[description.timestep.name], description.timestep, path)
    _check_axes(sample, timestep, path)
    wanted = tuple(_wanted(declared[item.name], item, path) for item in description.conditions)
    scheduler = _scheduler(description, yaml_path, additions)
    conditions = _conditions(description, wanted, additions, path)
    checked = check_conditions(conditions, wanted, str(additions.conditions or yaml_path))
    given = additions.guidance_scale
    scale = description.guidance.scale if given is None else given
    if scale != 1 and conditions.uncond_row is None:
        raise UsageError(
            f"The guidance scale is {scale}, but no uncond_row is given.", f"Add it in {yaml_path}."
        )
    spec = DenoiserSpec(
        name=description.name or path.stem,
        source=source,
        sample=sample,
        timestep=timestep,
        conditions=checked,
        output=_output(model, description, yaml_path),
        prediction_type=predicted(scheduler),
        scheduler=scheduler,
        guidance_scale=scale,
        uncond_row=conditions.uncond_row,
        labels=conditions.labels,
        pixel_range=description.pixel_range,
    )
    network = OnnxNetwork(path, spec.output, spec.inputs, batch)
    return Denoiser(spec, conditions, network, notes=_notes(model, path, talk, batch))


def _check_axes(sample: InputSpec, timestep: InputSpec, path: Path) -> None:
    if not sample.batched:
        raise _fixed_batch(path, sample.name)
    if prod(timestep.shape) != 1:
        raise UsageError(
            f"The timestep '{timestep.name}' of {path} has the shape {list(timestep.shape)} beside the batch axis.",
            "It must be one number per sample: [N], [N, 1], or a scalar for the whole batch.",
        )


def _open_once(
    path: Path,
    source: str,
    additions: Additions,
    description: OnnxDescription,
    opened: tuple[Path, ir.Model, FixedBatch | None],
) -> Denoiser:
    """Open a model that is called once (a VAE, a text encoder): rows of its inputs are the user's.

    ``opened``: the YAML's path, the file's graph, and what it fixes of its batch.

    Raises UsageError where there are none.
    """
    yaml_path, model, batch = opened
    declared = {v.name or "": v for v in model.graph.inputs if not v.is_initializer()}
    sample = _input(declared[description.sample.name], description.sample, path)
    if additions.conditions is None:
        raise UsageError(
            f"{yaml_path} names no timestep, so {path} is called once, and nothing provides its inputs.",
            f"Record calls of it (mpq_deploy.record) and give --calls FOLDER; or --conditions FILE.npz with the array "
            f"'{sample.name}' and the conditions' (of a denoiser name the timestep: timestep: NAME).",
        )
    given = Conditions.load(additions.conditions)
    items = (description.sample, *description.conditions)
    wanted = tuple(_wanted(declared[item.name], item, path) for item in items)
    checked = check_conditions(given, wanted, str(additions.conditions))
    if given.rows < 2:
        raise UsageError(
            f"{additions.conditions} holds {given.rows} row.",
            "Give at least two: one is held out to compare on.",
        )
    spec = DenoiserSpec(
        name=description.name or path.stem,
        source=source,
        sample=checked[0],
        timestep=None,
        calibration_rows=max(1, int(given.rows * CALIBRATED)),
        conditions=checked[1:],
        output=_output(model, description, yaml_path),
        prediction_type="sample",
        scheduler={"_class_name": ONE_CALL},
        labels=given.labels,
        pixel_range=description.pixel_range,
    )
    return Denoiser(spec, given, OnnxNetwork(path, spec.output, checked, batch))


def open_with_calls(
    path: Path, source: str, additions: Additions, model: ir.Model, talk: Talk
) -> Denoiser:
    """Open an ONNX file whose inputs are what ``additions.calls`` recorded.

    Raises UsageError where these are not the file's inputs, ModelError as ``open_onnx``.
    """
    assert additions.calls is not None
    calls = ScriptCalls.open(additions.calls)
    inputs = {v.name or "": v for v in model.graph.inputs if not v.is_initializer()}
    lacking = [name for name in inputs if name not in calls.inputs]
    if lacking:
        raise UsageError(
            f"The calls in {calls.folder} have no input '{lacking[0]}' of {path}; they have "
            f"{', '.join(calls.inputs)}.",
            "Name the inputs of the ONNX file as the recorded model's parameters, or record an ONNX Runtime session.",
        )
    recorded = calls.grid(None)
    batch = _recorded_batch(inputs, recorded, calls.timestep)
    specs = {name: _recorded_input(value, recorded, calls, path) for name, value in inputs.items()}
    order = [name for name in calls.inputs if name in inputs]
    sample = _main_input(specs, calls.timestep)
    if not specs[sample].batched:
        raise _fixed_batch(path, sample)
    outputs = [value.name or "" for value in model.graph.outputs]
    spec = DenoiserSpec(
        name=path.stem,
        source=source,
        sample=specs[sample],
        timestep=specs.get(calls.timestep),
        conditions=tuple(specs[name] for name in order if name not in (sample, calls.timestep)),
        output=outputs[0],
        prediction_type="sample",
        scheduler={"_class_name": "none"},
        recorded=True,
    )
    rows = min(recorded.count, EXAMPLES)
    arrays = {item.name: recorded.values(item.name, 0, slice(rows)) for item in spec.inputs}
    notes = [
        *_notes(model, path, talk, batch),
        f"The calls are those in {calls.folder.name}: {recorded.count} at each of {len(recorded.timesteps)} timesteps.",
    ]
    if len(outputs) > 1:
        notes.append(f"Of {len(outputs)} outputs the first is compared: {outputs[0]}.")
    network = OnnxNetwork(path, spec.output, spec.inputs, batch)
    return Denoiser(spec, Conditions(arrays, rows), network, notes=tuple(notes))


def _described_batch(inputs: list[ir.Value], sample: NamedInput) -> FixedBatch | None:
    """Return what the file fixes of its batch, and open it; the YAML's shape is one sample's."""
    shape = sample.shape
    return FixedBatch.of(inputs, sample.name, None if shape is None else len(shape))


def _recorded_batch(
    inputs: dict[str, ir.Value], recorded: CallSet, timestep: str
) -> FixedBatch | None:
    """Return what the file fixes of its batch, and open it: the first axis beyond a call's own.

    Only the input that carries the batch says so: others may have one value for all calls.
    """
    ranks = {name: len(recorded.inputs[name].values.shape) - 1 for name in inputs}
    main = next((name for name, rank in ranks.items() if name != timestep and rank), None)
    return None if main is None else FixedBatch.of([*inputs.values()], main, ranks[main])


def _recorded_input(
    value: ir.Value, recorded: CallSet, calls: ScriptCalls, path: Path
) -> InputSpec:
    """Return an input with the shape of its recorded values; their type is what the file declares."""
    name = value.name or ""
    shape = tuple(recorded.inputs[name].values.shape[1:])
    declared = None if value.shape is None else tuple(value.shape)
    # A scalar, or a first axis of fixed size: one value for the whole batch.
    batched = declared is None or (len(declared) > 0 and not isinstance(declared[0], int))
    if name == calls.timestep:
        beyond = () if declared is None else declared[1:] if batched else declared
        shape = tuple(1 for _ in beyond)
    fields = {"name": name, "shape": shape, "dtype": _dtype(value, path), "batched": batched}
    return InputSpec.model_validate(fields)


def _main_input(specs: dict[str, InputSpec], timestep: str) -> str:
    """Return the input that carries the batch: the first with axes beyond it, else the first."""
    others = [name for name in specs if name != timestep]
    return next((name for name in others if specs[name].shape), (others or list(specs))[0])


def _notes(model: ir.Model, path: Path, talk: Talk, batch: FixedBatch | None) -> tuple[str, ...]:
    """Say what the export will change of the file's form."""
    opset, notes = model.opset_imports.get("", 0), list[str]()
    if opset < QUANTIZED_OPSET:
        notes.append(
            f"{path.name} has opset {opset}; its graph was converted to opset {QUANTIZED_OPSET}."
        )
    if reason := not_run(model):
        notes.append(f"{path.name} {reason}; it was compared with its graph in FP32.")
    if batch is not None:
        notes.append(
            f"{path.name} takes {batch.size} at once alone; its graph was made to take any number of samples, and "
            "compared with it sample by sample."
        )
    for note in notes:
        talk.line(f"  {note}")
    return tuple(notes)


def _check_names(
    declared: dict[str, ir.Value], description: OnnxDescription, yaml_path: Path
) -> None:
    named = [
        description.sample.name,
        *(() if description.timestep is None else (description.timestep.name,)),
        *(item.name for item in description.conditions),
    ]
    for name in named:
        if name not in declared:
            raise UsageError(
                f"{yaml_path} names an input '{name}', which the model does not have.",
                f"{nearest(name, declared)}Its inputs are {', '.join(declared)}.",
            )
    for name in declared:
        if name not in named:
            raise UsageError(
                f"The model has an input '{name}', which {yaml_path} does not name.",
                "Name every input: sample, timestep, or one of conditions.",
            )


def _sizes(value: ir.Value, item: NamedInput, path: Path) -> tuple[bool, tuple[int | None, ...]]:
    """Return whether axis 0 is a batch axis, and the other sizes (None: not declared)."""
    if value.shape is None:
        if item.shape is None:
            raise UsageError(
                f"{path} declares no shape for '{item.name}'.",
                f"Give it in the YAML without the batch axis, such as {{name: {item.name}, shape: []}} of one number.",
            )
        return True, item.shape
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    batched = bool(sizes) and sizes[0] is None
    rest = tuple(sizes[1:]) if batched else tuple(sizes)
    if item.shape is None or not batched:
        return batched, rest
    if len(item.shape) != len(rest) or any(
        s not in (None, given) for s, given in zip(rest, item.shape)
    ):
        raise UsageError(
            f"The YAML gives '{item.name}' the shape {list(item.shape)}, the file {list(rest)}.",
            "Leave the batch axis out of the shape.",
        )
    return batched, item.shape


def _dtype(value: ir.Value, path: Path) -> str:
    name = value.dtype.name if value.dtype is not None else "unknown"
    if name not in DTYPES:
        raise ModelError(
            f"The input '{value.name}' of {path} has the type {name}.",
            f"Known: {', '.join(DTYPES)}.",
        )
    return DTYPES[name]


def _input(value: ir.Value, item: NamedInput, path: Path) -> InputSpec:
    batched, sizes = _sizes(value, item, path)
    if None in sizes:
        shown = ["?" if size is None else size for size in sizes]
        raise UsageError(
            f"{path} leaves the size of '{item.name}' open: {shown}.",
            f"Give it in the YAML, such as {{name: {item.name}, shape: [3, 32, 32]}}.",
        )
    fields = {"name": item.name, "shape": sizes, "dtype": _dtype(value, path), "batched": batched}
    return InputSpec.model_validate(fields)


def _wanted(value: ir.Value, item: NamedInput, path: Path) -> WantedInput:
    batched, sizes = _sizes(value, item, path)
    if not batched:
        raise _fixed_batch(path, item.name)
    return WantedInput(item.name, sizes, _dtype(value, path))


def _fixed_batch(path: Path, name: str) -> ModelError:
    return ModelError(
        f"The input '{name}' of {path} has no dynamic batch axis.",
        "Export the model with a dynamic first axis.",
    )


def _output(model: ir.Model, description: OnnxDescription, yaml_path: Path) -> str:
    outputs = [value.name or "" for value in model.graph.outputs]
    if description.output is None and len(outputs) == 1:
        return outputs[0]
    if description.output is None:
        raise UsageError(
            f"The model has {len(outputs)} outputs, and {yaml_path} names none of them.",
            f"Name what the sampler takes, output: NAME; there are {', '.join(outputs)}.",
        )
    if description.output not in outputs:
        raise UsageError(
            f"{yaml_path} names the output '{description.output}'.",
            f"The model's outputs are {', '.join(outputs)}.",
        )
    return description.output


def _scheduler(
    description: OnnxDescription, yaml_path: Path, additions: Additions
) -> dict[str, Any]:
    """Return the scheduler's configuration with the description's prediction type in it."""
    if additions.scheduler is not None:
        scheduler = read_scheduler(additions.scheduler)
    elif isinstance(description.scheduler, dict):
        scheduler = dict(description.scheduler)
        scheduler.setdefault("_class_name", "DDIMScheduler")
    elif description.scheduler is not None:
        scheduler = read_scheduler(yaml_path.parent / description.scheduler)
    else:
        raise UsageError(
            f"{yaml_path} names no scheduler.",
            "Add scheduler: FILE (a scheduler_config.json) or its entries, or give --scheduler FILE.",
        )
    if description.prediction_type is not None:
        scheduler["prediction_type"] = description.prediction_type
    return scheduler


def _conditions(
    description: OnnxDescription, wanted: tuple[WantedInput, ...], additions: Additions, path: Path
) -> Conditions:
    """Return the given conditions; without a file, one row per class label in the YAML."""
    uncond, labels = description.guidance.uncond_row, description.labels
    if additions.conditions is not None:
        given = Conditions.load(additions.conditions)
        row = given.uncond_row if uncond is None else uncond
        return Conditions(given.arrays, given.rows, row, given.labels or labels[: given.rows])
    if not wanted:
        return Conditions()
    if labels and len(wanted) == 1 and wanted[0].shape == () and wanted[0].dtype.startswith("int"):
        count = max(len(labels), 0 if uncond is None else uncond + 1)
        names = (*labels, *(f"class {i}" for i in range(len(labels), count)))
        return Conditions({wanted[0].name: np.arange(count)}, count, uncond, names)
    raise UsageError(
        f"{path} takes conditions, which no file provides.",
        f"Give --conditions FILE.npz with the arrays {list_inputs(wanted)}"
        " (for class labels, labels: [...] in the YAML is enough).",
    )
