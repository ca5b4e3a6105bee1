"""Evaluate quantized graphs against the float one: same noise, same sampler, ONNX Runtime.

In: ONNX files by the variant's name and the float model. Out: an ``Evaluation``. The float model's
own trajectories give the inputs on which the outputs are compared; they come from another seed than
calibration's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mpq_deploy.calls.corrected import corrected_sampler
from mpq_deploy.calls.loop import DenoiserCall, GuidedDenoiser, denoise, first_samples
from mpq_deploy.calls.sampler import Sampler, make_sampler
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.evaluate.cache import SampleCache, arrays_digest, model_digest, model_files
from mpq_deploy.evaluate.decode import decode, decoder_path
from mpq_deploy.evaluate.evaluation_result import Evaluation, ImageKind, VariantResult
from mpq_deploy.evaluate.images import (
    data_range,
    pooled_psnr_db,
    psnr_db,
    psnr_db_each,
    ssim_each,
    to_uint8,
    to_unit,
)
from mpq_deploy.evaluate.output_error import nmse, stride_midpoints, taken_turns
from mpq_deploy.models.spec import Array, DenoiserSpec, FloatModel
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.runtime.correction import Correction
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.parallel.job_files import Files
from mpq_deploy.system.parallel.work import Alone, Crew, Job, Result, Shard, Work, run_shards
from mpq_deploy.system.progress import Talk

# A change here makes every cache entry stale.
CACHE_FORMAT = 2
FLOAT = "float"
# What a diffusers VAE decodes to, unless the denoiser's description says otherwise.
DECODED_RANGE = (-1.0, 1.0)


@dataclass(frozen=True)
class Variant:
    """A quantized graph: its file, its deployed bytes, and a correction of its output.

    The size is passed through; the correction applies to the error and before every step of the
    sampler.
    """

    path: Path
    size_bytes: int | None = None
    correction: Correction | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the graph and its weights."""
        return model_digest(self.path)


@dataclass(frozen=True)
class Setup:
    """What every variant has in common."""

    spec: DenoiserSpec
    conditions: dict[str, Array]
    settings: EvaluateSettings
    rows: Array
    decoder: Path | None
    talk: Talk

    @classmethod
    def of(cls, model: FloatModel, settings: EvaluateSettings, talk: Talk) -> Setup:
        """Choose the samples' conditions; the decoder lies beside the model."""
        spec, first = model.spec, model.spec.calibration_rows or 0
        rows = first + spread_rows(
            _condition_count(model.conditions) - first, settings.samples, spec.uncond_row
        )
        return cls(
            spec, model.conditions, settings, rows, decoder_path(spec, model.path.parent), talk
        )


def evaluate(
    variants: Mapping[str, Variant],
    model: FloatModel,
    settings: EvaluateSettings,
    talk: Talk | None = None,
    *,
    cache: Path | None = None,
    crew: Crew | None = None,
) -> Evaluation:
    """Compare each of ``variants`` (by name, such as ours, int8, int4) with the float ``model``.

    ``cache`` is a folder in which samples are kept by content, so that only what changed is
    sampled. ``crew``: who samples, one model each (None: this process). Raises ModelError naming
    variant and timestep for an output that is not finite.
    """
    talk = talk or Talk()
    _check(variants, model.spec)
    setup = Setup.of(model, settings, talk)
    store, common = SampleCache(cache, talk), _common_key(setup, model.path)
    files, job = _job(setup, [model.path, *(variant.path for variant in variants.values())])
    results: dict[str, VariantResult] = {}
    with (crew or Alone()).open(job, talk) as pool:
        task = _Part(FLOAT, files.below(model.path))
        part = Shard("float", task, settings.steps, {**common, "part": "float"})
        (reference,) = run_shards(pool, "sample the float model", [part], talk, store)
        kind, value_range = _pixels(setup, reference["images"])
        images = {FLOAT: to_uint8(reference["images"], value_range)}
        shards = [
            _shard(name, files, variants[name], reference, common, settings.steps)
            for name in variants
        ]
        sampled = run_shards(pool, "evaluate", shards, talk, store)
        for name, arrays in zip(variants, sampled, strict=True):
            results[name] = _scored(reference, arrays, value_range, variants[name])
            images[name] = to_uint8(arrays["images"], value_range)
    return Evaluation(
        settings=settings,
        timesteps=tuple(float(t) for t in reference["timesteps"]),
        rows=tuple(int(row) for row in setup.rows),
        labels=tuple(_labels(setup)),
        sampler=str(reference["sampler"]),
        image_kind=kind,
        variants=results,
        images=images,
        float_digest=str(common["float"]),
        notes=(*_notes(setup, kind, value_range), *_correction_notes(setup, variants)),
    )


