"""Many images of several models from the same noise, in cached shards over processes.

In: a run's float graph and variants, their description and conditions. Out: pixels uint8 [N, H, W,
C] by model. A killed call goes on with the shards that are finished, and a damaged one is made
again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mpq_deploy.calls.loop import GuidedDenoiser, denoise
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.evaluate.cache import (
    SampleCache,
    arrays_digest,
    folder_stamp,
    model_digest,
    model_files,
)
from mpq_deploy.evaluate.decode import decode, decoder_path
from mpq_deploy.evaluate.evaluate import DECODED_RANGE, PICTURES
from mpq_deploy.evaluate.images import is_picture, to_uint8
from mpq_deploy.evaluate.setup import spread_rows
from mpq_deploy.models.spec import Array, DenoiserSpec, FloatModel
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.lanes import lanes_for
from mpq_deploy.system.parallel.job_files import Files
from mpq_deploy.system.parallel.processes import Processes
from mpq_deploy.system.parallel.work import Alone, Crew, Job, Result, Work, run_shards
from mpq_deploy.system.parallel.work import Shard as ShardOf
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.threads import available_cores, runtime_threads

# A change here makes every shard stale.
FORMAT = 1
# Images of a shard, our choice: seconds to a minute of work, which is what a kill loses.
SHARD = 32
# Steps of the sampler to see what a pipeline returns.
SHAPE_STEPS = 2
# Models above this are held by one process at a time, unless more are asked for.
LARGEST_SHARED_BYTES = 1 << 30


@dataclass(frozen=True)
class Source:
    """A model to sample: its graph, whether it is the float one, and the seed of its noise.

    ``made``: the conditions of the first of its images, and these, where another stage has sampled them.
    """

    model: Path
    seed: int
    is_float: bool = False
    made: tuple[tuple[int, ...], Array] | None = None


@dataclass(frozen=True)
class Shard:
    """What one call of a worker makes: images ``start`` to ``start + len(rows)`` of ``source``."""

    source: Source
    spec: DenoiserSpec
    conditions: dict[str, Array] = field(repr=False)
    decoder: Path | None
    rows: tuple[int, ...]
    start: int
    settings: EvaluateSettings
    threads: int
    pipeline: Path | None = None


@dataclass(frozen=True)
class Sampled:
    """Pixels uint8 [N, H, W, C] by model, each image's condition, the sampler's name; shards, and those made now."""

    images: dict[str, Array]
    rows: Array
    sampler: str
    shards: int
    made: int
    seconds: float


def sample_many(
    sources: Mapping[str, Source],
    model: FloatModel,
    settings: EvaluateSettings,
    cache: Path | None,
    talk: Talk,
    crew: Crew | None = None,
) -> Sampled:
    """Sample every one of ``sources``; image i of equal seeds comes from the same noise.

    ``model``: the float model that they are variants of; ``crew``: who samples; None: as many
    processes of this machine as its memory and cores allow. Raises UsageError where the samples are
    no images (latents without a decoder), ModelError for samples that are not finite.
    """
    spec = model.spec
    _check_pixels(spec)
    started = time.monotonic()
    decoder = decoder_path(spec, model.path.parent)
    conditions = len(next(iter(model.conditions.values()), ()))
    if spec.pipeline is not None:
        conditions = len(spec.pipeline.calls)
    rows = spread_rows(conditions, settings.samples, spec.uncond_row)
    models = list({source.model: None for source in sources.values()})
    # A pipeline's own files are on this machine alone.
    crew, threads = _crew(models, crew if spec.pipeline is None else None)
    files = Files.of(
        file for path in [*models, *([decoder] if decoder else [])] for file in model_files(path)
    )
    store, job = _Counting(cache, talk), _job(files, models)
    shared = _Shared(spec, model.conditions, decoder, rows, settings, threads, model.pipeline)
    shards = []
    for name, source in sources.items():
        own = _shards(name, source, shared, files)
        _keep_made(store, source, own, threads)
        shards += own
    with crew.open(job, talk) as pool:
        title = f"sample {len(sources)} sets of {settings.samples}"
        images = [result["images"] for result in run_shards(pool, title, shards, talk, store)]
    each = len(shards) // len(sources)
    whole = {
        name: np.concatenate(images[n * each : (n + 1) * each]) for n, name in enumerate(sources)
    }
    return Sampled(
        whole,
        rows,
        _sampler_name(spec, settings),
        len(shards),
        store.made,
        time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Shared:
    """What the shards of all sources have in common."""

    spec: DenoiserSpec
    conditions: dict[str, Array]
    decoder: Path | None
    rows: Array
    settings: EvaluateSettings
    threads: int
    pipeline: Path | None


def _shards(name: str, source: Source, shared: _Shared, files: Files) -> list[ShardOf]:
    """Cut the images of ``source`` into shards, with paths relative to the root of ``files``."""
    settings = shared.settings
    relative = replace(source, model=files.below(source.model), made=None)
    decoder = None if shared.decoder is None else files.below(shared.decoder)
    common = _common_key(shared.spec, shared.conditions, shared.decoder, settings)
    key = {
        **common,
        "model": model_digest(source.model),
        "float": source.is_float,
        "seed": source.seed,
        **({} if shared.pipeline is None else {"pipeline": folder_stamp(shared.pipeline)}),
    }
    shards = []
    for start in range(0, settings.samples, SHARD):
        rows = tuple(int(row) for row in shared.rows[start : start + SHARD])
        task = Shard(
            relative,
            shared.spec,
            shared.conditions,
            decoder,
            rows,
            start,
            settings,
            shared.threads,
            shared.pipeline,
        )
        title = f"{name}, images {start} to {start + len(rows) - 1}"
        shards.append(ShardOf(title, task, 1, {**key, "start": start, "rows": list(rows)}))
    return shards


def _keep_made(store: SampleCache, source: Source, shards: list[ShardOf], threads: int) -> None:
    """Keep the source's images that are made already as those of its shards, where these would be the same bits.

    As on as many threads, in the same batches, and with noise that does not depend on other images.
    """
    if source.made is None or threads != (
        lanes_for(_bytes(source.model)).threads or runtime_threads()
    ):
        return
    rows, images = source.made
    for task, key in ((shard.task, shard.key or {}) for shard in shards):
        end = task.start + len(task.rows)
        batch = 1 if task.pipeline is not None else task.settings.batch_size
        cut = task.start % batch or (end % batch and end < len(images))
        same = task.rows == rows[task.start : end] and end <= len(images)
        if same and not cut and store.find(key) is None:
            SampleCache.keep(store, key, {"images": images[task.start : end]})


class _Counting(SampleCache):
    """A cache that counts what was made for it."""

    made = 0

    def keep(self, key: Mapping[str, Any], arrays: dict[str, Array]) -> dict[str, Array]:
        self.made += 1
        return super().keep(key, arrays)


def _sampler_name(spec: DenoiserSpec, settings: EvaluateSettings) -> str:
    if spec.pipeline is not None:
        return f"{spec.pipeline.class_name} of diffusers"
    return make_sampler(spec.scheduler, settings.steps, settings.seed, settings.sampler).name


def image_shape(model: FloatModel) -> tuple[int, ...]:
    """Return [H, W, C] of the images; the decoder lies beside the model, if there is one.

    Raises UsageError where the samples are not images: latents without a decoder.
    """
    spec = model.spec
    _check_pixels(spec)
    if spec.pipeline is not None:
        return _pipeline_shape(model)
    decoder = decoder_path(spec, model.path.parent)
    shape = spec.sample.shape
    if decoder is not None:
        shape = decode(decoder, np.zeros((1, *shape), np.float32), 1, Talk()).shape[1:]
    return (*shape[1:], shape[0])


def _pipeline_shape(model: FloatModel) -> tuple[int, ...]:
    """Return [H, W, C] of what the model's pipeline returns. Raises UsageError for no pictures."""
    from mpq_deploy.calls.pipeline_runs import PipelineRuns
    from mpq_deploy.calls.record_pipeline import pipeline_folder

    denoiser = OrtDenoiser(model.path, model.spec)
    runs = PipelineRuns(pipeline_folder(model), model.spec, denoiser.run)
    made = runs.image(0, SHAPE_STEPS, 0)
    if made.ndim != 4 or not is_picture(made):
        raise UsageError(
            f"{runs.short_name} returns an array {list(made.shape)}: no feature network can use it.",
            "Feature networks need images.",
        )
    return (*made.shape[2:], made.shape[1])


