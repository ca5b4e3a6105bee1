"""results.json of a whole pipeline's device: checked, kept in the runs, and read for the joint report.

It must be of the run's present plans. The whole's is kept in ``RUN/devices/<target>.json``, each
component's in its own run, as one of its own package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from mpq_deploy.delivery.device_results import (
    FOLDER,
    HINT,
    RESULTS_BYTES,
    DeviceResults,
    PlainName,
    Section,
    Text,
    keep,
    stale_stage,
)
from mpq_deploy.device.manifest import RESULTS_FORMAT
from mpq_deploy.errors import UsageError
from mpq_deploy.run.folder import COMPONENTS
from mpq_deploy.run.pipeline_file import PipelineFile, WholeDevice
from mpq_deploy.run.view import Run
from mpq_deploy.system.files import write_text
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.names import path_inside
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.validated import first_error

QUANTIZED = "quantize"


class _Images(Section):
    ran: bool
    why: Text
    passed: bool | None
    errors: dict[Text, Annotated[float, Field(ge=0)] | None] = Field(max_length=100)
    tolerance: Annotated[float, Field(ge=0)]


class WholeResults(Section):
    """The values of a whole's results.json, all checked. Fields as ``device.whole_installer`` writes them.

    ``digests``: of each component's graph, as it was packaged.
    """

    format: Literal[1] = RESULTS_FORMAT  # type: ignore[assignment]
    made_by: Text = ""
    target: PlainName
    digests: dict[Text, dict[Text, Text]] = Field(max_length=20)
    components: dict[Text, DeviceResults] = Field(max_length=20)
    images: _Images
    passed: bool

    @model_validator(mode="after")
    def _agrees(self) -> WholeResults:
        parts = all(one.passed for one in self.components.values())
        if self.passed != (self.images.passed is not False and parts):
            raise ValueError("'passed' is not what its components and images say")
        return self


def is_whole_results(path: Path) -> bool:
    """Whether ``path`` is the results.json of a whole pipeline. Raises UsageError for no JSON."""
    return "components" in read_json_object(path, limit=RESULTS_BYTES, error=UsageError, hint=HINT)


def read_whole_results(path: Path) -> WholeResults:
    """Read and check a whole's results.json. Raises UsageError, naming the field, when it is none."""
    values = read_json_object(path, limit=RESULTS_BYTES, error=UsageError, hint=HINT)
    try:
        return WholeResults.model_validate(values)
    except ValidationError as error:
        what = f"{path} is not the results.json of a whole pipeline: {first_error(error)}."
        raise UsageError(what, HINT) from error


def take_in_whole(run: Path, path: Path, talk: Talk) -> Path:
    """Keep the results at ``path`` in the whole pipeline's ``run`` and its parts; return where.

    Raises UsageError when it is no results.json of a whole, or one of other plans.
    """
    if not is_whole_results(path):
        raise UsageError(
            f"{path} is the results.json of one component.",
            f"Give it with its own run: mpq-deploy report {run / COMPONENTS}/NAME --device {path}",
        )
    results, runs = read_whole_results(path), _runs(run, talk)
    if stale := _stale(runs, results):
        raise UsageError(
            f"{path} was measured with another {stale} than that of {run}.",
            "Give the run that was packaged, or package this one and install it again.",
        )
    for name, one in results.components.items():
        keep(runs[name], one)
    kept = path_inside(run / FOLDER, results.target, "The target of results.json", suffix=".json")
    kept.parent.mkdir(exist_ok=True)
    text = json.dumps(results.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
    write_text(kept, text + "\n")
    return kept


def whole_devices(run: Path, view: PipelineFile, batch: int, talk: Talk) -> tuple[WholeDevice, ...]:
    """Return what devices measured of these plans, by target; others are left out with a warning.

    ``batch``: samples of one timed call.
    """
    found, files = [], sorted((run / FOLDER).glob("*.json"))
    runs = _runs(run, talk) if files else {}
    for path in files:
        try:
            results = read_whole_results(path)
        except UsageError as error:
            talk.warn(f"left out of the report: {error.message}")
            continue
        if _stale(runs, results):
            talk.warn(f"{path} belongs to earlier plans and is left out of the report")
        else:
            found.append(_device(results, view, batch))
    return tuple(found)


def _runs(run: Path, talk: Talk) -> dict[str, Run]:
    names = PipelineFile.load(run).parts
    return {name: Run.opened(run / COMPONENTS / name, talk) for name in names}


def _stale(runs: Mapping[str, Run], results: WholeResults) -> str:
    """The first component whose plan or graph is not the one that was packaged; empty when all are."""
    if set(results.digests) != set(runs) or not set(results.components) <= set(runs):
        return "set of components"
    for name, run in runs.items():
        one = results.components.get(name)
        stale = stale_stage(run, one) if one is not None else ""
        if stale or results.digests[name].get(QUANTIZED) != run.digest(run.deployed_stage):
            return f"{name} ({stale or QUANTIZED})"
    return ""


def _device(results: WholeResults, view: PipelineFile, batch: int) -> WholeDevice:
    parts, images = results.components, results.images
    times = {name: one.latency.p50_ms for name, one in parts.items() if one.latency}
    rows = {name: part.rows for name, part in view.parts.items()}
    per_image = [times[name] * (rows[name] or 0) / batch for name in times]
    errors = list(images.errors.values())
    finite = [one for one in errors if one is not None]
    first = next(iter(parts.values()), None)
    device = first.device if first else None
    return WholeDevice(
        target=results.target,
        device=(device.board or device.gpu or device.machine) if device else "",
        engine_bytes={name: one.engine.bytes for name, one in parts.items()},
        verified=all(one.engine.verified for one in parts.values()) if parts else None,
        outputs_agree={name: one.reference.passed for name, one in parts.items()},
        median_ms=times,
        image_ms=sum(per_image) if times and set(times) == set(view.parts) else None,
        images_agree=images.passed,
        image_error=max(finite) if finite and len(finite) == len(errors) else None,
        tolerance=images.tolerance,
        not_made=images.why,
    )
