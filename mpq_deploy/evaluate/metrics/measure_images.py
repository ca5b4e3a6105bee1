"""Measure how a run's images are distributed, beside the float model's and real ones.

In: a run whose graphs are written. Out: ``ImageMetrics``, added to those that the run folder keeps
(``metrics.kept``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from mpq_deploy.calls.sampler import keeps_samples_apart, make_sampler
from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.cache import SampleCache, arrays_digest, model_digest
from mpq_deploy.evaluate.evaluation_result import Evaluation
from mpq_deploy.evaluate.interval import mean_interval, paired_interval
from mpq_deploy.evaluate.metrics.frechet import (
    Moments,
    Spread,
    check_count,
    extrapolated,
    frechet_distance,
    spread_to_reference,
    strata_of,
)
from mpq_deploy.evaluate.metrics.kept import (
    OURS,
    ImageMetrics,
    MadeFrom,
    conditions_digest,
    read_kept,
)
from mpq_deploy.evaluate.metrics.kernel import kernel_distance
from mpq_deploy.evaluate.metrics.neighbours import precision_recall
from mpq_deploy.evaluate.metrics.networks import (
    FeatureNetwork,
    NetworkOptions,
    bundled_name,
    default_network,
    demo_of,
)
from mpq_deploy.evaluate.metrics.open_networks import check_networks, open_network
from mpq_deploy.evaluate.metrics.real import RealSet, check_real, real_set
from mpq_deploy.evaluate.metrics.sample_images import Sampled, Source, image_shape, sample_many
from mpq_deploy.evaluate.metrics.scores import ImageScore, check_scores, open_scores, prompts_of
from mpq_deploy.evaluate.variants import read_controls
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.report.data import FrechetInfo, Interval, ScoreInfo
from mpq_deploy.report.words import count
from mpq_deploy.run.view import Exported
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.parallel.processes import Processes
from mpq_deploy.system.parallel.work import Alone, Crew
from mpq_deploy.system.progress import Talk

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

FLOAT, OTHER = "float", "float, other noise"
# In the place of a network: scores alone.
NO_NETWORK = "none"
# Images between two steps of the progress of features.
CHUNK = 64


@dataclass(frozen=True)
class MetricsOptions:
    """What to measure. ``networks`` empty: the default; ``seed`` None: the evaluation's.

    ``scores``: names of ``metrics.scores.SCORES``.
    """

    networks: tuple[str, ...] = ()
    images: int = 512
    real: Path | None = None
    weights: tuple[tuple[str, Path], ...] = ()
    seed: int | None = None
    workers: int | None = None
    controls: bool = False
    scores: tuple[str, ...] = ()


def check_metrics(model: str | None, options: MetricsOptions) -> None:
    """Check weights, packages and real images before any stage of ``model``'s run is made.

    ``model`` as in the recipe. What takes the model itself (prompts, the images' size) shows later.
    Raises UsageError, MissingDependencyError.
    """
    network_options = NetworkOptions(bundled_name(model), options.weights)
    check_networks(_names(options, network_options), network_options)
    check_scores(options.scores, network_options)
    check_real(options.real)


def measure_metrics(run: Run, options: MetricsOptions) -> ImageMetrics:
    """Sample the float model twice, the plan and optionally the controls; measure them.

    It is added to what the run folder keeps. The deployed graphs, and the controls where asked for,
    must be current. Raises UsageError before anything is sampled where a network cannot be had, the
    images are too few for its covariance, or the real images do not fit.
    """
    started = time.monotonic()
    exported = run.exported
    network_options = NetworkOptions(demo_of(exported.spec.source), options.weights)
    names = _names(options, network_options)
    check_networks(names, network_options)
    networks = [open_network(name, network_options) for name in names]
    for network in networks:
        check_count(options.images, network.width, "images", network.name)
    settings = run.recipe.evaluate.replace(samples=options.images)
    if options.seed is not None:
        settings = settings.replace(seed=options.seed)
    cache = run.base / ".samples"
    shape = image_shape(exported.model.at_size(0))
    scores = open_scores(options.scores, network_options, exported.spec, shape)
    reals = {
        network.name: real_set(options.real, network, network_options, shape)
        for network in networks
    }
    sources = _evaluated(
        run, settings, _sources(run, exported.path, settings.seed, options.controls)
    )
    model = exported.model.at_size(0)
    sampled = sample_many(sources, model, settings, cache, run.talk, _crew(run, options.workers))
    measure = _Measure(sampled, settings, SampleCache(cache, run.talk), run.talk)
    rows = {name: [] for name in sources if name not in (FLOAT, OTHER)}  # type: dict[str, list[FrechetInfo]]
    for network in networks:
        for name, made in measure.on(network, reals[network.name], tuple(rows)).items():
            rows[name] += made
    prompts = prompts_of(exported.spec, sampled.rows) if scores else ()
    scored = tuple(row for score in scores for row in measure.scored(score, (OURS, *rows), prompts))
    metrics = ImageMetrics(
        tuple(rows.pop(OURS)),
        {name: tuple(made) for name, made in rows.items()},
        made_from(run, exported, *map(model_digest, (sources[OURS].model, exported.path))),
        scored,
        sampled.seconds,
        time.monotonic() - started,
        sampled.made == sampled.shards,
    )
    _keep(run, metrics)
    return metrics


def _crew(run: Run, workers: int | None) -> Crew | None:
    """Return who samples: the run's crew, else ``workers`` processes; None: as many as fit."""
    if not isinstance(run.crew, Alone) or workers is None:
        return None if isinstance(run.crew, Alone) else run.crew
    return Alone() if workers == 1 else Processes(workers)


def made_from(run: Run, exported: Exported, ours: str, float_model: str) -> MadeFrom:
    """Return what images of the run are made from now; ``ours``, ``float_model``: digests of the graphs."""
    conditions = conditions_digest(exported.spec, exported.conditions, exported.path.parent)
    controls = run.folder.record("controls")
    return MadeFrom(ours, float_model, conditions, "" if controls is None else controls.digest)


def _keep(run: Run, metrics: ImageMetrics) -> None:
    """Add ``metrics`` to what the run folder keeps; say what of that stays and what goes."""
    folder, talk = run.path, run.talk
    nothing = replace(metrics, frechet=(), controls={}, scores=())
    merged, dropped = metrics.added_to(read_kept(folder, talk, "is made anew") or nothing)
    if dropped:
        talk.warn(f"{dropped}: dropped")
    more = merged.count - metrics.count
    if more:
        talk.line(
            f"{count(more, 'figure')} of this plan from earlier calls stay{'s' if more == 1 else ''}"
        )
    merged.save(folder)


def _names(options: MetricsOptions, network_options: NetworkOptions) -> tuple[str, ...]:
    """Return the networks to measure on. Raises UsageError where nothing at all would be measured."""
    if NO_NETWORK not in options.networks:
        return tuple(dict.fromkeys(options.networks)) or (default_network(network_options),)
    if len(set(options.networks)) > 1 or not options.scores:
        also = (
            f" beside {', '.join(sorted(set(options.networks) - {NO_NETWORK}))}"
            if len(options.networks) > 1
            else ""
        )
        raise UsageError(
            f"--network is {NO_NETWORK}{also}.",
            "It stands alone, for --lpips or --clip-score without distances.",
        )
    return ()


def _sources(run: Run, float_model: Path, seed: int, controls: bool) -> dict[str, Source]:
    deployed = run.deployed / SIMULATED
    sources = {
        FLOAT: Source(float_model, seed, True),
        # Noise that neither the calibration nor the comparison uses.
        OTHER: Source(float_model, _other_seed(seed, run.recipe.calibrate.seed), True),
        OURS: Source(deployed, seed),
    }
    if controls:
        found = read_controls(run.stage("controls"))
        if not found:
            raise UsageError(
                "The run has no controls.",
                "Set evaluate.controls in its recipe, or leave --controls out.",
            )
        sources.update(
            {name: Source(found[name].path, seed) for name in sorted(found, reverse=True)}
        )
    return sources


def _evaluated(
    run: Run, settings: EvaluateSettings, sources: dict[str, Source]
) -> dict[str, Source]:
    """Return ``sources`` with the images of the float model and the plan that the stage evaluate has left."""
    record, spec = run.folder.record("evaluate"), run.exported.spec
    if record is None or spec.sizes or run.folder.changed_fields("evaluate", record.inputs) != []:
        return sources
    found = Evaluation.load(run.stage("evaluate"))
    names = ("steps", "sampler", "batch_size", "seed")
    alike = all(getattr(found.settings, name) == getattr(settings, name) for name in names)
    here = record.device == str(computing_on()) and record.inputs["export"] == run.digest("export")
    versions = record.inputs["version.onnxruntime"] == onnxruntime.__version__
    apart = spec.pipeline is not None or keeps_samples_apart(
        make_sampler(spec.scheduler, settings.steps, settings.seed, settings.sampler)
    )
    if not (alike and here and versions and apart):
        return sources
    digests = {FLOAT: found.float_digest, OURS: found.variants[OURS].digest}
    return sources | {
        name: replace(sources[name], made=(found.rows, found.images[name]))
        for name, digest in digests.items()
        if model_digest(sources[name].model) == digest
    }


def _other_seed(seed: int, calibration: int) -> int:
    return seed + 1 if seed + 1 != calibration else seed + 2


class _Measure:
    """Features and distances of one set of samples."""

    def __init__(
        self, sampled: Sampled, settings: EvaluateSettings, store: SampleCache, talk: Talk
    ) -> None:
        self._sampled, self._settings, self._store, self._talk = sampled, settings, store, talk
        self._strata = strata_of(sampled.rows)

    def on(
        self, network: FeatureNetwork, real: RealSet | None, variants: tuple[str, ...]
    ) -> dict[str, list[FrechetInfo]]:
        """Return for each variant its distances to the float model's images and, where there are some, real ones."""
        features = {name: self._features(network, name) for name in (FLOAT, OTHER, *variants)}
        rows: dict[str, list[FrechetInfo]] = {}
        with self._talk.bar(
            f"distances on {network.name}", len(variants) * (2 if real else 1)
        ) as advance:
            for name in variants:
                rows[name] = [self._to_float(network, features, name)]
                advance(1)
                if real is not None:
                    rows[name].append(self._to_real(network, features, name, real))
                    advance(1)
        return rows

    def _features(self, network: FeatureNetwork, name: str) -> Array:
        images = self._sampled.images[name]
        key = {
            "part": "features",
            "network": network.digest,
            "images": arrays_digest({"images": images}),
        }
        stored = self._store.find(key)
        if stored is not None:
            return stored["features"]
        parts = []
        with self._talk.bar(f"features of {name} ({network.name})", len(images)) as advance:
            for start in range(0, len(images), CHUNK):
                parts.append(network.features(images[start : start + CHUNK]))
                advance(len(parts[-1]))
        return self._store.keep(key, {"features": np.concatenate(parts)})["features"]

    def _to_float(
        self, network: FeatureNetwork, features: Mapping[str, Array], name: str
    ) -> FrechetInfo:
        ours, reference, other = features[name], features[FLOAT], features[OTHER]
        distance = frechet_distance(Moments.of(ours), Moments.of(reference))
        spread = spread_to_reference(ours, reference, self._strata)
        interval = _interval(distance, spread.distance, 0.0)
        return FrechetInfo(
            **self._about(network, name),
            against="float",
            against_source="the float model's images from the same noise",
            against_samples=len(reference),
            against_digest=arrays_digest({"images": self._sampled.images[FLOAT]}),
            distance=distance,
            floor=0.0,
            interval=interval,
            increase_interval=interval,
            other_noise=frechet_distance(Moments.of(other), Moments.of(reference)),
            **_sets(ours, reference, other),
        )

    def _to_real(
        self, network: FeatureNetwork, features: Mapping[str, Array], name: str, real: RealSet
    ) -> FrechetInfo:
        ours, reference = features[name], features[FLOAT]
        distance, floor = (
            frechet_distance(Moments.of(one), real.moments) for one in (ours, reference)
        )
        spread = spread_to_reference(ours, reference, self._strata, real.moments)
        return FrechetInfo(
            **self._about(network, name),
            against="real",
            against_source=real.source,
            against_samples=real.moments.count,
            against_digest=real.digest,
            distance=distance,
            floor=floor,
            interval=_interval(distance, spread.distance, 0.0),
            increase_interval=_interval(distance - floor, spread.increase),
            other_noise=frechet_distance(Moments.of(features[OTHER]), real.moments),
            real_floor=real.floor,
            real_floor_samples=real.floor_count,
            extrapolated=extrapolated(ours, self._strata, real.moments),
            extrapolated_floor=extrapolated(reference, self._strata, real.moments),
            **(_sets(ours, reference, real.features) if real.features is not None else {}),
        )

    def scored(
        self, score: ImageScore, variants: tuple[str, ...], prompts: tuple[str, ...]
    ) -> list[ScoreInfo]:
        """Return the mean score of each of ``variants``, beside the float model's; ``prompts``: one per image."""
        values = {
            name: self._scores(score, name, prompts)
            for name in dict.fromkeys((FLOAT, OTHER, *variants))
        }
        own = values[FLOAT]
        return [
            ScoreInfo(
                **self._from(name),
                title=score.title,
                score=score.name,
                score_digest=score.digest,
                value=float(np.mean(values[name])),
                floor=float(np.mean(own)),
                interval=_ends(mean_interval(values[name].tolist())),
                increase_interval=_ends(paired_interval(values[name].tolist(), own.tolist())),
                other_noise=float(np.mean(values[OTHER])),
            )
            for name in dict.fromkeys(variants)
        ]

    def _scores(self, score: ImageScore, name: str, prompts: tuple[str, ...]) -> Array:
        images, reference = self._sampled.images[name], self._sampled.images[FLOAT]
        key = {"part": "scores", "score": score.digest, "prompts": list(prompts)}
        key |= {"images": arrays_digest({"images": images, "reference": reference})}
        stored = self._store.find(key)
        if stored is not None:
            return stored["scores"]
        parts = []
        with self._talk.bar(f"{score.title} of {name}", len(images)) as advance:
            for start in range(0, len(images), CHUNK):
                chunk = slice(start, start + CHUNK)
                parts.append(score.scores(images[chunk], reference[chunk], prompts[chunk]))
                advance(len(parts[-1]))
        return self._store.keep(key, {"scores": np.concatenate(parts)})["scores"]

    def _about(self, network: FeatureNetwork, name: str) -> dict[str, Any]:
        return {
            **self._from(name),
            "title": network.title,
            "network": network.name,
            "network_digest": network.digest,
            "network_features": network.width,
        }

    def _from(self, name: str) -> dict[str, Any]:
        settings = self._settings
        return {
            "variant": name,
            "samples": settings.samples,
            "sampler": self._sampled.sampler,
            "steps": settings.steps,
            "seed": settings.seed,
        }


def _sets(ours: Array, reference: Array, against: Array) -> dict[str, float | None]:
    """KID, precision and recall of ours against other images, with those of the float model."""
    # Images from the same noise are not independent sets, which all three presume: hence never
    # float's own.
    precision, recall = precision_recall(ours, against)
    precision_floor, recall_floor = precision_recall(reference, against)
    return {
        "kid": kernel_distance(ours, against),
        "kid_floor": kernel_distance(reference, against),
        "precision": precision,
        "recall": recall,
        "precision_floor": precision_floor,
        "recall_floor": recall_floor,
    }


def _ends(interval: tuple[float, float] | None) -> Interval | None:
    return None if interval is None else Interval(low=interval[0], high=interval[1])


def _interval(value: float, error: float, minimum: float | None = None) -> Interval:
    low, high = Spread.around(value, error)
    return Interval(low=low if minimum is None else max(low, minimum), high=high)
