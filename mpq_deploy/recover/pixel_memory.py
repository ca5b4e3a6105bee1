"""A queue of the float model's feature pixels across timesteps, and a loss that uses them.

Our reading of MPQ-DMv2's "memory-based temporal relation distillation ... online time-aware pixel
queue" (arXiv 2507.04290; only the abstract is public to us). Default sizes are those of the same
authors' earlier work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mpq_deploy.models.spec import Array

Tensor = Any  # torch.Tensor; torch is not followed by mypy here
TEMPERATURE = 0.1


class PixelMemory:
    """A ring buffer of unit pixels [size, C] tagged with their timestep."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pixels: Tensor = torch.zeros(0, 0)
        self.timesteps = np.zeros(size, np.float32)
        self.written = 0

    @property
    def used(self) -> int:
        """Number of slots that hold a pixel."""
        return min(self.written, self.size)

    def enqueue(self, pixels: Tensor, timesteps: Array) -> None:
        """Overwrite the oldest pixels by ``pixels`` [n, C] of ``timesteps`` [n]."""
        if not self.pixels.numel():
            self.pixels = torch.zeros(self.size, pixels.shape[1], device=pixels.device)
        pixels, timesteps = pixels.detach()[-self.size :], timesteps[-self.size :]
        places = (self.written + np.arange(len(pixels))) % self.size
        self.pixels[torch.from_numpy(places).to(self.pixels.device)] = pixels.to(self.pixels)
        self.timesteps[places] = timesteps
        self.written += len(pixels)

    def anchors(self, count: int, rng: np.random.Generator) -> Tensor:
        """Draw at most ``count`` different pixels [A, C], stored timesteps with equal chances."""
        tags = self.timesteps[: self.used]
        _, which, counts = np.unique(tags, return_inverse=True, return_counts=True)
        chances = 1.0 / counts[which]
        places = rng.choice(
            self.used, min(count, self.used), replace=False, p=chances / chances.sum()
        )
        return self.pixels[torch.from_numpy(places).to(self.pixels.device)]

    def loss(
        self, expected: Tensor, output: Tensor, count: int, rng: np.random.Generator
    ) -> Tensor:
        """Return the mean over pixels of KL(softmax(f . a / 0.1) || softmax(q . a / 0.1)).

        ``expected`` f, ``output`` q: unit pixels [n, C] of the float model and the student. 0 while
        the memory is empty.
        """
        if not self.used:
            return output.sum() * 0.0
        anchors = self.anchors(count, rng).T.to(output)
        target = functional.log_softmax(expected @ anchors / TEMPERATURE, dim=-1)
        given = functional.log_softmax(output @ anchors / TEMPERATURE, dim=-1)
        return functional.kl_div(given, target, reduction="none", log_target=True).sum(1).mean()

    def state(self) -> dict[str, Tensor]:
        """Return the whole state as tensors."""
        return {
            "pixels": self.pixels,
            "timesteps": torch.from_numpy(self.timesteps),
            "written": torch.tensor([self.written]),
        }

    def restore(self, state: dict[str, Tensor], device: Any = "cpu") -> None:
        """Restore what ``state`` returned, with the pixels on ``device``."""
        self.pixels = state["pixels"].clone().to(device)
        self.timesteps = state["timesteps"].numpy().copy()
        self.written = int(state["written"][0])
