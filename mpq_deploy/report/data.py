"""The report's values. The run fills them; ``write`` makes JSON, Markdown and HTML of them.

Every number is finite: NaN and infinity are refused here by field, and an infinite PSNR (identical
images) is None. What was not measured is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from mpq_deploy.allocate.predicted_images import PredictedImages
from mpq_deploy.formats.scheme import FP16
from mpq_deploy.models.spec import Array

# Changes when a reader of report.json must change.
# 2: predicted_nmse, and a layer's or a sweep point's, is null for metrics that predict no error.
# 3: sha256, the digest of all other values, which a reader verifies (``report.seal``).
SCHEMA_VERSION = 3

IDENTICAL = "identical"


class Part(BaseModel):
    """A piece of the report: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraInfo(Part):
    """A LoRA that was fused: its file's name and SHA-256, and how many layers of each part it changed."""

    name: str
    sha256: str
    scale: float
    layers: dict[str, int]


class LoraSlotsInfo(Part):
    """Slots for LoRAs beside the plan's layers: their rank, number, bytes as inputs, and estimated time."""

    rank: int = Field(ge=1)
    layers: int = Field(ge=1)
    size_bytes: int = Field(ge=1)
    latency_ms: float | None = Field(None, ge=0)


class ModelInfo(Part):
    """The denoiser. ``synthetic``: what about it is not real (random weights), in words.

    ``digest``: SHA-256 of the float graph and its weights; empty when unknown.
    """

    name: str
    source: str
    labels: tuple[str, ...] = ()
    synthetic: str = ""
    weights: int | None = Field(None, ge=0, description="number of weight elements of all layers")
    sample_shape: tuple[int, ...] = ()
    digest: str = ""
    loras: tuple[LoraInfo, ...] = ()


class TargetInfo(Part):
    """What the engine is for. ``title`` is for people."""

    name: str
    title: str = ""
    dialect: str = ""


class Interval(Part):
    """The 95 % interval of a mean over images or calls (``evaluate.interval``)."""

    low: float
    high: float


class Quality(Part):
    """How near a variant is to the float model. None: not measured.

    The intervals are None below two images and for identical images.
    """

    measured_nmse: float | None = Field(None, ge=0)
    psnr_db: float | None = None
    pooled_psnr_db: float | None = None
    ssim: float | None = None
    psnr_db_interval: Interval | None = None
    ssim_interval: Interval | None = None
    nmse_interval: Interval | None = None
    psnr_db_each: tuple[float, ...] = Field(
        (), description="of each image, in the order of the noise"
    )
    ssim_each: tuple[float, ...] = ()
    nmse_by_timestep: tuple[float, ...] = ()
    identical: bool = Field(
        False, description="images equal to the float model's: psnr_db is infinite and so None"
    )


class Control(Quality):
    """A uniform variant made in the same run."""

    title: str
    size_bytes: int = Field(ge=0)
    size_ratio: float = Field(ge=0)
    layers: dict[str, int] = Field(
        default_factory=dict, description="number of layers by family of schemes"
    )
    calls: int | None = Field(
        None, description="calls at each timestep on which its error was measured"
    )
    behind_db: float | None = Field(
        None, description="the plan's PSNR minus its own, mean over the images that it has"
    )
    behind_db_interval: Interval | None = Field(
        None, description="of behind_db: 95 %, Student's t, over all looks (evaluate.sequential)"
    )


class CurvePoint(Part):
    """One budget of a sweep; ``measured_nmse`` and ``psnr_db`` only where it was evaluated."""

    size_ratio: float = Field(ge=0)
    predicted_nmse: float | None = Field(ge=0)
    predicted_psnr_db: float | None = None
    measured_nmse: float | None = Field(None, ge=0)
    psnr_db: float | None = None


class Check(Part):
    """One thing that was verified of the engine, and by what."""

    what: str
    passed: bool
    detail: str = ""


