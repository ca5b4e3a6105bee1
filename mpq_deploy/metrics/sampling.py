"""Many images of several models from the same noise: in shards that are cached by content, over several processes.

In: a run's float graph and variants, their description and conditions. Out: pixels uint8 [N, H, W, C] by model. A
killed call goes on with the shards that are finished, and a damaged one is made again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mpq_deploy.denoisers.spec import Array, DenoiserSpec
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.evaluate.cache import SampleCache, arrays_digest, model_digest, model_files
from mpq_deploy.evaluate.decode import decode, decoder_path
from mpq_deploy.evaluate.evaluate import DECODED_RANGE, spread_rows
from mpq_deploy.evaluate.images import to_uint8
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.sampling.loop import denoise
from mpq_deploy.sampling.sampler import SamplerKind, make_sampler
from mpq_deploy.talk import Talk

# A change here makes every shard stale.
FORMAT = 1
# Images of a shard, our choice: seconds to a minute of work, which is what a kill loses.
SHARD = 32
# Models above this are held by one process at a time, unless more are asked for.
LARGEST_SHARED_BYTES = 1 << 30


@dataclass(frozen=True)
class SamplingOptions:
    """``images`` of ``steps`` steps from the noise of ``seed``. ``workers`` None: one process per core."""

    images: int
    steps: int
    seed: int
    sampler: SamplerKind = "auto"
    batch_size: int = 16
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("images", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}.", "It must be at least 1.")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers is {self.workers}.", "Give at least 1.")


@dataclass(frozen=True)
class Source:
    """A model to sample: its graph, whether it is the float one, and the seed of its noise."""

    model: Path
    seed: int
    is_float: bool = False


@dataclass(frozen=True)
class Shard:
    """What one call of a worker makes: images ``start`` to ``start + len(rows)`` of ``source``."""

    source: Source
    spec: DenoiserSpec
    conditions: dict[str, Array] = field(repr=False)
    decoder: Path | None
    rows: tuple[int, ...]
    start: int
    options: SamplingOptions
    threads: int


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
    float_model: Path,
    spec: DenoiserSpec,
    conditions: Mapping[str, Array],
    options: SamplingOptions,
    cache: Path | None,
    talk: Talk,
) -> Sampled:
    """Sample every one of ``sources``; image i of two sources of the same seed comes from the same noise.

    Raises UsageError where the samples are no images (latents without a decoder), ModelError for samples that are not
    finite.
    """
    _check_pixels(spec)
    started = time.monotonic()
    decoder = decoder_path(spec, float_model.parent)
    rows = spread_rows(len(next(iter(conditions.values()), ())), options.images, spec.uncond_row)
    workers, threads = _workers(options, [source.model for source in sources.values()])
    store = SampleCache(cache, talk)
    common = _common_key(spec, conditions, decoder, options)
    digests = {source.model: model_digest(source.model) for source in sources.values()}
    found: dict[tuple[str, int], Array] = {}
    wanted: dict[tuple[str, int], tuple[dict[str, Any], Shard]] = {}
    for name, source in sources.items():
        for start in range(0, options.images, SHARD):
            part = tuple(int(row) for row in rows[start : start + SHARD])
            shard = Shard(source, spec, dict(conditions), decoder, part, start, options, threads)
            key = {**common, "model": digests[source.model], "float": source.is_float, "seed": source.seed}
            key = {**key, "start": start, "rows": list(part)}
            kept = store.find(key)
            if kept is None:
                wanted[name, start] = (key, shard)
            else:
                found[name, start] = kept["images"]
    with talk.bar(f"sample {len(sources)} sets of {options.images}", len(found) + len(wanted)) as advance:
        advance(len(found))
        for place, images in _made({place: shard for place, (_, shard) in wanted.items()}, workers):
            found[place] = store.keep(wanted[place][0], {"images": images})["images"]
            advance(1)
    whole = {
        name: np.concatenate([found[name, start] for start in range(0, options.images, SHARD)]) for name in sources
    }
    sampler = make_sampler(spec.scheduler, options.steps, options.seed, options.sampler).name
    return Sampled(whole, rows, sampler, len(found), len(wanted), time.monotonic() - started)


def image_shape(spec: DenoiserSpec, folder: Path) -> tuple[int, ...]:
    """Return [H, W, C] of the images; ``folder`` holds the decoder, if there is one.

    Raises UsageError where the samples are no images: latents without a decoder.
    """
    _check_pixels(spec)
    decoder = decoder_path(spec, folder)
    shape = spec.sample.shape
    if decoder is not None:
        shape = decode(decoder, np.zeros((1, *shape), np.float32), 1, Talk()).shape[1:]
    return (*shape[1:], shape[0])


def sample_shard(shard: Shard) -> Array:
    """Make the images of ``shard``, uint8 [n, H, W, C]: the same ones in any process."""
    options, spec, source = shard.options, shard.spec, shard.source
    denoiser = _opened(
        source.model, source.model.stat().st_mtime_ns, spec.model_dump_json(), shard.threads, source.is_float
    )
    # A sampler that adds noise draws it shard by shard: each needs draws of its own.
    seed = int(np.random.SeedSequence((source.seed, shard.start)).generate_state(1)[0])
    sampler = make_sampler(spec.scheduler, options.steps, seed, options.sampler)
    samples = denoise(
        denoiser,
        sampler,
        shard_noise(spec, shard.start, len(shard.rows), source.seed),
        np.array(shard.rows),
        shard.conditions,
        spec,
        options.batch_size,
    )
    if shard.decoder is None:
        assert spec.pixel_range is not None  # checked by _check_pixels
        return to_uint8(samples, spec.pixel_range)
    return to_uint8(decode(shard.decoder, samples, options.batch_size, Talk()), spec.pixel_range or DECODED_RANGE)


def shard_noise(spec: DenoiserSpec, start: int, count: int, seed: int) -> Array:
    """Return the noise of images ``start`` to ``start + count``: that of ``sampling.loop.initial_noise``."""
    shape = spec.sample.shape
    return np.stack(
        [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in range(start, start + count)]
    )


def _made(shards: dict[tuple[str, int], Shard], workers: int) -> Iterator[tuple[tuple[str, int], Array]]:
    """Yield images by place as they are finished."""
    if workers == 1 or len(shards) < 2:
        for place, shard in shards.items():
            yield place, sample_shard(shard)
        return
    with _pool(min(workers, len(shards))) as pool:
        places: dict[Future[Array], tuple[str, int]] = {
            pool.submit(sample_shard, shard): place for place, shard in shards.items()
        }
        for future in as_completed(places):
            yield places[future], future.result()


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes; what has not begun is dropped when the block is left early."""
    # Forked processes would share the state of ONNX Runtime's threads, which does not survive it.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@lru_cache(maxsize=1)
