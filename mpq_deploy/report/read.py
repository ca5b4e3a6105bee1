"""Read report.json again, for comparing and gating.

In: a run folder or a report.json. Out: a ``ReadReport``. Keys that this release does not know are
passed over; a file whose values do not match its digest is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from mpq_deploy.device.signature import PublicKey, verify
from mpq_deploy.errors import UsageError
from mpq_deploy.report.data import SCHEMA_VERSION, DeviceInfo, ReportData
from mpq_deploy.report.seal import values_digest
from mpq_deploy.run.folder import check_one_run
from mpq_deploy.system.files import SEAL
from mpq_deploy.system.inputs import as_object, parse_json, read_text

REPORT = "report.json"
AGAIN = "Write it again with 'mpq-deploy report RUN'."
FOREIGN = "Give a run folder, or the report.json that 'mpq-deploy report RUN' wrote."


class ReadReport(ReportData):
    """A report and where it lies: ``label`` is the path as it was given."""

    label: str

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


@dataclass(frozen=True)
class Latency:
    """A latency of one call and where it comes from.

    ``milliseconds``: the median; ``problem``: why it does not count for the plan, else empty.
    """

    milliseconds: float
    source: str
    target: str
    problem: str = ""


def read_report(path: Path) -> ReadReport:
    """Read the report of a run folder, or a report.json.

    Raises UsageError for a missing, damaged, changed or foreign file, a schema that this release
    does not know, and a run folder whose plan was made again since it was reported.
    """
    check_one_run(path)
    file = path / REPORT if path.is_dir() else path
    text, raw = _object(file)
    version = raw.get("schema_version")
    if type(version) is not int:
        raise UsageError(
            f"{file} is not a report of mpq-deploy: its schema_version is {version!r}.", FOREIGN
        )
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{file} has schema {version}; this release reads {SCHEMA_VERSION}.",
            "Read it with the release of mpq-deploy that wrote it, or write it again.",
        )
    _check_digest(file, text, raw)
    try:
        report = ReadReport.model_validate({**raw, "label": str(path)}, extra="ignore")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{file} is damaged: {f'{where}: ' if where else ''}{first['msg']}.", AGAIN
        ) from None
    if path.is_dir():
        _check_current(path, report)
    return report


# Reports hold a row for each layer and figure: some megabytes for the largest models.
REPORT_BYTES = 64 << 20


def check_signed(paths: Iterable[Path | None], key: PublicKey) -> None:
    """Raise SignatureError unless each report (file or run folder; None: none) is signed by ``key``."""
    for path in paths:
        if path is not None:
            verify(path / REPORT if path.is_dir() else path, key)


def latencies(report: ReadReport) -> list[Latency]:
    """Return every measured latency of the plan, by device.

    ONNX Runtime's counts only where it is the target.
    """
    measured = []
    for device in report.devices:
        if device.median_ms is not None and (
            not device.graph or device.target == report.target.name
        ):
            calls = f"median of {device.calls} calls" if device.calls else "median"
            source = f"measured on {device.device} ({device.target}, {device.builder}; {calls})"
            measured.append(Latency(device.median_ms, source, device.target, _problem(device)))
    engine = report.engine
    if engine is not None and engine.latency_ms is not None:
        source = f"engine of {engine.backend} {engine.version}, {engine.latency_source or 'source not recorded'}"
        measured.append(Latency(engine.latency_ms, source, report.target.name))
    return measured


def slowest(report: ReadReport) -> Latency | None:
    """Return the slowest latency of the report's target, else of any; None if none was measured."""
    measured = latencies(report)
    own = [one for one in measured if one.target == report.target.name]
    return max(own or measured, key=lambda one: one.milliseconds, default=None)


def _problem(device: DeviceInfo) -> str:
    if not device.layers_verified:
        return "the engine's layers there are not as planned"
    return (
        "the engine's outputs there differ from the references"
        if device.outputs_agree is False
        else ""
    )


def _object(file: Path) -> tuple[str, dict[str, Any]]:
    """Return a file's text and the JSON object in it."""
    if not file.exists():
        raise UsageError(f"There is no report at {file}.", "Make it with 'mpq-deploy report RUN'.")
    text = read_text(file, limit=REPORT_BYTES, error=UsageError, hint=FOREIGN)
    raw = parse_json(text, str(file), error=UsageError, hint=AGAIN)
    return text, as_object(
        raw, f"{file} is not a report of mpq-deploy: it", error=UsageError, hint=FOREIGN
    )


def _check_digest(file: Path, text: str, raw: dict[str, Any]) -> None:
    """Raise UsageError where the file's digest is missing or is not that of its values."""
    try:
        intact = raw.get(SEAL) == values_digest(text)
    except (ValueError, RecursionError):
        # Values that no report holds (NaN, infinity): they came in later.
        intact = False
    if not intact:
        problem = (
            f"its {SEAL} does not match its values" if SEAL in raw else f"its {SEAL} was removed"
        )
        raise UsageError(
            f"{file} was changed after it was written: {problem}.",
            "Write it again with 'mpq-deploy report RUN', or fetch the release's own file again.",
        )


def _check_current(run: Path, report: ReadReport) -> None:
    """Refuse a run folder whose plan was made again since its report was written."""
    plan = run / "allocate" / "plan.json"
    if not plan.is_file():
        return
    rows = _object(plan)[1].get("layers")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if {row.get("name"): row.get("scheme") for row in rows} != {
        layer.name: layer.scheme for layer in report.layers
    }:
        raise UsageError(
            f"{run / REPORT} reports an earlier plan: {plan} has been made again since.",
            f"Update it with 'mpq-deploy report {run}'.",
        )
