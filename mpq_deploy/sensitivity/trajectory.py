"""Image probes: what each scheme of each layer does to the finished image, from the same backward passes.

An error of the denoiser at one timestep travels through all later steps, and the errors of one weight at different
timesteps add up coherently, while those of rounded activations do not. Output probes see neither. So a random probe r
shaped like the image is carried backwards through the sampler: with x' = P x + Q f(x, t) for the step from x to x'
(deterministic DDIM between the recorded timesteps; P and Q vanish where the sampler clips),

    lambda = r at the image;  c_t = Q lambda;  G_{l,t} = J_{l,t}^T c_t;  lambda <- P lambda + J_{x,t}^T c_t,

and sum_t <G_{l,t}, dY_{l,s,t}> is to first order <r, error of the image>. Our choice; no paper we know of does this
for bit allocation. The mean of its square is the mean squared error of the image, so its logarithm predicts PSNR.
Samplers other than DDIM follow the same probability flow, so they are stepped as DDIM here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mpq_deploy.calibrate.stats import CalibrationSet, CalibrationStats
from mpq_deploy.denoisers.spec import Array, DenoiserSpec
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.sampling.betas import alphas_cumprod
from mpq_deploy.sensitivity.feeds import Calls, MeasureOptions
from mpq_deploy.sensitivity.probe import _Probing
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_projections
from mpq_deploy.sensitivity.weights import CandidateWeights
from mpq_deploy.talk import Talk

CLIPPING = ("DDIMScheduler", "DDPMScheduler")
# Seeds of image probes are kept apart from those of output probes by this mark.
IMAGE_MARK = 1 << 20
SMALLEST_NOISE = 1e-4


def why_no_image_probes(spec: DenoiserSpec, calibration: CalibrationSet) -> str:
    """Say why the finished image cannot be probed for this denoiser; empty when it can."""
    if spec.guidance_scale != 1 and spec.uncond_row is not None:
        return "classifier-free guidance joins two calls per step"
    if spec.prediction_type not in ("epsilon", "v_prediction", "sample"):
        return f"the prediction type {spec.prediction_type} has no DDIM step"
    if len(calibration.timesteps) < 2:
        return "there is only one timestep"
    if np.any(np.diff(calibration.timesteps) >= 0):
        return "the timesteps do not fall"
    return ""


@dataclass(frozen=True)
class Step:
    """The linear step x' = P x + Q output, as scalars: clean = a x + b output, next = c clean + d x + e output.

    ``limit``: the sampler clips ``clean`` to +-limit; None when it does not.
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    limit: float | None

    def slopes(self, x: Any, output: Any) -> tuple[Any, Any]:
        """Return P and Q at x and output, as tensors shaped like x (or numbers where nothing is clipped)."""
        if self.limit is None:
            return self.c * self.a + self.d, self.c * self.b + self.e
        inside = ((self.a * x + self.b * output).abs() <= self.limit).to(x.dtype)
        return self.c * self.a * inside + self.d, self.c * self.b * inside + self.e


def ddim_steps(spec: DenoiserSpec, timesteps: Array) -> list[Step]:
    """Return the DDIM step from each of ``timesteps`` to the next, the last one to the image (Song et al. 2021)."""
    power = np.asarray(alphas_cumprod(spec.scheduler), np.float64)
    at = np.interp(np.asarray(timesteps, np.float64), np.arange(len(power)), power)
    following = np.append(at[1:], 1.0)
    clips = spec.scheduler.get("clip_sample", spec.scheduler.get("_class_name") in CLIPPING)
    limit = float(spec.scheduler.get("clip_sample_range", 1.0)) if clips and spec.pixel_range is not None else None
    steps = []
    for now, later in zip(at, following, strict=True):
        signal, noise = np.sqrt(now), max(np.sqrt(1 - now), SMALLEST_NOISE)
        signal = max(signal, SMALLEST_NOISE)
        c, s = np.sqrt(later), np.sqrt(1 - later)
        if spec.prediction_type == "epsilon":
            steps.append(Step(1 / signal, -noise / signal, c, 0.0, s, limit))
        elif spec.prediction_type == "v_prediction":
            steps.append(Step(signal, -noise, c, s * noise, s * signal, limit))
        else:
            steps.append(Step(0.0, 1.0, c, s / noise, -s * signal / noise, limit))
    return steps


def measure_images(
    graph: LayerGraph,
    candidates: Mapping[str, CandidateWeights],
    stats: CalibrationStats,
    calibration: CalibrationSet,
    conditions: dict[str, Array],
    spec: DenoiserSpec,
    options: MeasureOptions,
    image_probes: int,
    talk: Talk,
) -> tuple[SensitivityTable, SensitivityTable]:
    """Return the table of output probes (as ``measure_probe``) and that of image probes, from one set of forwards.

    Losses of the second are mean squared errors of the image, in units of the squared pixel range (so that
    -10 log10 is a PSNR), or of the mean square of the samples where these are latents.
    Raises what ``measure_probe`` raises; ``why_no_image_probes`` must be empty.
    """
    calls = Calls(graph, spec, calibration, conditions, options.samples)
    total = options.probes + image_probes
    work = _ImageProbing(graph, candidates, stats, calls, spec, replace(options, probes=total), options.probes)
    batch, notes = work.batch_size()
    steps = ddim_steps(spec, calls.timesteps)
    values = {
        layer.name: {
            s.name: np.zeros((len(steps), total, calls.count), np.float32) for s in candidates[layer.name].schemes
        }
        for layer in work.layers
    }
    power = np.zeros(len(steps))
    with talk.bar("probes", len(steps) * calls.count) as advance:
        for start in range(0, calls.count, batch):
            chunk = slice(start, min(start + batch, calls.count))
            power += work.trajectory(steps, chunk, values, advance)
    norm = np.sqrt(np.where(power > 0, power / calls.count, 1.0)).astype(np.float32)[:, None, None]
    seen = {a: {s: v[:, : options.probes] / norm for s, v in d.items()} for a, d in values.items()}
    output = table_from_projections(calls.timesteps, seen, options.heldout_probes, notes)
    return output, _image_table(calls.timesteps, values, options.probes, _unit(spec, calibration), notes)


