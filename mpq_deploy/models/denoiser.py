"""A denoiser as it was opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from mpq_deploy.models.conditions import Conditions
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec
from mpq_deploy.system.progress import Talk


class Network(Protocol):
    """Where the graph comes from: a PyTorch module or an ONNX file."""

    # Largest relative error that the export may show against ``reference``.
    tolerance: float
    inputs: tuple[InputSpec, ...]

    def taking(self, inputs: Sequence[InputSpec]) -> Network:
        """Return the network with other shapes of its inputs."""

    def to_onnx(self, talk: Talk) -> ir.Model:
        """Return the network as a normalised FP32 ONNX graph with dynamic batch axis."""

    def reference(self, feeds: dict[str, Array]) -> Array:
        """Return the network's own output for ``feeds``, float32."""

    def release(self) -> None:
        """Let go of the weights in memory: neither of the above is called again."""


@dataclass(frozen=True)
class Denoiser:
    """A denoiser with everything that is needed to sample from it. ``decoder`` turns latents into
    images; ``notes`` say what the user should know, such as why there is none.
    """

    spec: DenoiserSpec
    conditions: Conditions
    network: Network
    decoder: Network | None = None
    notes: tuple[str, ...] = ()
    # The timestep that a pipeline's first call gives; None where a sampler says them.
    first_timestep: float | None = None
