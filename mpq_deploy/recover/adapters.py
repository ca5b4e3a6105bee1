"""Adapters: what moves a latent weight before it is quantized, and merges into its codes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

Tensor = Any  # torch.Tensor; torch is not followed by mypy here


class Adapter(torch.nn.Module):  # type: ignore[misc]
    """``up`` [O, r] times ``down`` [r, K]: the B and A of EfficientDM. None of it is left after merging.

    Starts as EfficientDM's does, A by Kaiming (uniform within 1 / sqrt(K)), B zero, so that the product is zero. With
    ``rank`` 0 ``up`` [O, K] is all there is: every code learns by itself (our choice, for models that memory allows).
    """

    def __init__(self, rows: int, columns: int, rank: int, rng: np.random.Generator) -> None:
        super().__init__()
        rank = min(rank, rows, columns)
        self.up = torch.nn.Parameter(torch.zeros(rows, rank or columns))
        self.down: torch.nn.Parameter | None = None
        if rank:
            bound = 1 / math.sqrt(columns)
            down = rng.uniform(-bound, bound, (rank, columns)).astype(np.float32)
            self.down = torch.nn.Parameter(torch.from_numpy(down))

    def forward(self) -> Tensor:
        """Return the product [O, K]."""
        return self.up if self.down is None else self.up @ self.down

    def start_from(self, up: Tensor, down: Tensor) -> None:
        """Take other factors [O, r] and [r, K] to start from."""
        with torch.no_grad():
            if self.down is None:
                self.up.copy_(up @ down)
            else:
                self.up.copy_(up)
                self.down.copy_(down)
