"""A precision plan: each layer's scheme and what is known of the whole (``plan.json``)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mpq_deploy.allocate.cross_terms import CrossTerms
from mpq_deploy.allocate.milp import SolverReport
from mpq_deploy.allocate.predicted_images import PredictedImages
from mpq_deploy.graph.layers import OtherWeight
from mpq_deploy.latency.costs import PlanLatency
from mpq_deploy.system.inputs import read_json
from mpq_deploy.system.validated import model_of


@dataclass(frozen=True)
class PlannedLayer:
    """A layer of the plan. ``refused``: scheme -> why the layer may not take it.

    None: ``predicted_loss`` where the metric predicts no error, ``latency_ms`` where it is not
    known, ``importance`` and the linear program's ``linear_bits`` but for metrics that weigh bits.
    """

    name: str
    op: str
    scheme: str
    bytes: int
    fp16_bytes: int
    weights: int
    weight_shape: tuple[int, ...]
    predicted_loss: float | None
    latency_ms: float | None
    refused: dict[str, str]
    importance: float | None = None
    linear_bits: float | None = None


@dataclass(frozen=True)
class BitProgram:
    """The plan's sum of importance x bits, and the linear program's bound over continuous bits."""

    weighted_bits: float
    linear_bound: float


@dataclass(frozen=True)
class LoraSlots:
    """Slots of one rank for LoRAs: how many layers have one, bytes of their inputs, and their time.

    The bytes are no constants of the file. ``latency_ms`` of one call, estimated, is part of the
    plan's; None where nothing is known of the target's speed.
    """

    rank: int
    layers: int
    size_bytes: int
    latency_ms: float | None

    def text(self, whole_ms: float | None) -> str:
        """Say what they take, beside ``whole_ms`` of the whole call."""
        said = f"LoRA slots of rank {self.rank} in {self.layers} layers: {self.size_bytes:,} bytes of inputs"
        if self.latency_ms is None or not whole_ms:
            return f"{said}; their time is unknown"
        share = self.latency_ms / whole_ms
        return f"{said}, {self.latency_ms:.3g} of {whole_ms:.3g} ms ({share:.0%}, estimated)"


@dataclass(frozen=True)
class PrecisionPlan:
    """One scheme per layer (``layers`` in graph order); ``others``: constants that are not layers.

    ``predicted_loss`` as in the sensitivity table; None where the metric only ranks layers.
    ``bit_program``: of metrics that weigh bits; ``cross_terms``: of metrics with probes;
    ``latency``: where something is known of the target's speed. ``simulated``: some layers have
    schemes that no engine can hold, and bytes are nominal. ``tied``: layers that had to take one
    scheme (``allocate.tie_qkv``). ``predicted_interval``: 95 %, of ``predicted_loss``;
    ``prediction_note``: what it leaves out, or why there is none. ``predicted_images``: of metrics
    of final images, which predict no error of outputs.
    """

    budget_bytes: int
    size_bytes: int
    fp16_size_bytes: int
    fixed_bytes: int
    predicted_loss: float | None
    schemes: dict[str, str]
    layers: tuple[PlannedLayer, ...]
    others: tuple[OtherWeight, ...]
    solver: SolverReport
    notes: tuple[str, ...] = ()
    bit_program: BitProgram | None = None
    cross_terms: CrossTerms | None = None
    simulated: bool = False
    latency: PlanLatency | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    predicted_interval: tuple[float, float] | None = None
    prediction_note: str = ""
    lora_slots: LoraSlots | None = None
    predicted_images: PredictedImages | None = None

    def save(self, path: Path) -> None:
        """Write the plan as JSON with sorted keys."""
        values = asdict(self)
        for layer in values["layers"] if self.bit_program is None else ():
            del layer["importance"], layer["linear_bits"]
        path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> PrecisionPlan:
        """Read what ``save`` wrote."""
        plan: PrecisionPlan = model_of(cls, read_json(path, infinite=True), str(path))
        return plan