def _opened(model: Path, changed: int, spec: str, threads: int, is_float: bool) -> OrtDenoiser:
    """Open a graph once for all shards of it in a row; ``changed`` is its time of writing."""
    described = DenoiserSpec.model_validate_json(spec)
    # As in evaluate: the float graph as it is, Q/DQ pairs of a variant in float arithmetic.
    return OrtDenoiser(model, described, threads=threads, fake_quant_only=not is_float)


def _workers(options: SamplingOptions, models: list[Path]) -> tuple[int, int]:
    """Return processes, and threads of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.workers is not None:
        workers = options.workers
    else:
        largest = max(sum(file.stat().st_size for file in model_files(model)) for model in models)
        workers = 1 if largest * cores > LARGEST_SHARED_BYTES else cores
    return workers, max(1, cores // workers)


def _check_pixels(spec: DenoiserSpec) -> None:
    if spec.decoder is None and spec.pixel_range is None:
        raise UsageError(
            "The samples are latents and there is no decoder: no feature network can look at them.",
            "Give the pipeline folder its VAE; an ONNX file's YAML can name a decoder, or a pixel_range.",
        )
    if len(spec.sample.shape) != 3:
        raise ModelError(f"The samples have the shape {list(spec.sample.shape)}.", "Images are [channels, H, W].")


def _common_key(
    spec: DenoiserSpec, conditions: Mapping[str, Array], decoder: Path | None, options: SamplingOptions
) -> dict[str, Any]:
    plain = spec.model_dump(mode="json", exclude={"name", "source", "labels", "synthetic"})
    return {
        "format": FORMAT,
        "part": "metrics",
        "spec": plain,
        "conditions": arrays_digest(dict(conditions)),
        "decoder": None if decoder is None else model_digest(decoder),
        "steps": options.steps,
        "sampler": options.sampler,
        "batch_size": options.batch_size,
        "onnxruntime": ort.__version__,
    }