class EngineInfo(Part):
    """The engine as its own build log describes it.

    ``planned_weights_bytes``: what the plan expects of the engine's weights memory. ``latency_ms``
    was measured on the device of ``latency_source``; None: not measured here.
    """

    backend: str
    version: str
    file: str
    sha256: str
    weights_bytes: int | None = Field(None, ge=0)
    planned_weights_bytes: int | None = Field(None, ge=0)
    engine_bytes: int | None = Field(None, ge=0)
    verified: bool
    checks: tuple[Check, ...] = ()
    build_seconds: float | None = Field(None, ge=0)
    latency_ms: float | None = Field(None, ge=0)
    latency_source: str = ""
    notes: tuple[str, ...] = ()


class Ratio(Part):
    """A median time over another's, timed in turns; ``low``, ``high``: 95 % bootstrap interval."""

    against: str
    value: float = Field(gt=0)
    low: float | None = Field(None, gt=0)
    high: float | None = Field(None, gt=0)


class DeviceInfo(Part):
    """What a device measured when the package was installed there; None: not measured.

    ``outputs_agree``: the outputs lie within the references' tolerance; ``not_run``: why nothing
    ran.
    """

    target: str
    device: str
    builder: str
    engine_bytes: int = Field(ge=0)
    weights_bytes: int | None = Field(None, ge=0)
    activation_bytes: int | None = Field(None, ge=0)
    layers_verified: bool
    problems: tuple[str, ...] = ()
    outputs_agree: bool | None = None
    output_nmse: float | None = Field(None, ge=0)
    not_run: str = ""
    median_ms: float | None = Field(None, ge=0)
    p99_ms: float | None = Field(None, ge=0)
    calls: int | None = Field(None, ge=0)
    graph: bool = Field(False, description="no engine: ONNX Runtime ran the graph itself")
    ratio: Ratio | None = Field(
        None, description="from 'mpq-deploy bench': beside the float or FP16 model"
    )


class LayerRow(Part):
    """One layer of the plan, in graph order. ``refused``: scheme -> why the layer may not take it.

    ``importance``, and the bits that the linear program gives it (``linear_bits``): only for
    metrics that weigh bits.
    """

    name: str
    op: str
    scheme: str
    bytes: int = Field(ge=0)
    fp16_bytes: int = Field(ge=0)
    weights: int = Field(ge=0)
    weight_shape: tuple[int, ...] = ()
    predicted_loss: float | None = Field(None, ge=0)
    refused: dict[str, str] = Field(default_factory=dict)
    loss_by_timestep: tuple[float, ...] = Field((), description="at the report's loss_timesteps")
    kurtosis: float | None = Field(
        None, ge=0, description="mean over the weight's rows, pre-scaled; normal: 3"
    )
    latency_ms: float | None = Field(
        None, ge=0, description="alone; estimated or measured as ExpectedLatency says"
    )
    importance: float | None = None
    linear_bits: float | None = Field(None, ge=0)


class OtherRow(Part):
    """A constant that is not a layer, and why it stays in FP16."""

    name: str
    op: str
    elements: int = Field(ge=0)
    reason: str


class StageRow(Part):
    """What a stage took when it was last made; ``cached``: it was up to date in this call."""

    name: str
    seconds: float = Field(ge=0)
    peak_rss_bytes: int | None = Field(None, ge=0)
    cached: bool
    device: str = Field("cpu", description="the device that computed it")


class SolverInfo(Part):
    """How the allocation ended. ``gap`` is relative."""

    status: str
    gap: float = Field(ge=0)
    seconds: float | None = Field(None, ge=0)


class CpuLatencyInfo(Part):
    """Calls in ONNX Runtime on the building machine's CPU, as such: nothing about the device."""

    float_ms: float = Field(ge=0)
    ours_ms: float = Field(ge=0)
    source: str