def _job(setup: Setup, models: list[Path]) -> tuple[Files, Job]:
    """Return the files of all models, and the job whose workers open one at a time."""
    models = models if setup.decoder is None else [*models, setup.decoder]
    files = Files.of(file for model in dict.fromkeys(models) for file in model_files(model))
    # A worker has the float model and then a variant, as it is and prepared for the kernels.
    largest = 2 * max(sum(file.stat().st_size for file in model_files(model)) for model in models)
    # Workers get paths relative to the root, and no progress.
    told = replace(
        setup, decoder=None if setup.decoder is None else files.below(setup.decoder), talk=Talk()
    )
    return files, Job("evaluation", partial(_open, told), files.root, files.names, largest)


def _shard(
    name: str,
    files: Files,
    variant: Variant,
    reference: dict[str, Array],
    common: dict[str, Any],
    steps: int,
) -> Shard:
    """Return the shard that runs a variant on the float model's calls, and samples it."""
    key = {**common, "part": "variant", "variant": variant.digest}
    if variant.correction is not None:
        key["correction"] = variant.correction.as_json()
    known = {name: array for name, array in reference.items() if name != "images"}
    task = _Part(name, files.below(variant.path), known, variant.correction)
    return Shard(name, task, len(reference["timesteps"]) + steps, key)


def spread_rows(available: int, samples: int, uncond_row: int | None = None) -> Array:
    """Choose a condition for each sample, int64 [samples], spread evenly.

    The row for classifier-free guidance is left out where there are others; without conditions all
    rows are 0.
    """
    rows = np.array([row for row in range(available) if row != uncond_row] or [0], np.int64)
    if samples <= len(rows):
        return rows[stride_midpoints(len(rows), samples)]
    return rows[np.arange(samples) % len(rows)]


@dataclass(frozen=True)
class _Part:
    """A worker's task: the float model's samples, or a variant's and its error on float inputs.

    ``path`` is relative to the job's root.
    """

    name: str
    path: Path
    reference: dict[str, Array] | None = None
    correction: Correction | None = None


def _open(setup: Setup, root: Path, talk: Talk) -> Work:
    """Return what makes a ``_Part``."""

    def work(part: _Part, inner: Talk) -> Result:
        here = replace(
            setup, decoder=None if setup.decoder is None else root / setup.decoder, talk=inner
        )
        if part.reference is None:
            return _reference(here, root / part.path)
        return _variant(here, part.name, root / part.path, part.reference, part.correction)

    return work


def _reference(setup: Setup, path: Path) -> dict[str, Array]:
    """Sample the float model; keep its images, and its inputs and outputs at the chosen timesteps."""
    sampler = make_sampler(
        setup.spec.scheduler, setup.settings.steps, setup.settings.seed, setup.settings.sampler
    )
    chosen = stride_midpoints(len(sampler.timesteps), setup.settings.timesteps)
    watched = _Watched(OrtDenoiser(path, setup.spec), FLOAT, {int(index) for index in chosen})
    samples = _sample(setup, watched, watched)
    inputs, outputs, rows = watched.recorded(setup.settings.calls)
    return {
        "images": _decoded(setup, samples),
        "inputs": inputs,
        "outputs": outputs,
        "input_rows": rows,
        "timesteps": np.asarray(sampler.timesteps, np.float64)[chosen],
        "sampler": np.array(sampler.name),
    }


