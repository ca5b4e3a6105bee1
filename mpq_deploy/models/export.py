"""Write a denoiser as an ONNX file with its description: what all later stages work from.

In: a ``Denoiser`` and an empty folder. Out: ``model.onnx`` and ``model.onnx.data`` (FP32),
``denoiser.json``, ``conditions.npz`` and, for latent models, ``decoder.onnx``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.errors import ModelError, MpqError, UsageError
from mpq_deploy.graph.fp16_region import LARGEST
from mpq_deploy.graph.layers import LAYER_OPS, STANDARD_DOMAINS
from mpq_deploy.graph.passes.first_token import FirstTokenPass, common_first_token, projections
from mpq_deploy.graph.passes.open_batch import EXPORT_HINT
from mpq_deploy.models.conditions import Conditions
from mpq_deploy.models.denoiser import Denoiser, Network
from mpq_deploy.models.sampling_fit import check_output
from mpq_deploy.models.spec import EACH_SIZE, Array, DenoiserSpec, cut_to
from mpq_deploy.runtime.not_finite import first_not_finite
from mpq_deploy.runtime.ort import (
    model_feeds,
    run_session,
    session_for_few_calls,
)
from mpq_deploy.system.libraries import gist, tell_cause
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import ImageSize

if TYPE_CHECKING:
    import onnxruntime as ort

MODEL, SPEC, CONDITIONS, DECODER = "model.onnx", "denoiser.json", "conditions.npz", "decoder.onnx"
# Constants below this stay in the .onnx file: shapes and axes, which readers want at hand.
INLINE_BYTES = 1024
# Batch sizes of the comparison with the source: a fixed batch axis fails at one of them.
CHECK_BATCHES = (1, 2)
CHECK_SEED = 0
# Largest difference, of the largest output, between a sample by itself and in a batch: rounding.
APART = 1e-3
# Timesteps of the comparison: as models are trained with, or as they are sampled with.
CHECK_TIMESTEPS, CHECK_STEPS = 1000, 20


@dataclass(frozen=True)
class ExportedModel:
    """What ``export_denoiser`` wrote, read back. ``decoder`` is None where samples are images."""

    model: Path
    spec: DenoiserSpec
    conditions: Conditions
    decoder: Path | None


@dataclass(frozen=True)
class ExportReport:
    """What the export did. ``max_relative_error``: against the source, of its largest output.

    ``weight_bytes``: of all constants in FP32; ``notes``: for the user, such as why no decoder.
    """

    max_relative_error: float
    batch_sizes: tuple[int, ...]
    opset: int
    parameters: int
    weight_bytes: int
    seconds: float
    decoder_error: float | None = None
    notes: tuple[str, ...] = ()


def export_denoiser(
    denoiser: Denoiser,
    folder: Path,
    talk: Talk | None = None,
    *,
    first_token_apart: bool = False,
    release: bool = False,
) -> ExportReport:
    """Write ``denoiser`` into ``folder``; compare the file, run by ONNX Runtime, with its source.

    ``first_token_apart``: cross-attention gets the keys and values of the text's first token as
    constants (``graph.passes.first_token``). ``release``: let go of the denoiser's own weights on
    the way, so that those of the file are not held beside them.

    Raises ModelError when a weight is not finite, when the graph cannot be exported, when its output
    is nothing that a sampler takes or mixes the samples of a batch, or when the outputs differ by
    more than the network's tolerance (1e-3 of the largest for a module).
    """
    talk, started = talk or Talk(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    model = denoiser.network.to_onnx(talk)
    check_finite(model)
    check_repeats(model)
    spec, notes, decoder_error = denoiser.spec, list(denoiser.notes), None
    if first_token_apart:
        spec, note = keep_first_token_apart(model, spec, denoiser.conditions)
        notes.append(note)
    save_model(model, folder / MODEL)
    opset = model.graph.opset_imports[""]
    parameters, weight_bytes = _sizes(model)
    del model
    error = _compared_with_source(denoiser, folder / MODEL, release)
    if denoiser.decoder is not None:
        decoder_error, note = _export_decoder(denoiser.decoder, spec, folder / DECODER, talk)
        notes += [note] if note else []
    if decoder_error is not None:
        spec = spec.model_copy(update={"decoder": DECODER})
    spec.save(folder / SPEC)
    denoiser.conditions.save(folder / CONDITIONS)
    return ExportReport(
        max_relative_error=error,
        batch_sizes=CHECK_BATCHES,
        opset=opset,
        parameters=parameters,
        weight_bytes=weight_bytes,
        seconds=time.monotonic() - started,
        decoder_error=decoder_error,
        notes=tuple(notes),
    )


def _sizes(model: ir.Model) -> tuple[int, int]:
    """Return the number of elements of all constants, and their bytes."""
    values = [value.const_value for value in model.graph.initializers.values()]
    tensors = [tensor for tensor in values if tensor is not None]
    return sum(int(tensor.size) for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def keep_first_token_apart(
    model: ir.Model, spec: DenoiserSpec, conditions: Conditions
) -> tuple[DenoiserSpec, str]:
    """Rewrite ``model`` by ``graph.passes.first_token``; return its new description and a note.

    Raises UsageError where cross-attention reads no text itself, or its first token varies.
    """
    tokens: dict[str, tuple[float, ...]] = {}
    products = 0
    for name in (item.name for item in spec.conditions if len(item.shape) == 2):
        readers = len(projections(model, name))
        if readers:
            token = common_first_token(name, conditions.arrays[name])
            FirstTokenPass(name, token)(model)
            products += readers
            tokens[name] = tuple(float(np.float32(value)) for value in token)
    if not tokens:
        raise UsageError(
            "first_token: precomputed found no product that reads a text's tokens itself.",
            "It is for the keys and values of cross-attention, as in UNet2DConditionModel; use quantized.",
        )
    note = (
        f"The first token of {', '.join(tokens)} is kept apart (MixDQ): its rows of {products} products are FP16 "
        "constants, for that token alone."
    )
    return spec.model_copy(update={"first_tokens": tokens}), note


def load_exported(folder: Path) -> ExportedModel:
    """Read back what ``export_denoiser`` wrote into ``folder``."""
    spec = DenoiserSpec.load(folder / SPEC)
    decoder = folder / spec.decoder if spec.decoder else None
    return ExportedModel(folder / MODEL, spec, Conditions.load(folder / CONDITIONS), decoder)


def save_model(model: ir.Model, path: Path) -> None:
    """Write ``model`` to ``path``, its larger constants into one file ``NAME.data`` beside it."""
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=INLINE_BYTES)


COMPARING = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
)


def check_finite(model: ir.Model) -> None:
    """Raise ModelError naming the first weight that holds NaN, or Inf unless compared with.

    And the first layer's weight that FP16 does not hold: in an engine it would be infinite or
    clipped, however few bits it is stored in.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        compared = all(node.op_type in COMPARING for node, _ in value.uses())
        array = tensor.numpy()
        wrong = int(np.count_nonzero(np.isnan(array) if compared else ~np.isfinite(array)))
        if wrong:
            raise ModelError(
                f"The weight '{name}' holds {wrong:,} values that are NaN or infinite.",
                "The file is damaged, or the model diverged in training: use another checkpoint.",
            )
        layer = any(node.op_type in LAYER_OPS and index == 1 for node, index in value.uses())
        largest = max(array.max(initial=0.0), -array.min(initial=0.0)) if layer else 0.0
        if largest > LARGEST:
            raise ModelError(
                f"The weight '{name}' holds {largest:.3g}, which is beyond FP16 (65,504).",
                "Divide the layer's weight and bias by a factor, and multiply what it gives by it.",
            )


