"""What an audit found, as plain values for audit.json and the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mpq_deploy.studies.agreement import Calibration, Correlation

# How metrics are called wherever people read them.
TITLES = {
    "probe": "probes",
    "probe+cross": "probes, cross terms",
    "trajectory": "trajectory probes",
    "gain": "gain × local error",
    "local_error": "local error",
    "kurtosis": "kurtosis",
    "orm": "orthogonality",
    "size-only": "size only",
    "random": "random",
    "exhaustive": "exhaustive",
}


@dataclass(frozen=True)
class PlanPoint:
    """A measured plan at a budget; or why it is ``refused``, and any plan's ``smallest_bytes``.

    ``nmse`` with ``nmse_error``, its standard error over images; ``psnr_db`` None for ``identical``
    images.
    """

    budget: float
    size_bytes: int | None = None
    size_ratio: float | None = None
    predicted: float | None = None
    nmse: float | None = None
    nmse_error: float | None = None
    psnr_db: float | None = None
    identical: bool = False
    refused: str = ""
    smallest_bytes: int | None = None


@dataclass(frozen=True)
class MetricResult:
    """How a metric agrees with the truth, and its plans' quality. ``seconds`` of processor time.

    ``metric``: what was measured (gain, where probes could not be); ``refused``: why it could not
    be measured. ``pooled`` over all schemes; None for the truth and for cross terms. ``images`` and
    ``images_calibration``: the same against the errors of final images, where these were measured.
    """

    key: str
    metric: str
    seconds: float | None
    pooled: Correlation | None = None
    classes: dict[str, Correlation] | None = None
    calibration: Calibration | None = None
    images: Correlation | None = None
    images_calibration: Calibration | None = None
    plans: tuple[PlanPoint, ...] = ()
    notes: tuple[str, ...] = ()
    refused: str = ""

    @property
    def title(self) -> str:
        """What the metric is called."""
        return TITLES.get(self.key, self.key)


@dataclass(frozen=True)
class TruthInfo:
    """How the truth was measured: ``pairs`` of ``of``; whether by torch or not is in the notes."""

    pairs: int
    of: int
    seconds: float
    seed: int

    @property
    def complete(self) -> bool:
        """Whether every pair was measured."""
        return self.pairs == self.of


@dataclass(frozen=True)
class AuditResult:
    """The values of audit.json.

    ``losses``: a row per pair of the truth, with each metric's loss. ``image_seconds``: processor
    time in which the pairs' errors of final images were measured; None where they were not.
    """

    model: str
    weights: int
    layers: int
    calls: int
    timesteps: int
    budgets: tuple[float, ...]
    truth: TruthInfo
    metrics: tuple[MetricResult, ...]
    losses: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any]
    synthetic: str
    notes: tuple[str, ...]
    versions: dict[str, str]
    command: str
    image_seconds: float | None = None

    def metric(self, key: str) -> MetricResult | None:
        """Return the row of ``key``, if there is one."""
        return next((row for row in self.metrics if row.key == key), None)

    def as_json(self) -> dict[str, Any]:
        """Return the values of audit.json."""
        return asdict(self)