def _variant(
    setup: Setup, name: str, path: Path, reference: dict[str, Array], correction: Correction | None
) -> dict[str, Array]:
    """Run a variant on the float model's inputs, and sample it from the same noise."""
    # Q/DQ pairs stay as written: integer kernels of some CPUs saturate, which no target does.
    watched = _Watched(OrtDenoiser(path, setup.spec, fake_quant_only=True), name)
    errors, batch = [], setup.settings.batch_size
    with setup.talk.bar(f"output error of {name}", len(reference["timesteps"])) as advance:
        for timestep, inputs, expected, rows in zip(
            *(reference[key] for key in ("timesteps", "inputs", "outputs", "input_rows")),
            strict=True,
        ):
            outputs = []
            for start in range(0, len(inputs), batch):
                chunk = slice(start, start + batch)
                taken = {key: values[rows[chunk]] for key, values in setup.conditions.items()}
                output = watched(inputs[chunk], float(timestep), taken)
                outputs.append(correction.apply(output, float(timestep)) if correction else output)
            errors.append(nmse(expected, np.concatenate(outputs)))
            advance(1)
    return {
        "nmse": np.array(errors),
        "images": _decoded(setup, _sample(setup, watched, correction=correction)),
    }


def _sampler(setup: Setup, correction: Correction | None = None) -> tuple[Sampler, str]:
    """Return the sampler and, with a correction, what of it applies."""
    settings = setup.settings
    sampler = make_sampler(setup.spec.scheduler, settings.steps, settings.seed, settings.sampler)
    return (
        (sampler, "") if correction is None else corrected_sampler(sampler, correction, setup.spec)
    )


def _sample(
    setup: Setup,
    denoiser: DenoiserCall,
    watched: _Watched | None = None,
    correction: Correction | None = None,
) -> Array:
    settings = setup.settings
    sampler, _ = _sampler(setup, correction)
    noise = first_samples(setup.spec, setup.rows, setup.conditions, settings.seed)
    model = GuidedDenoiser(
        denoiser, setup.spec, setup.conditions, watched.on_call if watched else None
    )
    return denoise(model, sampler, noise, setup.rows, settings.batch_size, setup.talk)


class _Watched:
    """A denoiser whose output is checked, and recorded at the chosen steps."""

    def __init__(self, denoiser: DenoiserCall, name: str, steps: set[int] | None = None) -> None:
        self._denoiser, self._name, self._steps = denoiser, name, steps or set()
        self._step = -1
        self._calls: dict[int, list[tuple[Array, Array, Array]]] = {}
        self._pending: tuple[Array, Array] | None = None

    def on_call(self, step_index: int, timestep: float, sample: Array, rows: Array) -> None:
        """Note what the next call is for (the loop calls this first)."""
        self._step, self._pending = step_index, (sample, rows)

    def __call__(
        self, sample: Array, timestep: float | Array, conditions: dict[str, Array]
    ) -> Array:
        """Return the denoiser's output; ModelError when it is not finite."""
        output = self._denoiser(sample, timestep, conditions)
        if not np.isfinite(output).all():
            raise ModelError(
                f"The output of '{self._name}' is not finite at timestep {float(np.ravel(timestep)[0]):g}.",
                "Check the model's weights and activations for values beyond the range of FP16; protect the "
                "layers concerned in the recipe.",
            )
        if self._step in self._steps and self._pending is not None:
            self._calls.setdefault(self._step, []).append(
                (self._pending[0], output, self._pending[1])
            )
            self._pending = None
        return output

    def recorded(self, calls: int | None) -> tuple[Array, Array, Array]:
        """Return inputs and outputs [K, M, ...] and condition rows [K, M] of the chosen steps.

        Of the M' calls at a step those whose turn it is (``taken_turns``).
        """
        steps = [
            [np.concatenate(part) for part in zip(*self._calls[index])]
            for index in sorted(self._calls)
        ]
        turns = taken_turns(len(steps[0][2]), len(steps), calls)
        inputs, outputs, rows = (
            np.stack([step[i][turn] for step, turn in zip(steps, turns, strict=True)])
            for i in range(3)
        )
        return inputs, outputs, rows


def _decoded(setup: Setup, samples: Array) -> Array:
    if setup.decoder is None:
        return _as_maps(samples)
    return decode(setup.decoder, samples, setup.settings.batch_size, setup.talk)


def _pixels(setup: Setup, reference: Array) -> tuple[ImageKind, tuple[float, float]]:
    """Return what the compared arrays are, and the range that is mapped to [0, 1]."""
    if setup.decoder is not None:
        return "decoded", setup.spec.pixel_range or DECODED_RANGE
    if setup.spec.pixel_range is not None:
        return "pixels", setup.spec.pixel_range
    return "features" if setup.spec.timestep is None else "latents", data_range(reference)


