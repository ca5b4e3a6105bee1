"""The distillation losses between the student (quantized) and the teacher (float), by name.

- ``output``: squared error of the output over the float output's energy at that timestep, so that
  its mean is the NMSE that evaluation measures (our choice, the default).
- ``eps``, ``v``, ``sample``: mean squared error of the noise, the velocity or the clean sample that
  the outputs imply. Both models get the same x_t, so each of these errors is the output's error
  times a factor of the timestep.
- ``relation``: MPQ-DM's relation distillation between pixels, smoothed over two sampler steps.
- ``memory``: relations to pixels of earlier calls at any timestep (our reading of MPQ-DMv2; see
  ``pixel_memory``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mpq_deploy.calls.ddim import alphas_cumprod
from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.recipe import RecoverSettings
from mpq_deploy.recover.batches import Batch
from mpq_deploy.recover.pixel_memory import PixelMemory
from mpq_deploy.recover.student import Student

Tensor = Any  # torch.Tensor; torch is not followed by mypy here
# Loss -> (its value, its weight).
Terms = dict[str, tuple[Tensor, float]]
# Factor of the KL divergence in MPQ-DM's code.
RELATION_FACTOR = 100.0
SPACES = ("eps", "v", "sample")


def output_loss(output: Tensor, expected: Tensor, factors: Tensor) -> Tensor:
    """Return the mean over M of ``factors`` [M] x sum of squared errors of ``output`` [M, ...]."""
    return torch.mean((output - expected).square().flatten(1).sum(1) * factors)


def space_factor(prediction: str, space: str, signal: Array) -> Array:
    """Return the ratio of an error in ``space`` to the error of what the model predicts, [M].

    ``prediction``: what the model predicts; ``signal`` [M]: a = alpha-bar of the timesteps. For a
    fixed x_t = sqrt(a) x_0 + sqrt(1 - a) eps, an error d of eps is an error sqrt((1 - a) / a) d of
    x_0 and d / sqrt(a) of v = sqrt(a) eps - sqrt(1 - a) x_0.
    """
    a = np.clip(np.asarray(signal, np.float64), 1e-6, 1 - 1e-6)
    of_eps = {"eps": np.ones_like(a), "v": 1 / np.sqrt(a), "sample": np.sqrt((1 - a) / a)}
    own = {"epsilon": "eps", "v_prediction": "v", "sample": "sample"}[prediction]
    return np.asarray(of_eps[space] / of_eps[own])


def pixels_of(feature: Tensor, channel_axis: int, most: int) -> Tensor:
    """Return the pixels of ``feature`` as unit vectors [M, P, C].

    ``feature`` [M, C, *space], or [M, ..., C] for a ``channel_axis`` of -1. Maps of more than
    ``most`` pixels are subsampled on a grid (our choice).
    """
    if channel_axis == -1:
        feature = feature.movedim(-1, 1)
    space = feature.ndim - 2
    if space > 0:
        stride = max(1, math.ceil((math.prod(feature.shape[2:]) / most) ** (1 / space) - 1e-9))
        places = tuple([slice(None)] * 2 + [slice(None, None, stride)] * space)
        feature = feature[places]
    return functional.normalize(
        feature.flatten(2) if space else feature[:, :, None], dim=1
    ).transpose(1, 2)


def relation_loss(expected: Tensor, output: Tensor) -> Tensor:
    """Return 100 KL(softmax(R) || softmax(R^)), mean over calls; R, R^: cosines between pixels.

    ``expected``, ``output``: unit pixels [M, P, C] of teacher and student. Source: MPQ-DM (arXiv
    2412.11549), its code; that code detaches the student's features, so its loss has no gradient.
    Here they are not detached.
    """
    target = functional.log_softmax(expected @ expected.transpose(1, 2), dim=-1)
    given = functional.log_softmax(output @ output.transpose(1, 2), dim=-1)
    divergence = functional.kl_div(given, target, reduction="none", log_target=True)
    return RELATION_FACTOR * divergence.sum(dim=(1, 2)).mean()


class LossTerms:
    """The losses with a positive weight in ``options``.

    ``energy`` [K]: mean squared norm of the float output at each timestep; ``elements``: values of
    one output. ``memory`` is part of the training state. Raises UsageError for a loss that needs a
    noise schedule where the model predicts flow.
    """

    def __init__(
        self, spec: DenoiserSpec, options: RecoverSettings, energy: Array, elements: int
    ) -> None:
        self._weights = {name: weight for name, weight in options.losses.items() if weight > 0}
        self._options, self._spec = options, spec
        self._energy, self._elements = np.maximum(energy, np.finfo(np.float64).tiny), elements
        self.memory = PixelMemory(options.memory_size) if "memory" in self._weights else None
        spaces = [name for name in self._weights if name in SPACES]
        self._alphas: Array = np.empty(0)
        if spaces:
            if spec.prediction_type == "flow_prediction":
                raise UsageError(
                    f"The loss '{spaces[0]}' needs a noise schedule, but this model predicts flow.",
                    "Use the loss 'output'.",
                )
            self._alphas = np.asarray(alphas_cumprod(spec.scheduler), np.float64)

    def terms(
        self, student: Student, batch: Batch, weights: Array, rng: np.random.Generator
    ) -> Terms:
        """Return each loss on ``batch`` and its weight. ``weights`` [M]: from ``draw_weights``."""
        related = [name for name in ("relation", "memory") if name in self._weights]
        keep = (student.feature,) if related else ()
        values = student.run(student.feed(batch.feeds), keep)
        expected = student.place(batch.expected)
        made: dict[str, Tensor] = {}
        for name in self._weights:
            if name in ("output", *SPACES):
                factors = student.place((weights * self._factors(name, batch)).astype(np.float32))
                made[name] = output_loss(values[student.output], expected, factors)
        if related:
            float_feature = student.teach(student.feed(batch.feeds), keep)[student.feature]
            feature = values[student.feature]
            if "relation" in self._weights:
                made["relation"] = self._relation(student, batch, float_feature, feature)
            if self.memory is not None:
                made["memory"] = self._remembered(student, batch, float_feature, feature, rng)
        return {name: (made[name], weight) for name, weight in self._weights.items()}

    def _factors(self, name: str, batch: Batch) -> Array:
        if name == "output":
            return np.asarray(1.0 / self._energy[batch.steps])
        signal = np.interp(
            batch.timesteps.astype(np.float64), np.arange(len(self._alphas)), self._alphas
        )
        return space_factor(self._spec.prediction_type, name, signal) ** 2 / self._elements

    def _relation(
        self, student: Student, batch: Batch, float_feature: Tensor, feature: Tensor
    ) -> Tensor:
        """Return the relation loss of features averaged over two steps, as in MPQ-DM.

        Only the later step has a gradient.
        """
        earlier = student.feed(batch.earlier)
        with torch.no_grad():
            before = student.run(earlier, (student.feature,))[student.feature]
        float_before = student.teach(earlier, (student.feature,))[student.feature]
        axis, most = student.feature_axis, self._options.relation_pixels
        expected = pixels_of((float_feature + float_before) / 2, axis, most)
        return relation_loss(expected, pixels_of((feature + before) / 2, axis, most))

    def _remembered(
        self,
        student: Student,
        batch: Batch,
        float_feature: Tensor,
        feature: Tensor,
        rng: np.random.Generator,
    ) -> Tensor:
        assert self.memory is not None
        options = self._options
        everything = math.prod(float_feature.shape)
        expected, output = (
            pixels_of(f, student.feature_axis, everything) for f in (float_feature, feature)
        )
        count = expected.shape[0] * expected.shape[1]
        picked = torch.from_numpy(
            rng.choice(count, min(options.memory_pixels, count), replace=False)
        )
        here = picked.to(expected.device)
        some = expected.flatten(0, 1)[here]
        loss = self.memory.loss(some, output.flatten(0, 1)[here], options.memory_anchors, rng)
        self.memory.enqueue(some, np.repeat(batch.timesteps, expected.shape[1])[picked.numpy()])
        return loss