def _unit(spec: DenoiserSpec, calibration: CalibrationSet) -> float:
    """Squared size of an image as a whole: pixels times the squared range, or the latents' own energy."""
    count = int(np.prod(spec.sample.shape))
    if spec.pixel_range is not None:
        return count * (spec.pixel_range[1] - spec.pixel_range[0]) ** 2
    return count * float(np.mean(np.square(calibration.samples[-1], dtype=np.float64)))


def _image_table(
    timesteps: Array, values: dict[str, dict[str, Array]], first: int, unit: float, notes: tuple[str, ...]
) -> SensitivityTable:
    losses: dict[str, dict[str, float]] = {}
    by_timestep: dict[str, dict[str, Array]] = {}
    vectors: dict[str, dict[str, Array]] = {}
    for layer, by_scheme in values.items():
        for scheme, rows in by_scheme.items():
            images = rows[:, first:].astype(np.float64)
            entries = images.shape[1] * images.shape[2]
            vector = images.sum(axis=0).reshape(-1) / np.sqrt(entries * unit)
            vectors.setdefault(layer, {})[scheme] = vector.astype(np.float32)
            losses.setdefault(layer, {})[scheme] = float(np.sum(np.square(vector)))
            alone = np.square(images).reshape(len(images), -1).sum(axis=1) / (entries * unit)
            by_timestep.setdefault(layer, {})[scheme] = alone.astype(np.float32)
    size = len(next(iter(next(iter(vectors.values())).values())))
    return SensitivityTable("image", timesteps, losses, by_timestep, vectors, np.zeros(size, bool), notes)


class _ImageProbing(_Probing):
    """Output probes and image probes over whole trajectories of a chunk of samples."""

    def __init__(
        self,
        graph: LayerGraph,
        candidates: Mapping[str, CandidateWeights],
        stats: CalibrationStats,
        calls: Calls,
        spec: DenoiserSpec,
        options: MeasureOptions,
        output_probes: int,
    ) -> None:
        super().__init__(graph, candidates, stats, calls, spec, options)
        self._sample = spec.sample.name
        self._shape = spec.sample.shape
        self._output_probes = output_probes

    def trajectory(self, steps: list[Step], chunk: slice, values: dict[str, dict[str, Array]], advance: Any) -> Array:
        """Carry the probes from the image back to the first step; return ||output||^2 summed, per step."""
        image_probes = self._options.probes - self._output_probes
        rows = [
            np.random.default_rng((self._options.seed, IMAGE_MARK, call)).standard_normal(
                (image_probes, *self._shape), np.float32
            )
            for call in range(chunk.start, chunk.stop)
        ]
        carried = torch.from_numpy(np.stack(rows, 1)).to(self._float_type)
        power = np.zeros(len(steps))
        for index in reversed(range(len(steps))):
            power[index], carried = self._step(index, steps[index], chunk, carried, values)
            advance(chunk.stop - chunk.start)
        return power

    def _step(
        self, index: int, step: Step, chunk: slice, carried: Any, values: dict[str, dict[str, Array]]
    ) -> tuple[float, Any]:
        feeds = self._graph.feed(self._calls.feeds(index, chunk))
        sample = feeds[self._sample].clone().requires_grad_(True)
        into, out = [u.use.input for u in self._uses], [u.use.output for u in self._uses]
        found = self._graph.run({**feeds, self._sample: sample}, keep=(*into, *out), differentiate=out)
        output = found[self._output]
        power = float(output.detach().double().square().sum())
        if not np.isfinite(power):
            self._refuse_non_finite(found)
        channels = sample.shape[1]
        slope_x, slope_out = step.slopes(sample.detach(), output.detach()[:, :channels])
        shape = tuple(output.shape[1:])
        cotangents = torch.zeros((self._options.probes, *output.shape), dtype=self._float_type)
        cotangents[: self._output_probes] = self._noise(index, chunk, shape)[: self._output_probes].reshape(
            self._output_probes, *output.shape
        )
        cotangents[self._output_probes :, :, :channels] = slope_out * carried
        gradients, into_sample = self._gradients(cotangents, output, [found[n] for n in out], sample)
        with torch.no_grad():
            for number, item in enumerate(self._uses):
                rows, gradients[number] = gradients[number], []
                if rows:
                    x = found[item.use.input].detach()
                    self._project(item, x, torch.stack(rows, 1), chunk, index, values)
            return power, slope_x * carried + into_sample

    def _gradients(self, cotangents: Any, output: Any, targets: list[Any], sample: Any) -> tuple[list[list[Any]], Any]:
        """Return, per use, the gradients of all probes, and those of the image probes into the sample."""
        gradients: list[list[Any]] = [[] for _ in targets]
        into_sample = []
        for probe, cotangent in enumerate(cotangents):
            last = probe + 1 == len(cotangents)
            found = torch.autograd.grad(output, [*targets, sample], cotangent, retain_graph=not last, allow_unused=True)
            for rows, gradient in zip(gradients, found[:-1], strict=True):
                if gradient is not None:
                    rows.append(gradient.to(self._errors_type))
            if probe >= self._output_probes:
                into_sample.append(torch.zeros_like(sample) if found[-1] is None else found[-1])
        return gradients, torch.stack(into_sample)