def check_repeats(model: ir.Model) -> None:
    """Raise ModelError for a node that draws random numbers: its outputs could not be compared."""
    for node in model.graph:
        if node.domain in STANDARD_DOMAINS and (node.op_type in RANDOM or _drops(node)):
            raise ModelError(
                f"The node '{node.name}' ({node.op_type}) draws random numbers: the model's output is not "
                "reproducible.",
                "Export it in evaluation mode, or with that noise as an input (one of conditions).",
            )


def _drops(node: ir.Node) -> bool:
    """Whether ``node`` is a Dropout in training mode, from opset 12 its third input."""
    training = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
    constant = None if training is None else training.const_value
    return training is not None and (constant is None or bool(constant.numpy().any()))


def _compared_with_source(denoiser: Denoiser, path: Path, release: bool) -> float:
    """Return the file's largest relative error over random inputs of each size; refuse a large one."""
    random = np.random.default_rng(CHECK_SEED)
    names = denoiser.spec.size_names or ("",)
    sized = [_at_size(denoiser, number) for number in range(len(names))]
    between = _between(denoiser)
    if between is not None:
        names, sized = (*names, between[0]), [*sized, between[1]]
    cases = [
        (name, one.spec, _case(one, count, random))
        for name, one in zip(names, sized)
        for count in CHECK_BATCHES
    ]
    references = []
    for name, _, feeds in cases:
        with _at(name, name in denoiser.spec.size_names):
            references.append(denoiser.network.reference(feeds))
    if release:
        denoiser.network.release()
    for (_, spec, feeds), reference in zip(cases, references):
        check_output(spec, reference.shape)
        if not np.isfinite(reference).all():
            raise _not_finite(spec, path, feeds)
    session, errors = session_for_few_calls(path), []
    for (name, spec, feeds), reference in zip(cases, references):
        with _at(name, name in denoiser.spec.size_names), _any_batch(denoiser):
            output = run_session(session, spec.output, feeds)
            errors.append(relative_error(output, reference))
        if not errors[-1] <= denoiser.network.tolerance:
            raise ModelError(
                f"The exported model differs from its source by {errors[-1]:.2e} of the largest output.",
                f"That is at {name}. {EACH_SIZE}"
                if name
                else f"{denoiser.spec.name} fixes its batch: export it with a dynamic first axis."
                if _fixes_batch(denoiser)
                else f"At most {denoiser.network.tolerance:g} is expected: please report the model's configuration.",
            )
    # The last case's, which is of several samples.
    _check_apart(session, spec, feeds, output)
    return max(errors)


