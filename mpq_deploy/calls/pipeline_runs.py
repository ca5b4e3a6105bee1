"""Run a diffusers pipeline as its users do, with our model in place of its denoiser.

In: a pipeline folder, what to call it with, and what computes the denoiser. Out: what the pipeline
returns as an array, and every call of the denoiser on the way. Nothing here knows a class of
pipelines: text encoders, guidance, schedulers, images and masks are the pipeline's own.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpq_deploy.calls.arguments import Arguments
from mpq_deploy.calls.stand_in import Compute, Seen, refuse_switched, stand_in, switches
from mpq_deploy.errors import ModelError, MpqError, UsageError, nearest
from mpq_deploy.models.additions import INDEX, LEFT_OUT, pipeline_index
from mpq_deploy.models.call_file import ARRAY, FILE
from mpq_deploy.models.lora import Loras
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.models.unet import find_weights, load_pretrained
from mpq_deploy.models.weight_files import (
    CONFIG,
    check_config,
    own_tensors,
    refuse_unborne,
    stored_weights,
)
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.libraries import gist, no_bars
from mpq_deploy.system.names import plain_name, printable

if TYPE_CHECKING:
    from mpq_deploy.runtime.correction import Correction

# Where the parts of a pipeline may come from; anything else would be somebody's code.
LIBRARIES = ("diffusers", "transformers")
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"
# How parts are loaded: in float32, without pickles, from what is here.
_SAFELY = {"torch_dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
# Where a configuration of transformers names code beside it.
OWN_CODE = "auto_map"
PACKAGE = "Install what is missing into this environment."
STEPS = "num_inference_steps"
# Steps of the sampler where the recipe does not say how many.
FIRST_STEPS = 20
# Called after each step of the scheduler with its timestep.
OnStep = Callable[[float], None]


def pipeline_class(index: Mapping[str, Any], folder: Path) -> Any:
    """Return the class of diffusers that a model_index.json names.

    Raises UsageError for one that diffusers does not have, and for parts that bring code of their
    own.
    """
    import diffusers

    name = index.get("_class_name")
    known = [n for n in dir(diffusers) if n.endswith("Pipeline")]
    found = (
        getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    )
    if absent := getattr(found, "_backends", None):
        # What diffusers has in place of a class that it cannot import.
        raise UsageError(f"{name} of diffusers needs {', '.join(absent)}.", PACKAGE)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UsageError(
            f"The pipeline class '{printable(str(name))}' of {folder} is not one of diffusers.",
            f"{nearest(str(name), known)}Pipelines with custom code are not run; give the denoiser's "
            "folder with --conditions and --scheduler, or calls recorded by your script with --calls.",
        )
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        plain_name(part, f"A part of {folder}", ModelError)
        ours = len(entry) == 2 and (entry[0] in (*LIBRARIES, None) or _of_pipeline(*entry))
        if not ours and part not in LEFT_OUT:
            raise UsageError(
                f"The part '{printable(part)}' of {folder} comes from {printable(str(entry))}, which is neither "
                "diffusers nor transformers.",
                "Code that comes with a model is never run: record calls in your own script, and give --calls.",
            )
    return found


def _of_pipeline(module: Any, class_name: Any) -> bool:
    """Whether a part is of a module of diffusers' own pipelines, such as ``stable_audio``."""
    from diffusers import pipelines

    found = getattr(pipelines, module, None) if isinstance(module, str) else None
    return inspect.ismodule(found) and inspect.isclass(getattr(found, str(class_name), None))


def refuse_own_code(part: Path) -> None:
    """Raise UsageError for a part whose files name code that comes with them.

    transformers would ask whoever sits at the terminal whether to run it.
    """
    for path in sorted(part.glob("*config.json")):
        if OWN_CODE in read_json_object(path, infinite=True, error=ModelError):
            raise UsageError(
                f"{path} has an {OWN_CODE}: it names code that comes with the model.",
                "Such code is never run: record calls in your own script (mpq_deploy.record), and give --calls.",
            )


