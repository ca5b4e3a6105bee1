"""report.json read again: this release's and earlier ones', for comparing and gating.

In: a run folder or a report.json. Out: a ``ReadReport``, which keeps what a comparison needs and passes over the rest,
so that a report with more keys is still read. One whose values are not those of its digest is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpq_deploy.errors import UsageError
from mpq_deploy.report.data import (
    SCHEMA_VERSION,
    CpuLatencyInfo,
    DeviceInfo,
    EngineInfo,
    EvaluationInfo,
    Interval,
    LayerRow,
    ModelInfo,
    TargetInfo,
)
from mpq_deploy.report.seal import values_digest
from mpq_deploy.run.folder import SEAL

OLDEST_SCHEMA = 1
# Reports of this schema and later ones carry their digest.
SEALED_SCHEMA = 3
REPORT = "report.json"
_LENIENT = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Model(ModelInfo):
    model_config = _LENIENT


class _Target(TargetInfo):
    model_config = _LENIENT


class _Evaluation(EvaluationInfo):
    model_config = _LENIENT


class _Engine(EngineInfo):
    model_config = _LENIENT


class _Device(DeviceInfo):
    model_config = _LENIENT


class _Cpu(CpuLatencyInfo):
    model_config = _LENIENT


class _Layer(LayerRow):
    model_config = _LENIENT


class FrechetDistance(BaseModel):
    """A Frechet distance of the quantized model's images, always with the network and the count behind it.

    ``distance`` to ``against``: the float model's own images, or real ones; ``floor``: the float model's distance to
    the same (0 to its own images), so that ``distance - floor`` is what quantization adds.
    """

    model_config = _LENIENT

    network: str
    against: Literal["float", "real"]
    samples: int = Field(ge=2)
    distance: float = Field(ge=0)
    floor: float = Field(0.0, ge=0)
    interval: Interval | None = None
    increase_interval: Interval | None = None
    title: str = ""
    network_digest: str = ""
    against_digest: str = ""
    against_source: str = ""
    sampler: str = ""
    steps: int | None = None
    seed: int | None = None

    @property
    def called(self) -> str:
        """FID, or the distance's network: what it is called wherever it stands."""
        return self.title or f"Frechet distance ({self.network})"

    @property
    def kind(self) -> tuple[object, ...]:
        """What two distances must share to be comparable; against the float model its images are what the seed says."""
        against = (self.against, self.against_digest if self.against == "real" else "")
        return (self.network, self.network_digest, *against, self.samples, self.sampler, self.steps, self.seed)

    @property
    def described(self) -> str:
        """Its name with everything that it depends on, in words."""
        sampler = "" if not self.sampler else f", {self.sampler}"
        seed = "" if self.seed is None else f", seed {self.seed}"
        to = "the float model's images" if self.against == "float" else self.against_source or "real images"
        return f"{self.called}, {self.samples:,} images{sampler}{seed}, to {to}"

    @property
    def increase(self) -> float:
        """What quantization adds to the distance."""
        return self.distance - self.floor


class Score(BaseModel):
    """LPIPS or a CLIP score of a model's images, the mean over images; ``floor``: the float model's own (LPIPS: 0)."""

    model_config = _LENIENT

    variant: str
    score: Literal["lpips", "clip-score"]
    title: str
    score_digest: str
    samples: int = Field(ge=1)
    value: float = Field(ge=0)
    floor: float = Field(ge=0)
    interval: Interval | None = None
    increase_interval: Interval | None = None
    sampler: str = ""
    steps: int | None = None
    seed: int | None = None


class ExpectedCall(BaseModel):
    """What the plan is expected to take per call: a sum over single layers, never a measurement of the engine.

    ``source``: how the layers' times are known; ``basis`` on what, in words.
    """

    model_config = _LENIENT

    ours_ms: float = Field(ge=0)
    source: str
    basis: str = ""
    batch: int = Field(1, ge=1)

    @property
    def words(self) -> str:
        """The expectation as a clause that says that it is none of the engine's latencies."""
        basis = f"; {self.basis}" if self.basis else ""
        return (
            f"{self.ours_ms:.3g} ms expected at batch {self.batch} ({self.source} layer by layer{basis}), not measured"
        )