def _check_apart(
    session: ort.InferenceSession, spec: DenoiserSpec, feeds: dict[str, Array], output: Array
) -> None:
    """Raise ModelError where the first of several samples gives something else by itself.

    ``output``: for all of ``feeds`` at once. Batches of calibration, of evaluation and of the
    engine differ, so each would then be of another model.
    """
    batched = {item.name for item in spec.inputs if item.batched}
    first = {name: value[:1] if name in batched else value for name, value in feeds.items()}
    error = relative_error(run_session(session, spec.output, first), output[:1])
    if not error <= APART:
        raise ModelError(
            f"{spec.name} mixes the samples of a batch: what it gives for a sample changes with the samples beside "
            f"it, by {error:.2e} of the largest output.",
            "Export it in evaluation mode, with no BatchNormalization in training mode and nothing that is reduced "
            "or normalized over the batch axis.",
        )


def _at_size(denoiser: Denoiser, number: int) -> Denoiser:
    """Return the denoiser at one of its sizes."""
    spec, given = denoiser.spec, denoiser.conditions
    arrays = spec.conditions_at(number, given.arrays)
    rows = len(next(iter(arrays.values()))) if arrays else given.rows
    conditions = replace(given, arrays=arrays, rows=rows)
    return replace(denoiser, spec=spec.at_size(number), conditions=conditions)


def _between(denoiser: Denoiser) -> tuple[str, Denoiser] | None:
    """Return the denoiser one step above the smallest size of its range, and that size.

    None without a range, for tokens, and where an input's shape at that size is unknown.
    """
    spec = denoiser.spec
    if not spec.size_step or len(spec.sample.shape) != 3:
        return None
    width, height = (min(min(one) + spec.size_step, max(one)) for one in zip(*spec.sizes))
    within = spec.within((width, height))
    if within is None:
        return None
    largest = _at_size(denoiser, spec.largest_first[0])
    arrays = within.cut(largest.conditions.arrays)
    conditions = replace(largest.conditions, arrays=arrays)
    return str(ImageSize(width, height)), replace(largest, spec=within, conditions=conditions)


@contextmanager
def _at(size: str, named: bool = True) -> Iterator[None]:
    """Name the ``size`` of several at which a model cannot be run. Raises ModelError.

    ``named``: whether the user named it, or it lies between the corners of a range.
    """
    try:
        yield
    except (MpqError, RuntimeError, ValueError, IndexError) as error:
        if not size:
            raise
        hint = EACH_SIZE if named else "Name the model's step: --sizes FROM:TO:STEP."
        raise ModelError(f"The model cannot be run at {size}: {gist(error)}", hint) from error


def _fixes_batch(denoiser: Denoiser) -> bool:
    """Whether the source takes one number of samples alone, and the export was made to take any."""
    return getattr(denoiser.network, "batch", None) is not None


