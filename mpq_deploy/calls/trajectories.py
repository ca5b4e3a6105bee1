"""Record what the float denoiser is fed along its own denoising trajectories.

In: a denoiser, a sampler and conditions. Out: a ``CallSet``, whose calls are those that
sampling makes: with classifier-free guidance the unconditional and the conditional half of each are
calls of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from mpq_deploy.calls.ddim import alphas_cumprod
from mpq_deploy.calls.loop import GuidedDenoiser, denoise, first_samples
from mpq_deploy.calls.recorded import CallSet, joined
from mpq_deploy.calls.sampler import Sampler
from mpq_deploy.calls.timesteps import sampled_steps
from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.recipe import CalibrateSettings
from mpq_deploy.system.progress import Talk

# Beside the seed of the rounds in which conditions are dealt out (our choice: the default number of
# samples).
ROUNDS = 128


def record_trajectories(
    model: GuidedDenoiser,
    sampler: Sampler,
    settings: CalibrateSettings,
    talk: Talk,
    part: slice | None = None,
) -> CallSet:
    """Denoise ``settings.samples`` samples; keep the inputs at ``settings.timesteps`` steps.

    ``part`` denoises only these samples, which is the same for samplers that keep samples apart.
    Stops after the last recorded step. Of a model of several sizes each sample has the next one.
    Raises UsageError for fewer steps than timesteps.
    """
    spec, conditions = model.spec, model.conditions
    if spec.sizes:
        return _at_each_size(model, sampler, settings, talk)
    recorded_steps = sampled_steps(
        len(sampler.timesteps), 1 if spec.timestep is None else settings.timesteps
    )
    recorder = _Recorder({int(step): [] for step in recorded_steps})
    rows = cycled_rows(spec, conditions, settings.samples, settings.seed)
    chosen = part or slice(None)
    denoise(
        replace(model, on_call=recorder),
        _FirstSteps(sampler, int(recorded_steps[-1]) + 1),
        first_samples(spec, rows, conditions, settings.seed)[chosen],
        rows[chosen],
        settings.batch_size,
        talk,
    )
    samples, timesteps, called = recorder.finish()
    return CallSet.of_samples(spec, samples, timesteps, called, conditions)


def _at_each_size(
    model: GuidedDenoiser, sampler: Sampler, settings: CalibrateSettings, talk: Talk
) -> CallSet:
    """Record the samples of each size together; the calls of the sizes take turns in the set."""
    spec, count = model.spec, len(model.spec.sizes)
    found = []
    for size in range(min(count, settings.samples)):
        given = spec.conditions_at(size, model.conditions)
        alone, some = replace(model, spec=spec.at_size(size), conditions=given), None
        if spec.timestep is None:
            # Rows of a size are its own.
            share = len(range(size, settings.samples, count))
            own = settings.replace(samples=share)
        else:
            own, some = settings, slice(size, None, count)
        recorded = record_trajectories(alone, sampler, own, talk, some)
        found.append(recorded.filled_up(spec, size))
    places = np.concatenate([np.arange(one.count) for one in found])
    return joined(found).take(np.argsort(places, kind="stable"))


def cycled_rows(spec: DenoiserSpec, conditions: dict[str, Array], samples: int, seed: int) -> Array:
    """Return the row of the conditions for each sample, int64 [samples].

    Rows are dealt out in shuffled rounds, so that each is used as often as any other (or once
    less). The row for guidance is no condition of its own. A denoiser without conditions has row 0
    only.
    """
    counts = {name: len(values) for name, values in conditions.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"The conditions have different numbers of rows: {counts}.",
            "Give each one row per condition.",
        )
    count = next(iter(counts.values()), 1)
    rows = np.arange(spec.calibration_rows or count)
    if spec.uncond_row is not None and count > 1:
        rows = np.delete(rows, spec.uncond_row)
    if not len(rows):
        raise UsageError("The conditions have no rows.", "Give at least one.")
    return cycled(rows, samples, seed)


def cycled(rows: Array, samples: int, seed: int) -> Array:
    """Return ``samples`` of ``rows``, int64, dealt out in shuffled rounds: more begin like fewer."""
    rng = np.random.default_rng((seed, ROUNDS))
    rounds = [rng.permutation(rows) for _ in range(-(-samples // len(rows)))]
    return np.concatenate(rounds)[:samples].astype(np.int64)


@dataclass
class _Recorder:
    """Keeps the calls made at some steps: step index -> (timestep, inputs, rows) of each call."""

    calls: dict[int, list[tuple[float, Array, Array]]] = field(default_factory=dict)

    def __call__(
        self, step_index: int, timestep: float, model_input: Array, rows: Array, output: Array
    ) -> None:
        if step_index in self.calls:
            # A sampler may reuse its arrays.
            self.calls[step_index].append((timestep, model_input.astype(np.float32), rows.copy()))

    def finish(self) -> tuple[Array, Array, Array]:
        """Return samples [K, N, ...], timesteps [K] and rows [N]: calls come in one order."""
        steps = list(self.calls.values())
        return (
            np.stack([np.concatenate([sample for _, sample, _ in step]) for step in steps]),
            np.array([step[0][0] for step in steps], np.float32),
            np.concatenate([rows for _, _, rows in steps[0]]).astype(np.int64),
        )


class _FirstSteps:
    """The first ``count`` steps of a sampler."""

    def __init__(self, sampler: Sampler, count: int) -> None:
        self._sampler = sampler
        self.name = sampler.name
        self.timesteps: Array = sampler.timesteps[:count]
        self.init_noise_sigma = sampler.init_noise_sigma

    def scale_model_input(self, x: Array, step_index: int) -> Array:
        return self._sampler.scale_model_input(x, step_index)

    def step(self, model_output: Array, step_index: int, x: Array) -> Array:
        return self._sampler.step(model_output, step_index, x)


def renoised(recorded: CallSet, spec: DenoiserSpec, draws: int, seed: int = 0) -> CallSet:
    """Return ``draws`` times as many calls, with fresh noise added to the last samples.

    The calls of one trajectory share one noise, so their activations are much alike, and rounding
    fits them closely and others less. The forward process takes the last, nearly clean sample of
    each trajectory back to every timestep: x_t = sqrt(p) x_last + sqrt(1 - p) noise with p =
    alpha-bar_t / alpha-bar_last (Ho et al. 2020, equation 4). Our choice. The last timestep itself
    stays as recorded. Flow matching goes along straight lines instead: x_t = (1 - s) x_0 + s noise
    with s = t / T (Lipman et al. 2023, equation 22), so the last sample is shrunk by (1 - s) / (1 -
    s_last) and what noise lacks to s is added. What is the same at the first and the last timestep
    (an image beside the noise) stays. Calls without such a process are returned as they are.
    """
    if not draws or not has_forward_process(spec):
        return recorded
    times = recorded.timesteps.astype(np.float64)
    if spec.prediction_type == "flow_prediction":
        shares = _flow_shares(times / float(spec.scheduler.get("num_train_timesteps", 1000)))
    else:
        power = np.asarray(alphas_cumprod(spec.scheduler), np.float64)
        at = np.interp(times, np.arange(len(power)), power)
        remaining = np.minimum(at / at[-1], 1.0)
        shares = np.sqrt(remaining), np.sqrt(1 - remaining)
    many = recorded.take(np.tile(np.arange(recorded.count), draws))
    last = many.values(spec.sample.name, -1, slice(None))
    samples = np.empty((len(times), *last.shape), np.float32)
    for step_index, (signal, added) in enumerate(zip(*shares, strict=True)):
        noise = np.random.default_rng((seed, step_index)).standard_normal(last.shape, np.float32)
        samples[step_index] = signal * last + added * noise
    still = many.values(spec.sample.name, 0, slice(None)) == last
    if len(times) > 1 and still.any():
        samples[:, still] = last[still]
    return many.with_values(spec.sample.name, samples)


def has_forward_process(spec: DenoiserSpec) -> bool:
    """Whether the scheduler's configuration says how samples are noised from one timestep on.

    Of pipelines only those with betas or along straight lines: others scale samples in other ways.
    """
    if spec.timestep is None or spec.recorded:
        return False
    if spec.pipeline is None or spec.prediction_type == "flow_prediction":
        return True
    return any(name in spec.scheduler for name in ("beta_start", "trained_betas"))


def _flow_shares(sigmas: Array) -> tuple[Array, Array]:
    """Return, per noise level, the share of the last sample and the noise to add."""
    signal = (1 - sigmas) / max(1 - sigmas[-1], float(np.finfo(np.float64).tiny))
    signal_share = np.minimum(signal, 1.0)
    return signal_share, np.sqrt(np.maximum(sigmas**2 - (signal_share * sigmas[-1]) ** 2, 0.0))