class ExpectedLatency(Part):
    """The plan's expected time per call at ``batch``, beside everything FP16, INT8 and INT4.

    Sums over single layers, never a measurement of the engine. ``source``: estimated, measured
    (layer by layer) or both; ``basis``: on what, in words. ``others_ms``: what is not a layer, always
    estimated. ``slower_in_int8``: layers expected to be slower in INT8 than in FP16; ``taken``:
    those that the plan has in INT8. ``limit_ms``: the limit asked for. Where the plan is slower than
    FP16: ``fastest_ms`` within the budget with ``fastest_loss``, and ``as_fast_at``, the share of
    FP16's size from which a plan is as fast as that. ``fusion``: on what products of one input count
    as one kernel.
    """

    ours_ms: float = Field(ge=0)
    fp16_ms: float = Field(ge=0)
    int8_ms: float = Field(ge=0)
    others_ms: float = Field(ge=0)
    batch: int = Field(ge=1)
    source: str
    basis: str
    measured: int = Field(ge=0)
    estimated: int = Field(ge=0)
    slower_in_int8: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    objective: str = "quality"
    limit_ms: float | None = Field(None, gt=0)
    int4_ms: float | None = Field(None, ge=0)
    controls_ms: dict[str, float] = Field(default_factory=dict, description="of further controls")
    fastest_ms: float | None = Field(None, ge=0)
    fastest_loss: float | None = Field(None, ge=0)
    as_fast_at: float | None = Field(None, ge=0)
    fusion: str = ""

    @property
    def slower(self) -> str:
        """Say that the plan is slower than FP16 and what would be faster; empty where it is not."""
        if self.ours_ms <= self.fp16_ms:
            return ""
        said = f"Slower than FP16 ({self.source}): {self.ours_ms:.3g} ms per call, FP16 {self.fp16_ms:.3g} ms."
        if self.fastest_ms is not None:
            loss = (
                ""
                if self.fastest_loss is None
                else f" with a predicted NMSE of {self.fastest_loss:.2e}"
            )
            said += (
                f" Fastest within the budget: {self.fastest_ms:.3g} ms{loss} (--objective latency)."
            )
        if self.as_fast_at is not None:
            said += f" As fast as FP16: --budget {math.ceil(100 * self.as_fast_at) / 100:.2f}."
        return said

    @property
    def words(self) -> str:
        """The expectation as a clause that says that it is not a measurement."""
        return (
            f"{self.ours_ms:.3g} ms expected at batch {self.batch} "
            f"({self.source} layer by layer; {self.basis}), not measured"
        )


class EvaluationInfo(Part):
    """How the images and errors were measured."""

    samples: int = Field(ge=1)
    steps: int = Field(ge=1)
    seed: int
    sampler: str
    image_kind: Literal["pixels", "decoded", "latents", "features"] = "pixels"


class SizeRow(Part):
    """A variant's figures at one of several sizes; ``psnr_db`` None: images equal to the float model's."""

    size: str
    title: str
    measured_nmse: float | None
    psnr_db: float | None
    ssim: float | None
    samples: int


class FrechetInfo(Part):
    """A Frechet distance of one model's images with all that it depends on (``evaluate.metrics``).

    ``title`` is FID on the standard Inception only. ``against``: the float model's images of the
    same noise, or real ones (``against_samples`` 0: unknown). ``floor``: the float model's own
    distance (0 to its own images). ``interval``: of the distance; ``increase_interval``: of
    distance - floor. ``other_noise``: the float model's images of other noise against the same.
    ``real_floor``: between halves of the real images. ``extrapolated``: to infinitely many images.
    KID, precision and recall: against the real images, else the float model's of other noise, each
    with the float model's own. None: not measured.
    """

    variant: str
    title: str
    network: str
    network_digest: str
    network_features: int = Field(ge=1)
    against: Literal["float", "real"]
    against_source: str
    against_samples: int = Field(ge=0)
    against_digest: str
    samples: int = Field(ge=2)
    sampler: str
    steps: int = Field(ge=1)
    seed: int
    distance: float = Field(ge=0)
    floor: float = Field(ge=0)
    interval: Interval
    increase_interval: Interval
    other_noise: float = Field(ge=0)
    real_floor: float | None = Field(None, ge=0)
    real_floor_samples: int | None = None
    extrapolated: float | None = None
    extrapolated_floor: float | None = None
    kid: float | None = None
    kid_floor: float | None = None
    precision: float | None = Field(None, ge=0, le=1)
    precision_floor: float | None = Field(None, ge=0, le=1)
    recall: float | None = Field(None, ge=0, le=1)
    recall_floor: float | None = Field(None, ge=0, le=1)

    @property
    def kind(self) -> tuple[object, ...]:
        """What the same distance of another variant shares."""
        against = (self.against, self.against_digest if self.against == "real" else "")
        return (
            self.network,
            self.network_digest,
            *against,
            self.samples,
            self.sampler,
            self.steps,
            self.seed,
        )

    @property
    def described(self) -> str:
        """Its name with everything that it depends on, in words."""
        to = (
            "the float model's images"
            if self.against == "float"
            else self.against_source or "real images"
        )
        return f"{self.title}, {self.samples:,} images, {self.sampler}, seed {self.seed}, to {to}"

    @property
    def increase(self) -> float:
        """What quantization adds to the distance."""
        return self.distance - self.floor

    @property
    def within_noise(self) -> bool:
        """Whether the distance shows no difference: see ``interval``, ``other_noise``."""
        if self.against == "float":
            return self.interval.high < self.other_noise
        return self.increase_interval.low <= 0 <= self.increase_interval.high