def sample_shard(shard: Shard) -> Array:
    """Make the images of ``shard``, uint8 [n, H, W, C]: the same ones in any process."""
    settings, spec, source = shard.settings, shard.spec, shard.source
    denoiser = _opened(
        source.model,
        source.model.stat().st_mtime_ns,
        spec.model_dump_json(),
        shard.threads,
        source.is_float,
    )
    if shard.pipeline is not None:
        from mpq_deploy.calls.pipeline_runs import PipelineRuns, image_seed

        runs = PipelineRuns(shard.pipeline, spec, denoiser.run)
        images = [
            runs.image(row, settings.steps, image_seed(source.seed, shard.start + place))
            for place, row in enumerate(shard.rows)
        ]
        return to_uint8(np.concatenate(images), PICTURES)
    # A sampler that adds noise draws it shard by shard: each needs draws of its own.
    seed = int(np.random.SeedSequence((source.seed, shard.start)).generate_state(1)[0])
    sampler = make_sampler(spec.scheduler, settings.steps, seed, settings.sampler)
    samples = denoise(
        GuidedDenoiser(denoiser, spec, shard.conditions),
        sampler,
        shard_noise(spec, shard.start, len(shard.rows), source.seed),
        np.array(shard.rows),
        settings.batch_size,
    )
    if shard.decoder is None:
        assert spec.pixel_range is not None  # checked by _check_pixels
        return to_uint8(samples, spec.pixel_range)
    return to_uint8(
        decode(shard.decoder, samples, settings.batch_size, Talk()),
        spec.pixel_range or DECODED_RANGE,
    )