def load_pipeline(
    folder: Path,
    index: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
    loras: Loras | None = None,
) -> Any:
    """Load the pipeline in ``folder``, with the parts ``given`` in place of its own, in float32.

    ``loras`` are fused into the parts that are loaded. Raises UsageError as ``pipeline_class``,
    ModelError for parts that cannot be loaded, and as ``Loras.fuse_others``.
    """
    found = pipeline_class(index, folder)
    variants = _variants(folder, index, given or {})
    variant = next((one for one in variants.values() if one), None)
    absent = _absent(found, index)
    own = {**_loaded_here(folder, index, variants), **(given or {})}
    try:
        with no_bars("diffusers"), no_bars("transformers"):
            if (folder / INDEX).is_file():
                options = {**own, **absent, **_SAFELY}
                pipeline = found.from_pretrained(str(folder), variant=variant, **options)
            else:
                others = [name for name in variants if name not in own]
                loaded = {
                    name: load_part(folder / name, index[name], variants[name]) for name in others
                }
                pipeline = found(**loaded, **own, **absent)
    except (MpqError, MemoryError):
        raise
    except ImportError as error:
        raise UsageError(
            f"The pipeline in {folder} cannot be loaded: {gist(error)}", PACKAGE
        ) from error
    except Exception as error:
        # Parts raise anything at all for files that are not their own.
        raise ModelError(
            f"The pipeline in {folder} cannot be loaded: {gist(error)}",
            "A file of it is missing or damaged: download or save it again.",
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    if loras is not None:
        loras.fuse_others(pipeline, given or {})
    return pipeline


def _variants(
    folder: Path, index: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, str | None]:
    """Check the parts that are not ``given``; return the variant of each one's weights."""
    variants = {}
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] and name not in (*given, *LEFT_OUT):
            refuse_own_code(folder / name)
            variants[name] = checked_variant(folder / name)
    return variants


def _absent(found: Any, index: Mapping[str, Any]) -> dict[str, None]:
    """Return the parts that the index does not name or says are left out, and what judges images.

    diffusers itself writes ``[null, null]`` for a part without which a pipeline was saved (SD3's T5),
    and loads such a folder only where it is told so again.
    """
    absent: dict[str, None] = {}
    for name, parameter in inspect.signature(found.__init__).parameters.items():
        unnamed = name not in index and parameter.default is inspect.Parameter.empty
        without = index.get(name) in ([None, None], (None, None))
        if name in LEFT_OUT or without or (unnamed and name != "self"):
            absent[name] = None
    return absent


def load_part(folder: Path, entry: Sequence[str], variant: str | None = None) -> Any:
    """Load a part by the library and class that its index entry names.

    Its files are checked by ``checked_variant`` before.
    """
    found = getattr(import_module(entry[0]), entry[1])
    options = {**_SAFELY, "variant": variant} if (folder / CONFIG).is_file() else {}
    return found.from_pretrained(str(folder), **options)


def _loaded_here(
    folder: Path, index: Mapping[str, Any], variants: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return the parts that diffusers alone would need a further package for (accelerate)."""
    import diffusers

    classes = {name: getattr(diffusers, str(index[name][1]), None) for name in variants}
    return {
        name: load_pretrained(one, folder / name, variants[name])
        for name, one in classes.items()
        if index[name][0] == "diffusers" and getattr(one, "_keep_in_fp32_modules", None)
    }


def checked_variant(part: Path) -> str | None:
    """Return the variant of a part's weights; its configuration may ask for no more than they hold."""
    if not (part / CONFIG).is_file():
        return None
    config = read_json_object(part / CONFIG, infinite=True, error=ModelError)
    ours = "_class_name" in config
    stem = DIFFUSERS_WEIGHTS if ours else TRANSFORMERS_WEIGHTS
    variant = find_weights(part, stem)
    if ours:
        check_config(config, stored_weights(part, stem, variant), part)
    else:
        refuse_unborne(part, stem, variant)
    return variant


def call_pipeline(pipeline: Any, arguments: Mapping[str, Any], seed: int) -> Array:
    """Return what the pipeline gives for ``arguments`` with noise from ``seed``, float32 [n, ...].

    Images are [n, C, H, W] and videos [n, C, F, H, W], in [0, 1]; whatever else as it is. Raises
    UsageError for arguments that the pipeline refuses.
    """
    with torch.no_grad():
        return returned_array(_returned(pipeline, pipeline, arguments, seed))


def call_with_gradients(pipeline: Any, arguments: Mapping[str, Any], seed: int) -> Any:
    """Do as ``call_pipeline`` with torch's autograd on; return what the pipeline itself returns.

    ``__call__`` is taken without the ``torch.no_grad`` around it; no weight gets a gradient.
    """
    from diffusers import AutoencoderKL

    for part in vars(pipeline).values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
        # Other autoencoders keep state from call to call.
        if isinstance(part, AutoencoderKL):
            _checkpoint_blocks(part)
    call = functools.partial(inspect.unwrap(type(pipeline).__call__), pipeline)
    with torch.enable_grad():
        return _returned(call, pipeline, arguments, seed)


def _checkpoint_blocks(part: torch.nn.Module) -> None:
    """Let every block of a network be computed again as a gradient goes back.

    A block is a module in a list that has no such blocks within. Gradient checkpointing (Chen et
    al., arXiv 1604.06174): a decoder of 512 x 512 pixels would keep some 7 GB else.
    """
    from torch.utils.checkpoint import checkpoint

    lists = [module for module in part.modules() if isinstance(module, torch.nn.ModuleList)]
    for block in {id(one): one for some in lists for one in some}.values():
        outer = any(isinstance(one, torch.nn.ModuleList) and len(one) for one in block.modules())
        if not outer and not isinstance(block.forward, functools.partial):
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )


def _returned(call: Any, pipeline: Any, arguments: Mapping[str, Any], seed: int) -> Any:
    """Return what ``call``, the pipeline's, gives."""
    taken = inspect.signature(type(pipeline).__call__).parameters
    given = dict(arguments)
    if "generator" in taken:
        given["generator"] = torch.Generator().manual_seed(seed)
    if "output_type" in taken:
        given.setdefault("output_type", "np")
    # Noise that a pipeline draws without the generator.
    with torch.random.fork_rng(devices=[]), no_bars("diffusers"):
        torch.manual_seed(seed)
        try:
            return call(**given)
        except (MpqError, MemoryError):
            raise
        except ImportError as error:
            raise UsageError(
                f"{type(pipeline).__name__} cannot be called: {gist(error)}", PACKAGE
            ) from error
        except Exception as error:
            # Some pipelines import what is installed, and use it anyway.
            absent = getattr(error, "name", None) if isinstance(error, NameError) else None
            if absent and importlib.util.find_spec(absent) is None:
                raise UsageError(
                    f"{type(pipeline).__name__} needs the package {absent}.", PACKAGE
                ) from error
            raise UsageError(
                f"{type(pipeline).__name__} cannot be called with {shown_call(arguments)}: {gist(error)}",
                "Give the pipeline's keyword arguments with --call FILE.yaml.",
            ) from error


def shown_call(arguments: Mapping[str, Any]) -> str:
    """Return a call's arguments in a few words."""
    parts = [f"{name}={reprlib.repr(value)}" for name, value in arguments.items()]
    return ", ".join(parts) or "no arguments"


def returned_array(output: Any) -> Array:
    """Return the first thing that a pipeline returned as an array, channels first."""
    first = output[0]
    values = _array(first)
    if values.shape[-1] in (1, 3, 4) and values.ndim in (4, 5):
        values = np.moveaxis(values, -1, 1)
    return np.ascontiguousarray(values, np.float32)