class ReadReport(BaseModel):
    """What a report says, and where it lies. ``remarks``: what this form of the report says in another way.

    ``label`` is the path as it was given; figures are as in ``ReportData``. ``verified``: whether the report's own
    digest was compared with its values; reports of earlier releases hold none.
    """

    model_config = _LENIENT

    label: str
    schema_version: int
    verified: bool
    model: _Model
    target: _Target
    budget: float = Field(gt=0)
    size_bytes: int = Field(ge=0)
    fp16_size_bytes: int = Field(gt=0)
    measured_nmse: float | None = Field(None, ge=0)
    psnr_db: float | None = None
    pooled_psnr_db: float | None = None
    ssim: float | None = None
    psnr_db_interval: Interval | None = None
    ssim_interval: Interval | None = None
    psnr_db_each: tuple[float, ...] = ()
    ssim_each: tuple[float, ...] = ()
    identical: bool = False
    evaluation: _Evaluation | None = None
    engine: _Engine | None = None
    cpu_latency: _Cpu | None = None
    expected_latency: ExpectedCall | None = None
    devices: tuple[_Device, ...] = ()
    layers: tuple[_Layer, ...]
    frechet: tuple[FrechetDistance, ...] = ()
    scores: tuple[Score, ...] = ()
    simulated: bool = False
    remarks: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ReadReport:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError("two layers have the same name")
        samples = self.evaluation.samples if self.evaluation is not None else 0
        for each in (self.psnr_db_each, self.ssim_each):
            if each and len(each) != samples:
                raise ValueError(f"figures of {len(each)} images, but {samples} samples")
        return self

    @property
    def unverified(self) -> str:
        """Say that nothing tells whether this report was changed since it was written; empty where its digest does."""
        if self.verified:
            return ""
        return (
            f"{self.label} was written by an earlier release, without a digest: whether it was changed since cannot "
            "be checked. 'mpq-deploy report RUN' on its run folder writes one"
        )

    @property
    def size_ratio(self) -> float:
        """Deployed bytes divided by the FP16 bytes of the same constants."""
        return self.size_bytes / self.fp16_size_bytes


@dataclass(frozen=True)
class Latency:
    """A latency of one call and where it comes from. ``problem``: why it does not speak for the plan; empty if it does.

    ``milliseconds`` is the median; ``source`` names the machine.
    """

    milliseconds: float
    source: str
    target: str
    problem: str = ""


def read_report(path: Path) -> ReadReport:
    """Read the report of a run folder, or a report.json.

    Raises UsageError for a missing, damaged, changed or foreign file, a schema that this release does not know, and a
    run folder whose plan is no longer the one that was reported.
    """
    file = path / REPORT if path.is_dir() else path
    text, raw = _object(file)
    version = raw.get("schema_version")
    if type(version) is not int or version < OLDEST_SCHEMA:
        raise UsageError(
            f"{file} is no report of mpq-deploy: its schema_version is {version!r}.",
            "Give a run folder, or the report.json that 'mpq-deploy report RUN' wrote.",
        )
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{file} has schema {version}; this release reads {OLDEST_SCHEMA} to {SCHEMA_VERSION}.",
            "Read it with the release of mpq-deploy that wrote it, or a later one.",
        )
    verified = _verified(file, text, raw)
    try:
        report = ReadReport(**{**_upgraded(raw), "label": str(path), "verified": verified})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{file} is damaged: {f'{where}: ' if where else ''}{first['msg']}.",
            "Write it again with 'mpq-deploy report RUN'.",
        ) from None
    if path.is_dir():
        _check_current(path, report)
    return report


