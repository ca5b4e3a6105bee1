"""Evaluate quantized graphs against the float one: same noise, same sampler, ONNX Runtime.

In: ONNX files by the variant's name and the float model. Out: an ``Evaluation``. The float model's
own trajectories give the inputs on which the outputs are compared; they come from another seed than
calibration's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mpq_deploy.calls.corrected import corrected_sampler
from mpq_deploy.calls.loop import GuidedDenoiser, denoise, first_samples
from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.calls.sampler import Sampler, keeps_samples_apart, make_sampler
from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.cache import (
    SampleCache,
    arrays_digest,
    folder_stamp,
    model_digest,
    model_files,
)
from mpq_deploy.evaluate.decode import decode
from mpq_deploy.evaluate.evaluation_result import Evaluation, ImageKind, VariantResult
from mpq_deploy.evaluate.float_samples import float_pieces, joined_pieces, piece_keys
from mpq_deploy.evaluate.images import (
    as_maps,
    data_range,
    is_picture,
    pooled_psnr_db,
    psnr_db,
    psnr_db_each,
    ssim_each,
    to_uint8,
    to_unit,
)
from mpq_deploy.evaluate.interval import error_interval
from mpq_deploy.evaluate.output_error import nmse, nmse_each, stride_midpoints
from mpq_deploy.evaluate.recorded_outputs import recorded_images, recorded_reference
from mpq_deploy.evaluate.sequential import groups_of, paired_difference
from mpq_deploy.evaluate.setup import OWNERS, Part, Setup, finite_output, in_turn, joined_parts
from mpq_deploy.models.spec import Array, DenoiserSpec, FloatModel
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.runtime.correction import Correction
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.compute import Compute, computing_on
from mpq_deploy.system.lanes import in_lanes
from mpq_deploy.system.parallel.job_files import Files
from mpq_deploy.system.parallel.work import Alone, Crew, Job, Pool, Result, Shard, Work, run_shards
from mpq_deploy.system.progress import Talk

# A change here makes every cache entry stale.
CACHE_FORMAT = 4
FLOAT = "float"
# What pipelines return as pictures.
PICTURES = (0.0, 1.0)
# What a diffusers VAE decodes to, unless the denoiser's description says otherwise.
DECODED_RANGE = (-1.0, 1.0)


@dataclass(frozen=True)
class Variant:
    """A quantized graph: its file, its deployed bytes, a correction of its output, its layers by family.

    Size and layers are passed through; the correction applies to the error and before every step of
    the sampler. A control is compared with the first of the variants.
    """

    path: Path
    size_bytes: int | None = None
    correction: Correction | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    is_control: bool = False

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the graph and its weights."""
        return model_digest(self.path)


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
    store, common = SampleCache(cache, talk), reference_key(setup, model.path)
    files, job = _job(setup, [model.path, *(variant.path for variant in variants.values())])
    results: dict[str, VariantResult] = {}
    # A pipeline's files, and recorded calls, are on this machine alone.
    here = setup.pipeline is not None or setup.calls is not None
    with (crew if crew and not here else Alone()).open(job, talk) as pool:
        reference = _float_model(setup, files.below(model.path), common, pool, store)
        kind, value_range = _pixels(setup, reference["images"])
        images = {FLOAT: to_uint8(reference["images"], value_range)}
        compared = _Compared(setup, files, variants, common, reference, value_range)
        for name, arrays in compared.sample(pool, talk, store).items():
            images[name] = to_uint8(arrays["images"], value_range)
            results[name] = compared.scored(name, arrays, next(iter(results.values()), None))
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
        notes=(*_notes(setup, kind, value_range), *_further_notes(setup, variants)),
    )


def _float_model(
    setup: Setup, path: Path, common: dict[str, Any], pool: Pool, store: SampleCache
) -> dict[str, Array]:
    """Return the float model's images, and the calls that variants are compared on, with its outputs."""
    settings, count = setup.settings, len(setup.rows)

    def sample(images: range | None) -> dict[str, Array]:
        task = Part(FLOAT, path, images=images)
        shard = Shard("float", task, settings.steps, {**common, "part": "float"})
        kept = store if images is None else None
        (made,) = run_shards(pool, "sample the float model", [shard], setup.talk, kept)
        return made

    if setup.calls is not None:
        return sample(None)
    pieces = float_pieces(common, setup.rows, _piece_size(setup), store, sample)
    calls, outputs = joined_pieces(pieces)
    if setup.pipeline is None:
        images = np.concatenate([piece["images"] for piece in pieces])
        owners = _images_of(setup, calls.count)
    else:
        from mpq_deploy.calls.record_pipeline import joined_images

        images = joined_images([piece["images"] for piece in pieces])
        # Image by image, each with about as many calls.
        owners = np.arange(calls.count) * count // calls.count
    return {
        "images": images,
        **in_turn(calls, outputs, settings.calls, owners),
        "sampler": pieces[0]["sampler"],
    }