@contextmanager
def _any_batch(denoiser: Denoiser) -> Iterator[None]:
    """Say of a file of a fixed batch that it is the reason. Raises ModelError."""
    try:
        yield
    except ModelError as error:
        if not _fixes_batch(denoiser):
            raise
        raise ModelError(
            f"{denoiser.spec.source} fixes its batch, and its graph cannot be made to take another: {gist(error)}",
            EXPORT_HINT,
        ) from error


def _case(denoiser: Denoiser, count: int, random: np.random.Generator) -> dict[str, Array]:
    """Return random inputs of ``count`` calls."""
    spec = denoiser.spec
    if spec.recorded:
        return _recorded_case(denoiser, count)
    sample = random.standard_normal((count, *spec.sample.shape), np.float32)
    timesteps = random.choice(_timesteps(denoiser), count).astype(np.float32)
    rows = random.integers(0, denoiser.conditions.rows, count)
    if spec.timestep is None:
        sample = denoiser.conditions.arrays[spec.sample.name][rows]
    timestep = timesteps if spec.timestep is None or spec.timestep.batched else float(timesteps[0])
    return model_feeds(spec, sample, timestep, denoiser.conditions.take(rows))


def _recorded_case(denoiser: Denoiser, count: int) -> dict[str, Array]:
    """Return the inputs of ``count`` recorded calls, the same ones again where there are fewer."""
    arrays = denoiser.conditions.take(np.arange(count) % denoiser.conditions.rows)
    feeds = {}
    for item in denoiser.spec.inputs:
        values = arrays[item.name].reshape(count, *item.shape).astype(item.dtype)
        feeds[item.name] = values if item.batched else values[0]
    return feeds


def _timesteps(denoiser: Denoiser) -> Array:
    """Return the timesteps to compare at; a diffusers scheduler's own may lie between 0 and 1."""
    spec = denoiser.spec
    if denoiser.first_timestep is not None:
        spread = denoiser.first_timestep * np.arange(1, CHECK_STEPS + 1) / CHECK_STEPS
        return spread if spec.timestep is None or "int" not in spec.timestep.dtype else spread // 1
    if not spec.config or spec.timestep is None:
        return np.arange(CHECK_TIMESTEPS)
    return make_sampler(spec.scheduler, CHECK_STEPS).timesteps


def _not_finite(spec: DenoiserSpec, path: Path, feeds: dict[str, Array]) -> ModelError:
    where = first_not_finite(path, feeds) or f"'{spec.output}'"
    at = ""
    if spec.timestep is not None:
        at = f" at timestep {np.ravel(feeds[spec.timestep.name])[0]:g}"
    return ModelError(
        f"The model gives NaN or Inf on standard normal noise{at}: first in {where}.",
        "Check the weights up to there: the model may have diverged, or need another input range.",
    )


def _export_decoder(
    decoder: Network, spec: DenoiserSpec, path: Path, talk: Talk
) -> tuple[float | None, str]:
    """Export the decoder; return its largest relative error, or None and the reason it failed."""
    try:
        return _write_decoder(decoder, spec, path, talk), ""
    except ModelError as reason:
        tell_cause(reason)
        note = f"The decoder was not exported, samples are compared as latents: {reason.message}"
        talk.warn(note)
        return None, note


def _write_decoder(decoder: Network, spec: DenoiserSpec, path: Path, talk: Talk) -> float:
    """Export what turns latents into images, with one input; return its largest relative error."""
    model = decoder.to_onnx(talk)
    check_finite(model)
    save_model(model, path)
    random = np.random.default_rng(CHECK_SEED)
    latents = random.standard_normal((CHECK_BATCHES[-1], *spec.sample.shape), np.float32)
    session, error = session_for_few_calls(path), 0.0
    for shape in spec.sample.sizes or (spec.sample.shape,):
        feeds = {session.get_inputs()[0].name: cut_to(latents, shape)}
        made = session.run(None, feeds)[0]
        error = max(error, relative_error(made, decoder.reference(feeds)))
    if not error <= decoder.tolerance:
        raise ModelError(f"The exported decoder differs from its source by {error:.2e}.")
    return error


def relative_error(output: Array, reference: Array) -> float:
    """Return max |output - reference| / max |reference|; Inf for other shapes or if not finite."""
    if output.shape != reference.shape or not np.isfinite(output).all():
        return float("inf")
    largest = float(np.max(np.abs(reference)))
    return float(np.max(np.abs(output - reference))) / max(
        largest, float(np.finfo(np.float32).tiny)
    )
