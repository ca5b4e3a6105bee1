"""A quantized denoiser in place of a diffusers one: ``pipe.unet = mpq_deploy.load(RUN)``."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.arguments import Arguments
from mpq_deploy.calls.stand_in import answer_of, fixed_text
from mpq_deploy.device.archive import MANIFEST, ArchiveError
from mpq_deploy.device.generate.generation_folder import Part, Tensor
from mpq_deploy.device.generate.lora_factors import FUSE, SlottedModel, slot_arrays
from mpq_deploy.device.manifest import Manifest
from mpq_deploy.engine.builder import ENGINE
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.evaluate.cache import model_files
from mpq_deploy.graph.passes.first_token import SAME_TOKEN, token_distance
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.graph.writers.lora_slots import SLOTTED, SLOTTED_SIMULATED
from mpq_deploy.models.export import SPEC
from mpq_deploy.models.lora_option import parse_lora
from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.run.folder import RunFolder, check_one_run, refuse_altered
from mpq_deploy.runtime.backends import Backend, EngineBackend, OrtBackend
from mpq_deploy.runtime.tensor_inputs import cast, condition_rows, sample_tensor, timesteps
from mpq_deploy.system.compute import CUDA
from mpq_deploy.system.files import file_digest

# What the first input is called here; a transformer's pipeline calls it hidden_states.
SAMPLE = "sample"
# What pipelines hand over and the exported graph holds as constants: the positions of Flux' tokens.
FIXED_INPUTS = {"FluxTransformer2DModel": ("img_ids", "txt_ids")}
# How the names of UNets' classes begin.
UNET = "UNet"
# Why a LoRA's layers of text encoders are left out.
NOT_HERE = "which load() does not replace: load them into the pipeline by load_lora_weights"
BACKENDS = ("auto", "onnxruntime", "tensorrt_rtx", "tensorrt")


class RuntimeUNet(torch.nn.Module):  # type: ignore[misc]
    """Called like the diffusers UNet or transformer it replaces; the backend computes.

    ``config`` has the entries of the UNet's configuration (``config.in_channels``,
    ``config["sample_size"]``); for an ONNX model those that follow from its inputs. ``dtype`` is
    what the sample is cast to, ``device`` where the result lies: a pipeline may move and cast this
    module as it does its others, the backend stays where it was opened.
    """

    def __init__(self, spec: DenoiserSpec, backend: Backend) -> None:
        super().__init__()
        self.spec, self.backend = spec, backend
        self._checked: dict[str, Any] = {}
        known: dict[str, Any] = {}
        if len(spec.sample.shape) == 3:
            channels, *size = spec.at_size(0).sample.shape
            known = {
                "in_channels": channels,
                "sample_size": size[0] if len(set(size)) == 1 else size,
            }
        self.config = Config(
            {"time_cond_proj_dim": None, "addition_embed_type": None, **known, **spec.config}
        )
        self.dtype = torch.float32
        self.device = backend.device
        width = self.config.get("projection_class_embeddings_input_dim")
        # Stable Diffusion XL's pipelines read the width of the added conditions from this layer.
        self.add_embedding = (
            SimpleNamespace(linear_1=SimpleNamespace(in_features=width)) if width else None
        )
        self.in_channels = self.config.get("in_channels")
        # HunyuanDiT's pipelines compute positions from these.
        self.num_heads = heads = self.config.get("num_attention_heads")
        each = self.config.get("attention_head_dim")
        self.inner_dim = heads * each if isinstance(heads, int) and isinstance(each, int) else None

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Yield one without elements: pipelines read type and device of the first."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        yield torch.nn.Parameter(empty, requires_grad=False)

    def use_loras(self, *loras: str) -> None:
        """Take these LoRAs, ``FILE[:SCALE]``, for the calls from now on; none: as it was built.

        They go into the slots of a model that was opened with ``load(RUN, lora=...)``. Layers of text
        encoders, which the pipeline has, are left out with a warning. Raises as ``parse_lora`` and
        ``slot_arrays``.
        """
        options = [parse_lora(text) for text in loras]
        slots = {name: Tensor("float16", shape) for name, shape in self.backend.slots.items()}
        named = str(self.config.get("_class_name", UNET if self.spec.sample.name == SAMPLE else ""))
        denoiser = "unet" if named.startswith(UNET) else "transformer"
        norms = self.backend.weight_norms
        part = Part(denoiser, Path(self.spec.source), {}, {}, slots=slots, weight_norms=norms)
        model = SlottedModel(Path(self.spec.name), {denoiser: part}, denoiser, NOT_HERE)
        arrays = slot_arrays(options, model, lambda text: warnings.warn(text, stacklevel=4))
        if slots:
            self.backend.fill(arrays[denoiser])

    def forward(
        self,
        *leading: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Return the output as diffusers does: ``.sample``, or a tuple without ``return_dict``.

        The sample [N, ...] and the timestep (one number or [N]) come first or by name; ControlNet's
        lists of residuals are one input per element. Raises UsageError for an input that the
        exported model does not take or lacks, or whose shape, type or values do not fit it.
        """
        named = {} if timestep is None else {"timestep": timestep}
        if added_cond_kwargs is not None:
            named["added_cond_kwargs"] = added_cond_kwargs
        given = self._by_name(leading, {**others, **named})
        declared = self.spec.timestep
        assert declared is not None  # load refuses a component without timesteps
        sample = _first(given, (SAMPLE, self.spec.sample.name, "hidden_states"), "sample")
        self._check_size(sample_tensor(sample))
        times = _first(given, ("timestep", declared.name), "timestep")
        conditions = self._conditions(given)
        count, device = len(sample), self.backend.device
        feeds = {
            self.spec.sample.name: cast(sample, self.spec.sample, device),
            declared.name: cast(timesteps(times, declared, count), declared, device),
            **{
                item.name: cast(condition_rows(conditions[item.name], item, count), item, device)
                for item in self.spec.conditions
            },
        }
        output = self.backend(feeds).to(sample.device, sample.dtype)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput
        from diffusers.models.unets.unet_2d import UNet2DOutput

        kind = UNet2DOutput if self.spec.sample.name == "sample" else Transformer2DModelOutput
        known = self._class()
        kind, field = answer_of(known) if hasattr(known, "forward") else (kind, "sample")
        return kind(**{field: output})

    def _by_name(self, leading: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by the names of the graph's inputs, lists and dictionaries apart."""
        forward = getattr(self._class(), "forward", None)
        if forward is not None:
            taken = inspect.signature(forward).parameters
            known = {name: value for name, value in named.items() if name in taken}
            others = {name: value for name, value in named.items() if name not in taken}
            called = Arguments.of(functools.partial(forward, self), leading, known)
            return {**called.constants, **called.tensors, **_flat(others)}
        by_place = dict(zip((SAMPLE, "timestep", "encoder_hidden_states"), leading))
        if len(leading) > len(by_place):
            raise UsageError(
                f"{len(leading)} inputs were given without a name.",
                "Pass all except sample and timestep by name.",
            )
        added = named.pop("added_cond_kwargs", None) or {}
        return {**_flat({**by_place, **named}), **_flat(added)}

    def _class(self) -> Any:
        """The class of diffusers whose place this takes; None for an ONNX model."""
        import diffusers

        return getattr(diffusers, str(self.config.get("_class_name")), None)

    def _conditions(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the conditions without those that are constants; refuse unknown ones."""
        fixed = FIXED_INPUTS.get(str(self.config.get("_class_name")), ())
        left_out = {*fixed, *dict(self.config.get("forward_arguments") or {})}
        # Positions are inputs where they change with the size.
        left_out -= {item.name for item in self.spec.conditions}
        given = {name: value for name, value in given.items() if name not in left_out}
        for name, expected in (self.spec.pipeline.fixed if self.spec.pipeline else {}).items():
            value = given.pop(name, None)
            if value is None or self._checked.get(name) is value:
                continue
            if fixed_text(value) != expected:
                raise UsageError(
                    f"'{name}' differs from its value at the export, where it became a constant.",
                    "Use the image size and the call arguments that the model was built with (--call).",
                )
            self._checked[name] = value
        taken = [item.name for item in self.spec.conditions]
        unknown = [name for name in given if name not in taken]
        if unknown:
            raise UsageError(
                f"The exported denoiser takes no '{unknown[0]}'.",
                f"It takes {', '.join(taken) or 'no conditions'}; export the model with that input to use it.",
            )
        missing = [name for name in taken if name not in given]
        if missing:
            raise UsageError(f"The denoiser needs '{missing[0]}', which was not given.")
        self._check_first_tokens(given)
        return given

    def _check_size(self, sample: torch.Tensor) -> None:
        """Refuse a sample of a size that the graph was not made for, with those that it was."""
        if not self.spec.takes(sample.shape[1:]):
            raise UsageError(
                f"The denoiser was not built for samples of the shape {list(sample.shape[1:])}.",
                f"It takes {self.spec.taken_sizes}; build it with --sizes for others.",
            )

    def _check_first_tokens(self, given: dict[str, Any]) -> None:
        """Refuse a text whose first token is not the one whose keys and values the graph holds."""
        for name, token in self.spec.first_tokens.items():
            # A pipeline hands over the same tensor at every step.
            if self._checked.get(name) is given[name]:
                continue
            apart = token_distance(given[name][:, 0].double().cpu().numpy(), np.array(token))
            if apart > SAME_TOKEN:
                raise UsageError(
                    f"The first token of '{name}' is not the one that the model was built for: it differs by "
                    f"{apart:.2g} of its largest value.",
                    "Use the text encoder that the model was built with, and no weights on its first token; or build "
                    "with first_token: quantized.",
                )
            self._checked[name] = given[name]

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Do nothing: pipelines name their calls for caches that do not exist here."""
        yield

    def to(self, *args: Any, **kwargs: Any) -> RuntimeUNet:
        """Record the device and type that a pipeline wants; the backend stays on its own device."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self.dtype = value
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                self.device = torch.device(value)
        return self

    def extra_repr(self) -> str:
        """Say what runs, for print()."""
        return f"{self.spec.name}, {self.backend.name} on {self.backend.device}"


class Config(dict):  # type: ignore[type-arg]
    """A configuration whose entries are attributes too, as in diffusers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def _flat(given: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs without None and empty dictionaries; lists as one entry per element."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, (list, tuple)):
            flat.update({f"{name}.{number}": element for number, element in enumerate(value)})
        elif value is not None and not (isinstance(value, dict) and not value):
            flat[name] = value
    return flat


def _first(given: dict[str, Any], names: tuple[str, ...], what: str) -> Any:
    """Take the first of ``names`` out of ``given``; UsageError where none of them is there."""
    for name in names:
        if name in given:
            return given.pop(name)
    raise UsageError(f"The denoiser needs a {what}, but none was given.")


BY_ORT = "take backend='onnxruntime'"


def load(
    source: str | Path,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    threads: int = 0,
    lora: str | Sequence[str] | None = None,
) -> RuntimeUNet:
    """Open a build as the denoiser that replaces ``pipe.unet`` or ``pipe.transformer``.

    ``source``: a run folder, an engine, or an ONNX file with ``denoiser.json`` beside it (or in a
    run folder). ``backend`` "auto" takes the engine where its library and a GPU are present, else
    ONNX Runtime; ``device`` None is cuda where the backend runs there. ``threads`` 0: one per core.
    ``lora``: ``FILE[:SCALE]``, one or several, for the slots of a build with ``lora_slots``; empty: slots
    that ``use_loras`` fills later. Raises UsageError for a source that is not one of these or a backend that
    cannot run it here, RunFolderError for files of a run that were altered since they were made, and as
    ``use_loras``.
    """
    if backend not in BACKENDS:
        hint = f"{nearest(backend, BACKENDS)}One of {BACKENDS}."
        raise UsageError(f"There is no backend '{backend}'.", hint)
    path = Path(source)
    described, engine, models = _found(path)
    spec = _description(described)
    if spec.timestep is None:
        raise UsageError(
            f"{path} holds a component without timesteps ({spec.name}), not a denoiser.",
            "Run its ONNX graph (quantize/model.onnx) or its engine yourself: inputs as in export/denoiser.json.",
        )
    library = _library(engine, backend)
    if library:
        opened = _engine(path, engine, library, spec, device)
    else:
        chosen = torch.device(device or "cpu")
        model = _graph(path, models, chosen.type == CUDA, lora is not None)
        opened = OrtBackend(model, spec, chosen, threads)
    denoiser = RuntimeUNet(spec, opened)
    if lora is None:
        return denoiser
    if not opened.slots:
        raise UsageError(f"{path} has no slots for LoRAs.", f"Build with --lora-slots RANK. {FUSE}")
    denoiser.use_loras(*([lora] if isinstance(lora, str) else lora))
    return denoiser


def _engine(
    path: Path,
    engine: Path | None,
    library: str,
    spec: DenoiserSpec,
    device: str | torch.device | None,
) -> Backend:
    """Open the engine in ``path``. Raises UsageError where there is none, or no GPU."""
    if engine is None:
        raise UsageError(f"{path} holds no engine.", f"Build one, or {BY_ORT}.")
    if not torch.cuda.is_available():
        raise UsageError("No CUDA device is here: an engine cannot run.", f"To run here, {BY_ORT}.")
    refuse_altered([engine])
    return EngineBackend(engine, spec, torch.device(device or "cuda"), library)


def _graph(path: Path, models: dict[str, Path], cuda: bool, slotted: bool) -> Path:
    """Return which of ``models`` runs, by preference with slots. Raises UsageError where there is none."""
    if not models:
        raise UsageError(
            f"{path} holds no quantized ONNX model.",
            "Finish the build of that run, or give another run.",
        )
    # On a CPU the twin with FP32 arithmetic: the deployed graph without FP16 kernels.
    turn = 1 if cuda else -1
    preferred = [*(SLOTTED, SLOTTED_SIMULATED)[::turn]] if slotted else []
    preferred += [*(DEPLOYED, SIMULATED)[::turn], *models]
    model = next(models[name] for name in preferred if name in models)
    refuse_altered(model_files(model))
    return model


def _description(path: Path) -> DenoiserSpec:
    """Read a denoiser.json that is as its stage, or the package that it is a part of, left it.

    Raises RunFolderError or ArchiveError for another.
    """
    refuse_altered([path])
    manifest = path.with_name(MANIFEST)
    if manifest.is_file() and Manifest.load(manifest).parts.get(path.name) != file_digest(path):
        raise ArchiveError(f"{path} is altered.", "Unpack the package again.")
    return DenoiserSpec.load(path)


def _found(path: Path) -> tuple[Path, Path | None, dict[str, Path]]:
    """Return the specification's file, the engine if there is one, and the ONNX graphs by file name."""
    check_one_run(path)
    if not path.exists():
        raise UsageError(f"There is no {path}.", "Give a run folder, an engine, or an ONNX file.")
    run = path if path.is_dir() else path.parent.parent
    places = [
        RunFolder(run).stage("export") / SPEC,
        (path if path.is_dir() else path.parent) / SPEC,
    ]
    described = next((place for place in places if place.is_file()), None)
    if described is None:
        raise UsageError(
            f"There is no {SPEC} beside {path}, which says what it takes.",
            "Give a run folder, or put the file there.",
        )
    if path.is_file():
        if path.suffix not in (".onnx", ".engine"):
            raise UsageError(
                f"{path} is neither an .onnx nor an .engine file.",
                "Give one of these, or the run folder.",
            )
        engine = path if path.suffix == ".engine" else None
        return described, engine, {} if engine else {path.name: path}
    folders = [path / "engine", path / ("recover" if _recovers(path) else "quantize"), path]
    engine = next((f / ENGINE for f in folders if (f / ENGINE).is_file()), None)
    names = (DEPLOYED, SIMULATED, SLOTTED, SLOTTED_SIMULATED)
    graphs = [f / name for name in names for f in folders if (f / name).is_file()]
    # The first folder that has a file wins.
    return described, engine, {file.name: file for file in reversed(graphs)}


def _recovers(run: Path) -> bool:
    """Whether the recipe of a run folder recovers the plan's model, which is then deployed."""
    from mpq_deploy.recipe import load_recipe

    recipe = run / "recipe.yaml"
    return recipe.is_file() and load_recipe(recipe).recover.steps > 0


def _library(engine: Path | None, backend: str) -> str | None:
    """Return which TensorRT runs the engine; None for ONNX Runtime."""
    if backend in ("tensorrt_rtx", "tensorrt"):
        return backend
    if backend == "onnxruntime" or engine is None:
        return None
    if not torch.cuda.is_available():
        return None
    record = EngineRecord.beside(engine)
    library = "tensorrt_rtx" if record and record.backend == "tensorrt_rtx" else "tensorrt"
    return library if importlib.util.find_spec(library) else None