class ScoreInfo(Part):
    """A mean score of one model's images with all that it depends on (``evaluate.metrics.scores``).

    ``floor``: the float model's own (LPIPS: 0); ``interval``: of the mean; ``increase_interval``:
    of value - floor, paired by image; None for one image. ``other_noise``: of the float model's
    images of other noise.
    """

    variant: str
    title: str
    score: Literal["lpips", "clip-score"]
    score_digest: str
    samples: int = Field(ge=1)
    sampler: str
    steps: int = Field(ge=1)
    seed: int
    value: float = Field(ge=0)
    floor: float = Field(ge=0)
    interval: Interval | None = None
    increase_interval: Interval | None = None
    other_noise: float = Field(ge=0)

    @property
    def kind(self) -> tuple[object, ...]:
        """What the same score of another variant shares."""
        return (self.score, self.score_digest, self.samples, self.sampler, self.steps, self.seed)

    @property
    def increase(self) -> float:
        """What quantization adds: worse are an LPIPS above 0 and a CLIP score below 0."""
        return self.value - self.floor


class ImportanceInfo(Part):
    """How a metric that weighs bits by the layers' importance chose the plan.

    ``weighted_bits``: the plan's sum of importance x bits; ``linear_bound``: the maximum over
    continuous bits within the same bytes; ``timesteps`` in denoising order with their ``weights``;
    ``calls``: minimum number behind a Gram matrix (0: none needed); ``constant``: layers with the
    same output for all calls at every timestep.
    """

    settings: str
    timesteps: tuple[float, ...]
    weights: tuple[float, ...]
    weighted_bits: float
    linear_bound: float
    calls: int = Field(0, ge=0)
    constant: int = Field(0, ge=0)


class RecoveryInfo(Part):
    """The output's error on held-out trajectories, before training and after ``best_step``.

    ``curve``: (update, held-out error); ``best_step`` 0: the plan's weights stayed.
    """

    steps: int = Field(ge=1)
    best_step: int = Field(ge=0)
    before: float = Field(ge=0)
    after: float = Field(ge=0)
    curve: tuple[tuple[int, float], ...]
    summary: str


@dataclass(frozen=True)
class OrmPictures:
    """Orthogonality of L layers at K timesteps for the page; not in JSON (see measure/orm.npz).

    ``orm`` [K, L, L], ``theta`` [K, L], ``timesteps`` and ``weights`` [K]; ``constant`` bool [L]:
    layers with the same output for all calls.
    """

    layers: tuple[str, ...]
    timesteps: Array
    weights: Array
    theta: Array
    orm: Array
    constant: Array


class LayerOption(Part):
    """What a layer could have taken instead: its bytes and its predicted loss then."""

    scheme: str
    bytes: int = Field(ge=0)
    predicted_loss: float | None = Field(None, ge=0)


class BudgetPlan(Part):
    """One plan. ``schemes``: each layer's index into ``BudgetPlans.schemes``.

    ``predicted_nmse``: of the output, or of the final images where ``predicted_psnr_db``, their
    mean PSNR, is known. ``latency_ms``: of one call; None where nothing is known of the target's speed.
    """

    size_bytes: int = Field(ge=0)
    predicted_nmse: float | None = Field(ge=0)
    predicted_psnr_db: float | None = None
    latency_ms: float | None = Field(None, ge=0)
    schemes: tuple[int, ...]