def _array(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        return np.asarray(value.detach().float().cpu().numpy())
    if isinstance(value, (list, tuple)):
        return np.stack([_array(one) for one in value])
    if isinstance(value, np.ndarray):
        return value
    pixels = np.asarray(value)
    if pixels.dtype == np.uint8:
        shaped = pixels if pixels.ndim == 3 else pixels[..., None]
        return shaped.astype(np.float32) / 255
    raise ModelError(
        f"The pipeline returns a {type(value).__name__}, which is not an image, tensor or array.",
        'Choose its output_type in --call FILE.yaml, such as output_type: "np".',
    )


@contextmanager
def watched_steps(pipeline: Any, on_step: OnStep) -> Iterator[None]:
    """Call ``on_step`` with the timestep of every step that the pipeline's scheduler takes."""
    scheduler = getattr(pipeline, "scheduler", None)
    original: Any = type(scheduler)
    if scheduler is None or not hasattr(original, "step"):
        yield
        return

    @functools.wraps(original.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original.step).bind(self, *args, **kwargs).arguments
        result = original.step(self, *args, **kwargs)
        timestep = given.get("timestep", given.get("sigma"))
        if timestep is not None:
            on_step(float(torch.as_tensor(timestep).flatten()[0]))
        return result

    # A subclass, not an attribute: pipelines copy their schedulers.
    scheduler.__class__ = type(original.__name__, (original,), {"step": step})
    try:
        yield
    finally:
        scheduler.__class__ = original


class _Reached(BaseException):
    """The denoiser was called: no error, so that no pipeline catches it."""

    def __init__(self, given: Arguments) -> None:
        self.given = given


def first_call(pipeline: Any, component: str, arguments: Mapping[str, Any]) -> Arguments:
    """Return what the pipeline gives its denoiser in its first call, and stop there.

    Raises UsageError as ``call_pipeline``, for a pipeline that never calls it, and for one that
    changes how it computes attention, or switches layers on or off, on the way.
    """
    module = getattr(pipeline, component)
    processors, before = dict(getattr(module, "attn_processors", {})), switches(module)

    def reached(called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(Arguments.of(called.forward, args, kwargs))

    handle = module.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        call_pipeline(pipeline, arguments, seed=0)
    except _Reached as stop:
        _refuse_changed(pipeline, component, processors)
        refuse_switched(type(pipeline).__name__, before, module)
        return stop.given
    finally:
        handle.remove()
    raise UsageError(
        f"{type(pipeline).__name__} does not call its {component} with {shown_call(arguments)}.",
        "Name the part that denoises with --only.",
    )


def _refuse_changed(pipeline: Any, component: str, before: Mapping[str, Any]) -> None:
    """Raise UsageError where attention is computed by processors of other classes than ``before``."""
    after = getattr(getattr(pipeline, component), "attn_processors", {})
    changed = next((p for name, p in after.items() if type(before.get(name)) is not type(p)), None)
    if changed is not None:
        raise UsageError(
            f"{type(pipeline).__name__} makes its {component} compute attention by {type(changed).__name__} while it "
            "runs, which no exported graph can follow.",
            "Use the pipeline without that kind of guidance.",
        )


def default_calls(
    pipeline: Any, prompts: Sequence[str], guidance: float | None
) -> tuple[dict[str, Any], ...]:
    """Return what the pipeline is called with where the user does not say: one mapping per image.

    Prompts or class labels where it takes them, and everything else as it has it.
    """
    taken = inspect.signature(type(pipeline).__call__).parameters
    common: dict[str, Any] = {}
    if guidance is not None:
        if "guidance_scale" not in taken:
            raise UsageError(
                f"{type(pipeline).__name__} takes no guidance_scale.",
                "Leave guidance_scale out of the recipe.",
            )
        common["guidance_scale"] = guidance
    if "prompt" in taken:
        return tuple({"prompt": prompt, **common} for prompt in prompts)
    if "class_labels" in taken:
        config = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
        entries = dict(getattr(config, "config", {}))
        count = int(entries.get("num_embeds_ada_norm") or entries.get("num_class_embeds") or 0)
        if count:
            listed = taken["class_labels"].default is inspect.Parameter.empty
            return tuple(
                {"class_labels": [one] if listed else one, **common} for one in range(count)
            )
    return (common,)


class PipelineRuns:
    """The pipeline in ``folder`` with the model ``spec`` in its denoiser's place.

    ``compute`` is what the denoiser gives and may be set anew: the pipeline is loaded once. ``seen``,
    where it is set, is told before what tensors the denoiser is called with.
    """

    seen: Seen | None = None

    def __init__(
        self,
        folder: Path,
        spec: DenoiserSpec,
        compute: Compute | None = None,
        correction: Correction | None = None,
    ) -> None:
        if spec.pipeline is None:
            raise ModelError(f"{spec.name} was not opened as a part of a diffusers pipeline.")
        import diffusers

        self.spec, self.compute = spec, compute
        index = pipeline_index(folder)
        part = folder / spec.pipeline.component
        denoiser = stand_in(
            getattr(diffusers, str(spec.config["_class_name"])),
            spec.config,
            spec,
            self._computed,
            own_tensors(part, DIFFUSERS_WEIGHTS, find_weights(part, DIFFUSERS_WEIGHTS)),
            self._called,
        )
        loras = Loras.of_text(spec, pipeline_class(index, folder))
        self._pipeline = load_pipeline(folder, index, {spec.pipeline.component: denoiser}, loras)
        use_scheduler(self._pipeline, spec.pipeline.scheduler)
        self._calls = [opened_call(call) for call in spec.pipeline.calls]
        self.correction_note = ""
        if correction is not None:
            self._correct(correction)

    @property
    def name(self) -> str:
        """The pipeline and its scheduler, for reports."""
        scheduler = getattr(self._pipeline, "scheduler", None)
        by = f", {type(scheduler).__name__}" if scheduler is not None else ""
        return f"{type(self._pipeline).__name__} of diffusers{by}"

    @property
    def short_name(self) -> str:
        """The pipeline's class."""
        return type(self._pipeline).__name__

    def image(self, number: int, steps: int, seed: int, on_step: OnStep | None = None) -> Array:
        """Return what call ``number`` gives (they are used in turn), float32 [1, ...].

        ``steps``: of the sampler, unless the call says how many; ``seed``: of this image's noise.
        """
        arguments = self._arguments(number, steps)
        # A corrected scheduler passes on what is set of it, so that it cannot be watched.
        watch = watched_steps(self._pipeline, on_step) if on_step else nullcontext()
        with watch:
            made = call_pipeline(self._pipeline, arguments, seed)
        if len(made) != 1:
            raise UsageError(
                f"{self.short_name} returns {len(made)} images for {shown_call(arguments)}.",
                "Give one prompt per call (--call FILE.yaml), and num_images_per_prompt 1.",
            )
        return made

    def with_gradients(self, number: int, steps: int, seed: int) -> Any:
        """Return what the pipeline itself returns for an image, as ``call_with_gradients`` does."""
        return call_with_gradients(self._pipeline, self._arguments(number, steps), seed)

    def _arguments(self, number: int, steps: int) -> dict[str, Any]:
        return with_steps(self._pipeline, self._calls[number % len(self._calls)], steps)

    def apart(self) -> PipelineRuns | None:
        """Return the same runs with what a run changes of their own; None where more than schedulers may be.

        Parts with weights are shared.
        """
        from diffusers import DiffusionPipeline, SchedulerMixin

        parts = dict(vars(self._pipeline))
        nested = any(isinstance(part, DiffusionPipeline) for part in parts.values())
        if nested or self.correction_note:
            return None
        copied = copy.copy(self)
        copied._pipeline = copy.copy(self._pipeline)
        own = {n: copy.deepcopy(p) for n, p in parts.items() if isinstance(p, SchedulerMixin)}
        vars(copied._pipeline).update(own)
        return copied

    def _correct(self, correction: Correction) -> None:
        """Put PTQD's correction before the pipeline's scheduler."""
        from mpq_deploy.runtime.corrected_scheduler import CorrectedScheduler

        taken = inspect.signature(type(self._pipeline).__call__).parameters
        default = taken["guidance_scale"].default if "guidance_scale" in taken else 1.0
        scale = float(self._calls[0].get("guidance_scale", default) or 1.0)
        corrected = CorrectedScheduler(self._pipeline.scheduler, correction, guidance_scale=scale)
        self._pipeline.scheduler, self.correction_note = corrected, corrected.variance_note

    def _called(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.seen is not None:
            self.seen(tensors)

    def _computed(self, feeds: dict[str, Array]) -> Any:
        if self.compute is None:
            raise ModelError("Nothing computes the denoiser.")
        return self.compute(feeds)


def with_steps(pipeline: Any, arguments: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the arguments with the number of steps, where they name none and the pipeline takes it."""
    taken = inspect.signature(type(pipeline).__call__).parameters
    return {**({STEPS: steps} if STEPS in taken else {}), **arguments}


def use_scheduler(pipeline: Any, config: Mapping[str, Any] | None) -> None:
    """Give the pipeline another scheduler, by its configuration; None leaves its own."""
    if config is not None:
        from mpq_deploy.calls.diffusers_sampler import scheduler_class

        pipeline.scheduler = scheduler_class(str(config.get("_class_name"))).from_config(config)


def image_seed(seed: int, number: int) -> int:
    """Return the seed of image ``number``'s noise: another for each, the same for any count."""
    # Python's number: NumPy 1 shifts no unsigned one by it.
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]) >> 1


def opened_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with the pictures and arrays that it names by ``file://`` opened."""
    return {name: _opened(value) for name, value in call.items()}


def _opened(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(FILE):
        path = Path(value.removeprefix(FILE))
        return open_array(path) if path.suffix.lower() == ARRAY else open_picture(path)
    if isinstance(value, list):
        return [_opened(one) for one in value]
    return value


def open_array(path: Path) -> torch.Tensor:
    """Return the array in a ``.npy``. Raises UsageError for a file that is none."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UsageError(
            f"{printable(str(path))} cannot be read as an array: {gist(error)}",
            "Write one with numpy.save.",
        ) from error


def open_picture(path: Path) -> Any:
    """Return a picture, RGB or grey. Raises UsageError for a file that is none, or of more than 8 bits."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            # As diffusers' load_image: turned as its camera says.
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):
                raise UsageError(
                    f"{printable(str(path))} has the mode {picture.mode}, whose values would be cut at 255.",
                    "Save it as RGB or grey of 8 bits; or give its values as an array (.npy).",
                )
            return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        # Pillow's decoders raise almost anything for damaged files, and for too many pixels.
        raise UsageError(
            f"{printable(str(path))} cannot be opened as an image: {gist(error)}",
            "Give a PNG or JPEG.",
        ) from error