def latencies(report: ReadReport) -> list[Latency]:
    """Return every measured latency of the engine, by device; ONNX Runtime is none of it, unless it is the target."""
    found = []
    for device in report.devices:
        if device.median_ms is not None and (not device.graph or device.target == report.target.name):
            calls = f"median of {device.calls} calls" if device.calls else "median"
            source = f"measured on {device.device} ({device.target}, {device.builder}; {calls})"
            found.append(Latency(device.median_ms, source, device.target, _problem(device)))
    engine = report.engine
    if engine is not None and engine.latency_ms is not None:
        source = f"engine of {engine.backend} {engine.version}, {engine.latency_source or 'source not recorded'}"
        found.append(Latency(engine.latency_ms, source, report.target.name))
    return found


def slowest(report: ReadReport) -> Latency | None:
    """Return the slowest latency of the report's own target, else of any; None where none was measured."""
    found = latencies(report)
    own = [one for one in found if one.target == report.target.name]
    return max(own or found, key=lambda one: one.milliseconds, default=None)


def _problem(device: DeviceInfo) -> str:
    if not device.layers_verified:
        return "the engine's layers there are not as planned"
    return "the engine's outputs there differ from the references" if device.outputs_agree is False else ""


def _object(file: Path) -> tuple[str, dict[str, Any]]:
    """Return a file's text and the JSON object that it is."""
    if not file.is_file():
        raise UsageError(f"There is no report at {file}.", "Make it with 'mpq-deploy report RUN'.")
    try:
        text = file.read_text(encoding="utf-8")
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} is no complete JSON ({error}).", "Write it again with 'mpq-deploy report RUN'."
        ) from None
    if not isinstance(raw, dict):
        raise UsageError(
            f"{file} is no report of mpq-deploy: it holds a {type(raw).__name__}.",
            "Give a run folder, or the report.json that 'mpq-deploy report RUN' wrote.",
        )
    return text, raw


def _verified(file: Path, text: str, raw: dict[str, Any]) -> bool:
    """Whether the file's digest is that of its values; False where it is of an earlier release and has none.

    Raises UsageError where it is another, or where a report that must have one has none.
    """
    if SEAL not in raw and raw["schema_version"] < SEALED_SCHEMA:
        return False
    try:
        intact = raw.get(SEAL) == values_digest(text)
    except (ValueError, RecursionError):
        # Values that no report holds (NaN, infinity): they came in later.
        intact = False
    if not intact:
        found = f"its {SEAL} is not that of its values" if SEAL in raw else f"its {SEAL} was taken out"
        raise UsageError(
            f"{file} was changed after it was written: {found}.",
            "Write it again with 'mpq-deploy report RUN', or fetch the release's own file again.",
        )
    return True


def _upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """Bring an early report's figures into today's meaning."""
    kept = {name: value for name, value in raw.items() if name not in ("label", "remarks")}
    # Before the pooled PSNR had a key of its own, psnr_db was the pooled one.
    if "pooled_psnr_db" not in raw and raw.get("psnr_db") is not None:
        kept["pooled_psnr_db"], kept["psnr_db"] = raw["psnr_db"], None
        kept["remarks"] = ("this early report has only the PSNR of all images together, not the mean over images",)
    return kept


def _check_current(run: Path, report: ReadReport) -> None:
    """Refuse a run folder whose plan was made again since its report was written."""
    plan = run / "allocate" / "plan.json"
    if not plan.is_file():
        return
    rows = _object(plan)[1].get("layers")
    planned = (
        {row.get("name"): row.get("scheme") for row in rows if isinstance(row, dict)} if isinstance(rows, list) else {}
    )
    if planned != {layer.name: layer.scheme for layer in report.layers}:
        raise UsageError(
            f"{run / REPORT} is that of a former plan: {plan} has been made again since.",
            f"Bring it up to date with 'mpq-deploy report {run}'.",
        )