class PlanTimes(Part):
    """What plans' times are: ``source`` as in ``ExpectedLatency``, at ``batch``; FP16's beside."""

    fp16_ms: float = Field(ge=0)
    source: str
    batch: int = Field(ge=1)


class BudgetPlans(Part):
    """Plans of which none is better in size, predicted error and time, by size; not in JSON.

    ``layer_bytes``: per layer, scheme index -> bytes. ``smaller``, ``larger``: per layer, the best
    option of fewer and of more bytes than this run's plan. ``command``: builds a plan on this run,
    once ``--budget`` and the like are added. ``times``: None where plans have none.
    """

    layers: tuple[str, ...]
    schemes: tuple[str, ...]
    layer_bytes: tuple[dict[int, int], ...]
    plans: tuple[BudgetPlan, ...]
    smaller: dict[str, LayerOption] = Field(default_factory=dict)
    larger: dict[str, LayerOption] = Field(default_factory=dict)
    command: str = ""
    times: PlanTimes | None = None


class SchemeTotal(Part):
    """How many layers and bytes of one operator took one scheme."""

    op: str
    scheme: str
    layers: int
    bytes: int
    fp16_bytes: int


@dataclass(frozen=True)
class ImageSet:
    """Pictures for the page, not for JSON: uint8 [N, H, W, C] by variant, ``float`` first.

    All variants have the same noise. ``titles`` name them for people; ``labels``: the conditions.
    """

    images: dict[str, Array]
    labels: tuple[str, ...] = ()
    titles: dict[str, str] = field(default_factory=dict)


class ReportData(Quality):
    """The whole report. Sizes in bytes; PSNR in dB against the float model's images.

    ``nmse_by_timestep`` belongs to ``timesteps`` (scheduler values, in sampling order), the layers'
    losses to ``loss_timesteps``. ``reproduce``: the exact command. ``engine_note``: why ``engine``
    is None.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )

    model: ModelInfo
    target: TargetInfo
    budget: float = Field(gt=0, description="the requested size, as a fraction of the FP16 size")
    budget_bytes: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    fp16_size_bytes: int = Field(gt=0)
    fixed_bytes: int = Field(0, ge=0, description="constants that are not layers")
    predicted_nmse: float | None = Field(
        ge=0, description="None: the metric ranks layers and predicts no error"
    )
    predicted_interval: Interval | None = None
    prediction_note: str = Field(
        "", description="what the interval leaves out, or why there is none"
    )
    predicted_images: PredictedImages | None = Field(
        None, description="PSNR of final images, by metrics that predict these"
    )
    timesteps: tuple[float, ...] = ()
    evaluation: EvaluationInfo | None = None
    loss_timesteps: tuple[float, ...] = ()
    by_size: tuple[SizeRow, ...] = Field((), description="of a model of several sizes")
    extras: dict[str, Control] = Field(
        default_factory=dict, description="this plan, run in another way"
    )
    controls: dict[str, Control] = Field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    engine: EngineInfo | None = None
    engine_note: str = ""
    cpu_latency: CpuLatencyInfo | None = None
    expected_latency: ExpectedLatency | None = Field(
        None, description="None: the target's speed is unknown"
    )
    lora_slots: LoraSlotsInfo | None = Field(None, description="None: the engine has none")
    devices: tuple[DeviceInfo, ...] = Field((), description="from installed packages")
    layers: tuple[LayerRow, ...]
    others: tuple[OtherRow, ...] = ()
    stages: tuple[StageRow, ...] = ()
    solver: SolverInfo | None = None
    sensitivity: str = Field("", description="metric behind the predicted losses")
    versions: dict[str, str] = Field(default_factory=dict)
    reproduce: str = ""
    notes: tuple[str, ...] = ()
    images: ImageSet | None = Field(None, exclude=True, repr=False)
    importance: ImportanceInfo | None = None
    orm: OrmPictures | None = Field(None, exclude=True, repr=False)
    budgets: BudgetPlans | None = Field(None, exclude=True, repr=False)
    simulated: bool = Field(
        False, description="no engine can hold the plan's schemes: bytes are nominal"
    )
    recovery: RecoveryInfo | None = None
    frechet: tuple[FrechetInfo, ...] = Field(
        (), description="of this plan's images; from 'mpq-deploy metrics'"
    )
    frechet_controls: dict[str, tuple[FrechetInfo, ...]] = Field(
        default_factory=dict, description="of the controls'"
    )
    scores: tuple[ScoreInfo, ...] = Field(
        (), description="LPIPS and CLIP scores of this plan's images and the controls'"
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def schema_version(self) -> int:
        """Version of report.json's schema."""
        return SCHEMA_VERSION

    @computed_field  # type: ignore[prop-decorator]
    @property
    def size_ratio(self) -> float:
        """Deployed bytes divided by the FP16 bytes of the same constants."""
        return self.size_bytes / self.fp16_size_bytes

    @computed_field  # type: ignore[prop-decorator]
    @property
    def totals(self) -> tuple[SchemeTotal, ...]:
        """Layers and bytes per operator and scheme."""
        return scheme_totals(self.layers)

    @property
    def compared(self) -> dict[str, Control]:
        """What stands beside this plan: the extras, then the controls."""
        return {**self.extras, **self.controls}

    @property
    def prediction_ratio(self) -> float | None:
        """Predicted over measured NMSE; None where one is missing or the error is 0."""
        if self.predicted_nmse is None or not self.measured_nmse:
            return None
        return self.predicted_nmse / self.measured_nmse

    def as_json(self) -> dict[str, Any]:
        """Return the values of report.json: everything but the pictures."""
        return self.model_dump(mode="json")