def _piece_size(setup: Setup) -> int:
    """Return how many of the float model's images are sampled, and kept, together."""
    if setup.pipeline is not None:
        return 1
    apart = keeps_samples_apart(_sampler(setup)[0])
    return setup.settings.batch_size if apart else len(setup.rows)


def kept_samples(
    model: FloatModel, settings: EvaluateSettings, controls: Collection[Path], cache: Path
) -> tuple[int, int]:
    """Return how many images of the float model, and how many of the ``controls``, ``cache`` holds samples of."""
    keys = list(SampleCache(cache, Talk()).keys())
    if not keys or model.spec.recorded:
        return 0, 0
    setup = Setup.of(model, settings, Talk())
    common = json.loads(json.dumps(reference_key(setup, model.path)))
    pieces = piece_keys(common, setup.rows, _piece_size(setup))
    found = {
        key["variant"]
        for key in keys
        if key.get("part") == "variant" and common.items() <= key.items()
    }
    known = sum(model_digest(path) in found for path in controls) if found else 0
    return sum(len(piece) for piece, key in pieces if key in keys), known


def _job(setup: Setup, models: list[Path]) -> tuple[Files, Job]:
    """Return the files of all models, and the job whose workers open one at a time."""
    models = models if setup.decoder is None else [*models, setup.decoder]
    every = {model: model_files(model) for model in models}
    files = Files.of(file for some in every.values() for file in some)
    # A worker has the float model and then a variant, as it is and prepared for the kernels.
    largest = 2 * max(sum(file.stat().st_size for file in some) for some in every.values())
    # Workers get paths relative to the root, and no progress.
    told = replace(
        setup, decoder=None if setup.decoder is None else files.below(setup.decoder), talk=Talk()
    )
    return files, Job("evaluation", partial(_open, told), files.root, files.names, largest)


