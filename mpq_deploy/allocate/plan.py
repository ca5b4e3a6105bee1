"""A precision plan: each layer's scheme, and sizes and predictions of the whole (``plan.json``)."""

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

    ``predicted_loss``: None where the metric predicts no error. ``latency_ms``: None where unknown.
    ``importance`` and the linear program's ``linear_bits``: only for metrics that weigh bits.
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
    """The plan's sum of importance x bits, and its upper bound over continuous bits."""

    weighted_bits: float
    linear_bound: float


@dataclass(frozen=True)
class LoraSlots:
    """LoRA slots of one ``rank``: how many layers have one, and what they cost.

    ``size_bytes``: of the slots' graph inputs, which are not in the file. ``latency_ms``: estimated
    time per call, included in the plan's; None where the target's speed is unknown.
    """

    rank: int
    layers: int
    size_bytes: int
    latency_ms: float | None

    def text(self, whole_ms: float | None) -> str:
        """Return a sentence on the slots' cost; ``whole_ms``: the time of the whole call."""
        said = f"LoRA slots of rank {self.rank} in {self.layers} layers: {self.size_bytes:,} bytes of inputs"
        if self.latency_ms is None or not whole_ms:
            return f"{said}; their time is unknown"
        share = self.latency_ms / whole_ms
        return f"{said}, {self.latency_ms:.3g} of {whole_ms:.3g} ms ({share:.0%}, estimated)"


@dataclass(frozen=True)
class PrecisionPlan:
    """One scheme per layer (``layers`` in graph order); ``others``: constants that are not layers.

    ``predicted_loss``: NMSE of the denoiser's output; None where the metric does not predict it.
    ``bit_program``: only for metrics that weigh bits. ``cross_terms``: only for metrics with
    probes. ``latency``: None where the target's speed is unknown. ``simulated``: some layers have
    schemes that no engine can hold, and bytes are nominal. ``tied``: groups of layers that had to
    take one scheme (``allocate.tie_qkv``). ``predicted_interval``: 95 % interval of
    ``predicted_loss``; ``prediction_note``: what the interval leaves out, or why there is none.
    ``predicted_images``: only for metrics of final images, which do not predict the output's NMSE.
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