def scheme_totals(layers: Iterable[LayerRow]) -> tuple[SchemeTotal, ...]:
    """Count layers and bytes per (operator, scheme), sorted."""
    groups: dict[tuple[str, str], list[LayerRow]] = {}
    for layer in layers:
        groups.setdefault((layer.op, layer.scheme), []).append(layer)
    return tuple(
        SchemeTotal(
            op=op,
            scheme=scheme,
            layers=len(rows),
            bytes=sum(row.bytes for row in rows),
            fp16_bytes=sum(row.fp16_bytes for row in rows),
        )
        for (op, scheme), rows in sorted(groups.items())
    )


@dataclass(frozen=True)
class KeptReason:
    """Why some constants stayed in FP16: how many, how many bytes, and their names."""

    reason: str
    count: int
    bytes: int
    names: tuple[str, ...]
    kind: Literal["layer", "other"]


CHOSEN_FP16 = (
    "it could be quantized, but at this budget its bytes are better kept here than elsewhere"
)


def kept_in_fp16(data: ReportData) -> tuple[KeptReason, ...]:
    """Group what stayed in FP16 by the reason, layers first, then by bytes."""
    groups: dict[tuple[Literal["layer", "other"], str], list[tuple[str, int]]] = {}
    known = {name for layer in data.layers for name in (layer.scheme, *layer.refused)} - {FP16.name}
    for layer in data.layers:
        if layer.scheme == FP16.name:
            groups.setdefault(("layer", _reason(layer, known)), []).append(
                (layer.name, layer.bytes)
            )
    for other in data.others:
        groups.setdefault(("other", other.reason), []).append((other.name, 2 * other.elements))
    kept = [
        KeptReason(
            reason, len(rows), sum(size for _, size in rows), tuple(name for name, _ in rows), kind
        )
        for (kind, reason), rows in groups.items()
    ]
    return tuple(sorted(kept, key=lambda k: (k.kind, -k.bytes, k.reason)))


def _reason(layer: LayerRow, known_schemes: set[str]) -> str:
    """Say why a layer stayed in FP16: all schemes were refused, or the allocation preferred it.

    A refusal names a scheme, or a family for all its block sizes.
    """
    open_schemes = {
        s
        for s in known_schemes
        if s not in layer.refused and s.split("+")[0].split("-")[0] not in layer.refused
    }
    if open_schemes or not layer.refused:
        return CHOSEN_FP16
    return "; ".join(dict.fromkeys(layer.refused.values()))