def _as_maps(values: Array) -> Array:
    """Return samples as [N, C, H, W]: tokens [N, T, C] as one map, frames [N, C, F, H, W] below each other."""
    if values.ndim == 4:
        return values
    if values.ndim > 4:
        return values.reshape(*values.shape[:2], -1, values.shape[-1])
    return values.reshape(len(values), 1, -1, values.shape[-1])


def _scored(
    reference: dict[str, Array],
    arrays: dict[str, Array],
    value_range: tuple[float, float],
    variant: Variant,
) -> VariantResult:
    expected, images = (
        to_unit(reference["images"], value_range),
        to_unit(arrays["images"], value_range),
    )
    errors = tuple(float(error) for error in arrays["nmse"])
    alike = ssim_each(expected, images)
    return VariantResult(
        digest=variant.digest,
        size_bytes=variant.size_bytes,
        nmse_by_timestep=errors,
        measured_nmse=float(np.mean(errors)),
        psnr_db=psnr_db(expected, images),
        pooled_psnr_db=pooled_psnr_db(expected, images),
        ssim=float(np.mean(alike)),
        psnr_db_each=tuple(float(value) for value in psnr_db_each(expected, images)),
        ssim_each=tuple(float(value) for value in alike),
    )


def _check(variants: Mapping[str, Variant], spec: DenoiserSpec) -> None:
    if not variants or FLOAT in variants:
        raise UsageError(
            f"The variants to evaluate are {list(variants)}.",
            f"Name at least one, and none '{FLOAT}': that is the reference.",
        )
    if spec.pixel_range is not None:
        to_unit(np.zeros(1), spec.pixel_range)


def _condition_count(conditions: Mapping[str, Array]) -> int:
    counts = {name: len(values) for name, values in conditions.items()}
    if len(set(counts.values())) > 1:
        raise ModelError(
            f"The conditions differ in their number of rows: {counts}.", "Give each the same rows."
        )
    return next(iter(counts.values()), 0)


def _labels(setup: Setup) -> list[str]:
    if not setup.conditions:
        return [f"sample {number + 1}" for number in range(len(setup.rows))]
    labels = setup.spec.labels
    return [labels[row] if row < len(labels) else f"condition {row}" for row in setup.rows]


def _notes(setup: Setup, kind: ImageKind, value_range: tuple[float, float]) -> list[str]:
    notes = []
    if kind == "latents":
        notes.append(
            "The samples are latents and there is no decoder: PSNR and SSIM compare latents, with the float "
            f"samples' range [{value_range[0]:.3g}, {value_range[1]:.3g}] as the peak, and pictures show their "
            "first channels."
        )
    if kind == "features":
        notes.append(
            "The outputs are no images: PSNR and SSIM compare them as maps of tokens by channels, with the float "
            f"outputs' range [{value_range[0]:.3g}, {value_range[1]:.3g}] as the peak."
        )
    if kind == "decoded":
        notes.append(
            f"The samples are latents, decoded in float by {setup.spec.decoder} for every variant alike."
        )
    if setup.spec.guidance_scale != 1 and setup.spec.uncond_row is not None:
        notes.append(
            f"Samples use classifier-free guidance of {setup.spec.guidance_scale:g}; the output's error is that "
            "of single calls, conditioned and not."
        )
    return notes


def _correction_notes(setup: Setup, variants: Mapping[str, Variant]) -> list[str]:
    return [
        f"{name}: PTQD's correction, {one.correction.summary()}; {_sampler(setup, one.correction)[1]}."
        for name, one in variants.items()
        if one.correction is not None
    ]


def _common_key(setup: Setup, float_model: Path) -> dict[str, Any]:
    spec = setup.spec.model_dump(
        mode="json", exclude={"name", "source", "labels", "synthetic", "pixel_range"}
    )
    settings = setup.settings
    return {
        "format": CACHE_FORMAT,
        "float": model_digest(float_model),
        "spec": spec,
        "conditions": arrays_digest(setup.conditions),
        "rows": [int(row) for row in setup.rows],
        "decoder": None if setup.decoder is None else model_digest(setup.decoder),
        "samples": settings.samples,
        "steps": settings.steps,
        "timesteps": settings.timesteps,
        "calls": settings.calls,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "sampler": settings.sampler,
        "onnxruntime": ort.__version__,
    }