@dataclass(frozen=True)
class _Compared:
    """The variants beside the float model: their shards, what these give, and what is said of it."""

    setup: Setup
    files: Files
    variants: Mapping[str, Variant]
    common: dict[str, Any]
    reference: dict[str, Array]
    value_range: tuple[float, float]

    def sample(self, pool: Pool, talk: Talk, store: SampleCache) -> dict[str, dict[str, Array]]:
        """Return what every variant gives; of controls as many groups of images as settle the comparison."""
        controls = [name for name in self.variants if len(self._groups(name)) > 1]
        whole = [name for name in self.variants if name not in controls]
        shards = [self._shard(name) for name in whole]
        found = dict(zip(whole, run_shards(pool, "evaluate", shards, talk, store), strict=True))
        left, plan = controls, self.scored(whole[0], found[whole[0]], None)
        for look, images in enumerate(self._groups(controls[0]) if controls else []):
            shards = [self._shard(name, look) for name in left]
            title = f"controls, images {images.start + 1} to {images.stop}"
            made = run_shards(pool, title, shards, talk, store)
            for name, arrays in zip(left, made, strict=True):
                found[name] = joined_parts(found[name], arrays) if name in found else arrays
            left = [name for name in left if not self.scored(name, found[name], plan).settled]
            if not left:
                break
        return {name: found[name] for name in self.variants}

    def _groups(self, name: str) -> list[range]:
        """Return the groups of images that a variant is sampled in; one, where they depend on each other."""
        setup, settings = self.setup, self.setup.settings
        every = [range(len(setup.rows))]
        alone = name == next(iter(self.variants)) or not self.variants[name].is_control
        if alone or settings.controls_images == "all":
            return every
        if setup.pipeline is None and (
            setup.calls is not None or not keeps_samples_apart(_sampler(setup)[0])
        ):
            return every
        return groups_of(len(setup.rows))

    def _shard(self, name: str, look: int | None = None) -> Shard:
        """Return the shard that runs a variant on the float model's calls, and samples it."""
        variant, reference = self.variants[name], self.reference
        key = {**self.common, "part": "variant", "variant": variant.digest}
        if variant.correction is not None:
            key["correction"] = variant.correction.as_json()
        known = {n: array for n, array in reference.items() if n not in ("images", "sampler")}
        task = Part(name, self.files.below(variant.path), known, variant.correction)
        if look is not None:
            groups, calls = self._groups(name), reference["outputs"].shape[1]
            ends = [-(-calls * at // len(groups)) for at in (look, look + 1)]
            task = replace(task, images=groups[look], calls=range(*ends))
            key["images"] = [groups[look].start, groups[look].stop, *ends]
        return Shard(name, task, len(reference["timesteps"]) + self.setup.settings.steps, key)

    def scored(
        self, name: str, arrays: dict[str, Array], plan: VariantResult | None
    ) -> VariantResult:
        """Return the figures of a variant; of a control also how far it is behind the ``plan``."""
        variant, images = self.variants[name], to_unit(arrays["images"], self.value_range)
        expected = to_unit(self.reference["images"][: len(images)], self.value_range)
        errors = tuple(float(error) for error in arrays["nmse"])
        alike, each = ssim_each(expected, images), psnr_db_each(expected, images)
        behind = None
        if variant.is_control and plan is not None:
            looks = len(self._groups(name))
            behind = paired_difference(plan.psnr_db_each[: len(each)], each.tolist(), looks)
        return VariantResult(
            digest=variant.digest,
            size_bytes=variant.size_bytes,
            nmse_by_timestep=errors,
            measured_nmse=float(np.mean(errors)),
            psnr_db=psnr_db(expected, images),
            pooled_psnr_db=pooled_psnr_db(expected, images),
            ssim=float(np.mean(alike)),
            psnr_db_each=tuple(float(value) for value in each),
            ssim_each=tuple(float(value) for value in alike),
            calls=int(arrays["calls"]),
            layers=dict(variant.layers),
            behind_db=behind,
            nmse_interval=error_interval(arrays["nmse_each"], self._owners(arrays)),
        )

    def _owners(self, arrays: dict[str, Array]) -> Array:
        """Return the image that each of a variant's compared calls is of: the first, where it has fewer."""
        owners: Array = self.reference[OWNERS][:, : arrays["nmse_each"].shape[1]]
        return owners


def _open(setup: Setup, root: Path, talk: Talk) -> Work:
    """Return what makes a ``Part``."""

    def work(part: Part, inner: Talk) -> Result:
        here = replace(
            setup, decoder=None if setup.decoder is None else root / setup.decoder, talk=inner
        )
        if part.reference is None:
            return _reference(here, part, root / part.path)
        return _variant(here, part, root / part.path)

    return work


def _reference(setup: Setup, part: Part, path: Path) -> dict[str, Array]:
    """Sample the float model; keep the part's images, and its calls and outputs at the chosen timesteps."""
    settings = setup.settings
    if setup.pipeline is not None:
        from mpq_deploy.evaluate.pipeline_samples import pipeline_reference

        return pipeline_reference(setup, part, path)
    if setup.calls is not None:
        return recorded_reference(setup, OrtDenoiser(path, setup.spec))
    sampler = make_sampler(setup.spec.scheduler, settings.steps, settings.seed, settings.sampler)
    chosen = stride_midpoints(len(sampler.timesteps), settings.timesteps)
    watched = _Watched(FLOAT, {int(index) for index in chosen})
    samples = _sample(setup, OrtDenoiser.in_lanes(path, setup.spec), watched, part)
    inputs, outputs, rows = watched.recorded()
    timesteps = np.asarray(sampler.timesteps, np.float64)[chosen]
    calls = CallSet.of_samples(setup.spec, inputs, timesteps, rows, setup.conditions)
    return {
        "images": _decoded(setup, samples),
        **calls.arrays(),
        "outputs": outputs,
        "sampler": np.array(sampler.name),
    }


def _images_of(setup: Setup, calls: int) -> Array:
    """Return the image that each of our sampler's ``calls`` is of: with guidance a batch has each twice."""
    count, size = len(setup.rows), setup.settings.batch_size
    batches = (np.arange(start, min(start + size, count)) for start in range(0, count, size))
    return np.concatenate([np.tile(batch, calls // count) for batch in batches])


def _variant(setup: Setup, part: Part, path: Path) -> dict[str, Array]:
    """Run a variant on the float model's calls, and sample it from the same noise."""
    # Q/DQ pairs stay as written: integer kernels of some CPUs saturate, which no target does.
    denoiser = OrtDenoiser.in_lanes(path, setup.spec, fake_quant_only=True)
    assert part.reference is not None
    errors = _errors(setup, part, denoiser, part.reference)
    if setup.pipeline is not None:
        from mpq_deploy.evaluate.pipeline_samples import pipeline_images

        return {**errors, "images": pipeline_images(setup, part, denoiser)}
    if setup.calls is not None:
        return {**errors, "images": recorded_images(setup, part, denoiser)}
    samples = _sample(setup, denoiser, _Watched(part.name), part)
    return {**errors, "images": _decoded(setup, samples)}


def _errors(
    setup: Setup, part: Part, denoiser: OrtDenoiser, reference: dict[str, Array]
) -> dict[str, Array]:
    """Return the variant's error at each timestep on the part's calls of the float model.

    ``nmse`` float64 [K], ``nmse_each`` [K, M]: each call's part of it; ``energy`` [K]: what both
    are relative to; ``calls``: M.
    """
    taken, outputs = CallSet.of_arrays(reference), reference["outputs"]
    if part.calls is not None:
        taken = taken.take(np.asarray(part.calls, np.int64))
        outputs = outputs[:, part.calls.start : part.calls.stop]
    energy = np.square(outputs, dtype=np.float64).sum(axis=tuple(range(1, outputs.ndim)))
    if not taken.count:
        each = np.zeros((len(outputs), 0))
        return {"nmse": energy, "nmse_each": each, "energy": energy, "calls": np.array(0)}
    calls, errors, parts = RecordedCalls(taken, setup.spec), [], []
    with setup.talk.bar(f"output error of {part.name}", len(outputs)) as advance:
        given: list[Array] = []
        fed = ((batch, batch.feed) for batch in calls.batches(setup.settings.batch_size))
        made = in_lanes(lambda one: (one[0], denoiser.run(one[1])), fed, denoiser.lanes)
        for batch, output in made:
            finite_output(output, part.name, batch.timestep)
            if part.correction is not None:
                output = part.correction.apply(output, batch.timestep)
            given.append(output)
            if sum(map(len, given)) == len(outputs[batch.step]):
                errors.append(nmse(outputs[batch.step], np.concatenate(given)))
                parts.append(nmse_each(outputs[batch.step], np.concatenate(given)))
                given.clear()
                advance(1)
    found = {"nmse": np.array(errors), "nmse_each": np.stack(parts)}
    return {**found, "energy": energy, "calls": np.array(taken.count)}


def _sampler(setup: Setup, correction: Correction | None = None) -> tuple[Sampler, str]:
    """Return the sampler and, with a correction, what of it applies."""
    settings = setup.settings
    sampler = make_sampler(setup.spec.scheduler, settings.steps, settings.seed, settings.sampler)
    return (
        (sampler, "") if correction is None else corrected_sampler(sampler, correction, setup.spec)
    )


def _sample(
    setup: Setup,
    denoiser: OrtDenoiser,
    watched: _Watched,
    part: Part,
) -> Array:
    settings = setup.settings
    sampler, _ = _sampler(setup, part.correction)
    noise = first_samples(setup.spec, setup.rows, setup.conditions, settings.seed)
    chosen = slice(None)
    if part.images is not None:
        chosen = slice(part.images.start, part.images.stop)
    model = GuidedDenoiser(denoiser, setup.spec, setup.conditions, watched, denoiser.lanes)
    rows = setup.rows[chosen]
    return denoise(model, sampler, noise[chosen], rows, settings.batch_size, setup.talk)


class _Watched:
    """Checks a denoiser's outputs, and records its calls at the chosen steps."""

    def __init__(self, name: str, steps: Collection[int] = ()) -> None:
        self._name, self._steps = name, steps
        self._calls: dict[int, list[tuple[Array, Array, Array]]] = {}

    def __call__(
        self, step_index: int, timestep: float, sample: Array, rows: Array, output: Array
    ) -> None:
        """Take a call. Raises ModelError where the output is not finite."""
        finite_output(output, self._name, timestep)
        if step_index in self._steps:
            self._calls.setdefault(step_index, []).append((sample, output, rows))

    def recorded(self) -> tuple[Array, Array, Array]:
        """Return inputs and outputs [K, N, ...] of the chosen steps, and condition rows [N]."""
        steps = [
            [np.concatenate(part) for part in zip(*self._calls[index])]
            for index in sorted(self._calls)
        ]
        inputs, outputs = (np.stack([step[place] for step in steps]) for place in (0, 1))
        return inputs, outputs, steps[0][2]


def _decoded(setup: Setup, samples: Array) -> Array:
    if setup.decoder is None:
        return as_maps(samples)
    return decode(setup.decoder, samples, setup.settings.batch_size, setup.talk)


def _pixels(setup: Setup, reference: Array) -> tuple[ImageKind, tuple[float, float]]:
    """Return what the compared arrays are, and the range that is mapped to [0, 1]."""
    if setup.pipeline is not None:
        return (
            ("pixels", PICTURES) if is_picture(reference) else ("features", data_range(reference))
        )
    if setup.calls is not None:
        return "features", data_range(reference)
    if setup.decoder is not None:
        return "decoded", setup.spec.pixel_range or DECODED_RANGE
    if setup.spec.pixel_range is not None:
        return "pixels", setup.spec.pixel_range
    return "features" if setup.spec.timestep is None else "latents", data_range(reference)


def _check(variants: Mapping[str, Variant], spec: DenoiserSpec) -> None:
    if not variants or FLOAT in variants:
        raise UsageError(
            f"The variants to evaluate are {list(variants)}.",
            f"Name at least one, and none '{FLOAT}': that is the reference.",
        )
    if spec.pixel_range is not None:
        to_unit(np.zeros(1), spec.pixel_range)


def _labels(setup: Setup) -> list[str]:
    if not setup.conditions and setup.pipeline is None:
        return [f"sample {number + 1}" for number in range(len(setup.rows))]
    labels = setup.spec.labels
    return [labels[row] if row < len(labels) else f"condition {row}" for row in setup.rows]


def _notes(setup: Setup, kind: ImageKind, value_range: tuple[float, float]) -> list[str]:
    notes = []
    if setup.calls is not None:
        return [
            "The calls were recorded by a script: PSNR and SSIM compare the model's outputs at the last timestep, on "
            f"calls that it was not calibrated on, with the range [{value_range[0]:.3g}, {value_range[1]:.3g}] as the "
            "peak."
        ]
    if setup.spec.pipeline is not None:
        from mpq_deploy.evaluate.pipeline_samples import pipeline_notes

        return pipeline_notes(setup, kind == "pixels", value_range)
    if kind == "latents":
        notes.append(
            "The samples are latents and there is no decoder: PSNR and SSIM compare latents, with the float "
            f"samples' range [{value_range[0]:.3g}, {value_range[1]:.3g}] as the peak, and pictures show their "
            "first channels."
        )
    if kind == "features":
        notes.append(
            "The outputs are not images: PSNR and SSIM compare them as maps of tokens by channels, with the float "
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


def _further_notes(setup: Setup, variants: Mapping[str, Variant]) -> list[str]:
    """Say which corrections apply, and what computed, where it was not the CPU."""
    notes = [
        f"{name}: PTQD's correction, {one.correction.summary()}; {_applied(setup, one.correction)}."
        for name, one in variants.items()
        if one.correction is not None
    ]
    if computing_on() != Compute():
        notes.append(
            f"Outputs and images were computed on {computing_on()}; a CPU's differ by rounding."
        )
    return notes


def _applied(setup: Setup, correction: Correction) -> str:
    """Say what of a correction applies."""
    if setup.pipeline is None:
        return _sampler(setup, correction)[1]
    from mpq_deploy.evaluate.pipeline_samples import correction_note

    return correction_note(setup, correction)


def reference_key(setup: Setup, float_model: Path) -> dict[str, Any]:
    """Return what images and calls of the float model depend on."""
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
        "recorded": None if setup.calls is None else folder_stamp(setup.calls),
        "pipeline": None if setup.pipeline is None else folder_stamp(setup.pipeline),
        "samples": settings.samples,
        "steps": settings.steps,
        "timesteps": settings.timesteps,
        "calls": settings.calls,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "sampler": settings.sampler,
        "onnxruntime": ort.__version__,
        # Differences between devices are not part of a variant's error.
        **({} if computing_on() == Compute() else {"device": str(computing_on())}),
    }