def shard_noise(spec: DenoiserSpec, start: int, count: int, seed: int) -> Array:
    """Return the noise of images ``start`` to ``start + count``: that of ``sampling.loop.initial_noise``."""
    shape = spec.sample.shape
    return np.stack(
        [
            np.random.default_rng((seed, i)).standard_normal(shape, np.float32)
            for i in range(start, start + count)
        ]
    )


def open_sampler(root: Path, talk: Talk) -> Work:
    """Return what makes the images of a ``Shard``, whose paths are relative to ``root``."""

    def work(shard: Shard, inner: Talk) -> Result:
        source = replace(shard.source, model=root / shard.source.model)
        decoder = None if shard.decoder is None else root / shard.decoder
        return {"images": sample_shard(replace(shard, source=source, decoder=decoder))}

    return work


def _crew(models: list[Path], crew: Crew | None) -> tuple[Crew, int]:
    """Return who samples, and the threads of a shard, which do not depend on the number of workers."""
    cores = available_cores()
    shared = max(map(_bytes, models)) * cores <= LARGEST_SHARED_BYTES
    if crew is None:
        crew = Processes(cores) if shared and cores > 1 else Alone()
    return crew, crew.threads or (1 if shared else runtime_threads())


def _job(files: Files, models: list[Path]) -> Job:
    # The graph is held as it is and prepared for the kernels; activations of one batch are far
    # smaller.
    return Job("sampling", open_sampler, files.root, files.names, 2 * max(map(_bytes, models)))


def _bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model_files(model))


@lru_cache(maxsize=1)
def _opened(model: Path, changed: int, spec: str, threads: int, is_float: bool) -> OrtDenoiser:
    """Open a graph once for all shards of it in a row; ``changed`` is its time of writing."""
    described = DenoiserSpec.model_validate_json(spec)
    # As in evaluate: the float graph as it is, Q/DQ pairs of a variant in float arithmetic.
    return OrtDenoiser(model, described, threads=threads, fake_quant_only=not is_float)


def _check_pixels(spec: DenoiserSpec) -> None:
    if spec.recorded:
        raise UsageError(
            "The model's calls were recorded by a script, which does not give images.",
            "Compare images in your script: mpq_deploy.load(RUN) takes the model's place.",
        )
    if spec.pipeline is not None:
        return
    if spec.decoder is None and spec.pixel_range is None:
        raise UsageError(
            "The samples are latents and there is no decoder: no feature network can use them.",
            "Give the pipeline folder its VAE; an ONNX file's YAML can name a decoder, or a pixel_range.",
        )
    if len(spec.sample.shape) != 3:
        raise ModelError(
            f"The samples have the shape {list(spec.sample.shape)}.", "Images are [channels, H, W]."
        )


def _common_key(
    spec: DenoiserSpec,
    conditions: Mapping[str, Array],
    decoder: Path | None,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    plain = spec.model_dump(mode="json", exclude={"name", "source", "labels", "synthetic"})
    return {
        "format": FORMAT,
        "part": "metrics",
        "spec": plain,
        "conditions": arrays_digest(dict(conditions)),
        "decoder": None if decoder is None else model_digest(decoder),
        "steps": settings.steps,
        "sampler": settings.sampler,
        "batch_size": settings.batch_size,
        "onnxruntime": ort.__version__,
    }
