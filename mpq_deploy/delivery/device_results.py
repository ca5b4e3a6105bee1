"""results.json of a device or of 'mpq-deploy bench': checked, kept, and read for the report.

It must be of the run's present plan. Only what validates here is kept, in
``RUN/devices/<target>.json``, outside the stages, since timings do not repeat.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mpq_deploy.bench.timed_subject import ORT
from mpq_deploy.device.manifest import RESULTS_FORMAT
from mpq_deploy.errors import InputError, UsageError
from mpq_deploy.report.data import DeviceInfo, Ratio
from mpq_deploy.system.files import write_text
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.names import path_inside, plain_name, printable
from mpq_deploy.system.validated import first_error

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run
    from mpq_deploy.system.progress import Talk

FOLDER = "devices"
STAGES = ("allocate", "quantize")
HINT = "Give the results.json that 'mpq-deploy install' wrote on the device."
# A file of ours has some kilobytes; one with many problems some hundred.
RESULTS_BYTES = 4 << 20
# Sections that the rest does not need: left out, with a warning, if they do not validate.
OPTIONAL = ("build", "latency", "memory", "bench")

# Text of a device: control characters as escapes, so that it can be shown anywhere.
Text = Annotated[str, Field(max_length=2000), AfterValidator(printable)]
PlainName = Annotated[str, AfterValidator(lambda name: _plain(name))]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{0,64}$")]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
# An hour for one call is not one of our timings.
Milliseconds = Annotated[float, Field(gt=0, le=3.6e6)]
Quotient = Annotated[float, Field(gt=0, le=1e9)]


def _plain(name: str) -> str:
    try:
        return plain_name(name, "it")
    except InputError as error:
        raise ValueError(error.message) from error


class Section(BaseModel):
    """Unknown fields are dropped: a newer mpq-deploy may write more."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="ignore")


class _Package(Section):
    name: Text = ""
    manifest_sha256: Digest = ""
    digests: dict[Text, Text] = Field(default={}, max_length=100)


class _Device(Section):
    board: Text = ""
    machine: Text = ""
    python: Text = ""
    gpu: Text = ""
    compute_capability: Text = ""


class DeviceProblem(Section):
    """A layer that is not as planned."""

    layer: Text = ""
    message: Text
    severity: Literal["wrong", "slow"]


class _Engine(Section):
    backend: Text
    version: Text
    bytes: Bytes
    weights_bytes: Bytes | None
    activation_bytes: Bytes | None
    verified: bool
    problems: list[DeviceProblem] = Field(max_length=100_000)
    file: Text = ""

    @model_validator(mode="after")
    def _agrees(self) -> _Engine:
        if self.verified and any(one.severity == "wrong" for one in self.problems):
            raise ValueError("it is verified, though layers are wrong")
        return self


class DeviceReference(Section):
    """Whether the outputs of reference inputs agree."""

    ran: bool
    why: Text
    passed: bool | None
    cases: dict[Text, Annotated[float, Field(ge=0)] | None] = Field(max_length=100)
    tolerance_nmse: Annotated[float, Field(ge=0)] | None = None
    made_by: Text = ""

    @model_validator(mode="after")
    def _agrees(self) -> DeviceReference:
        if not self.ran and self.passed is not None:
            raise ValueError("it passed or failed, though nothing ran")
        if self.ran and not self.cases:
            raise ValueError("it ran, and has no cases")
        if self.passed and None in self.cases.values():
            raise ValueError("it passed, though an output is not finite")
        limit = self.tolerance_nmse
        if self.passed and limit is not None and max(e or 0 for e in self.cases.values()) > limit:
            raise ValueError(f"it passed, though an error is above its tolerance {limit}")
        return self


class DeviceLatency(Section):
    """Times of calls."""

    mean_ms: Milliseconds
    p50_ms: Milliseconds
    p90_ms: Milliseconds
    p99_ms: Milliseconds
    calls: Annotated[int, Field(ge=1, le=10**9)]
    samples_per_second: Quotient | None = None


class _Memory(Section):
    weights_bytes: Bytes | None = None
    activation_bytes: Bytes | None = None
    taken_bytes: Annotated[int, Field(ge=-(1 << 50), le=1 << 50)] | None = None


class _Build(Section):
    build_seconds: Annotated[float, Field(ge=0, le=1e7)]
    peak_rss_bytes: Bytes


class _Ratio(Section):
    value: Quotient
    low: Quotient | None
    high: Quotient | None
    rounds: Annotated[int, Field(ge=1)] = 1


class _Subject(Section):
    name: Text
    file: Text = ""
    backend: Text = ""
    device: Text = ""
    batch: Annotated[int, Field(ge=1)] | None = None
    latency: DeviceLatency | None = None


class _Bench(Section):
    subjects: list[_Subject] = Field(min_length=1, max_length=2)
    ratio: _Ratio | None
    note: Text = ""

    @model_validator(mode="after")
    def _two(self) -> _Bench:
        if self.ratio is not None and len(self.subjects) < 2:
            raise ValueError("a ratio needs two subjects")
        return self


class DeviceResults(Section):
    """The values of a results.json, all checked. Fields as ``device.installer`` writes them."""

    format: Literal[1] = RESULTS_FORMAT  # type: ignore[assignment]
    made_by: Text = ""
    package: _Package
    target: PlainName
    dialect: Text = ""
    device: _Device
    engine: _Engine
    build: _Build | None = None
    reference: DeviceReference
    latency: DeviceLatency | None
    memory: _Memory | None = None
    passed: bool
    bench: _Bench | None = None

    @model_validator(mode="after")
    def _agrees(self) -> DeviceResults:
        # 'mpq-deploy bench' times, and passes whatever the engine holds.
        agrees = self.engine.verified and self.reference.passed is not False
        if self.bench is None and self.passed != agrees:
            raise ValueError("'passed' is not what its engine and references say")
        return self


def read_results(path: Path, talk: Talk | None = None) -> DeviceResults:
    """Read and check a device's results.json; optional sections that are wrong are left out with a warning.

    Raises UsageError, naming the field, when it is none.
    """
    values = read_json_object(path, limit=RESULTS_BYTES, error=UsageError, hint=HINT)
    if values.get("format") != RESULTS_FORMAT:
        version = printable(repr(values.get("format"))[:40])
        what = f"{path} is not a results.json of format {RESULTS_FORMAT} (found {version})."
        raise UsageError(what, HINT)
    if "components" in values:
        what = f"{path} is the results.json of a whole pipeline."
        raise UsageError(what, "Give it with the run of the whole, or a component's with its own.")
    try:
        return DeviceResults.model_validate(values)
    except ValidationError as error:
        wrong = {str(one["loc"][0]) if one["loc"] else "" for one in error.errors()}
        if not wrong <= set(OPTIONAL):
            raise UsageError(
                f"{path} is not a results.json: {first_error(error)}.", HINT
            ) from error
        if talk is not None:
            talk.warn(f"{path}: {', '.join(sorted(wrong))} left out: {first_error(error)}")
        # Null is what the device writes where it did not measure.
        return DeviceResults.model_validate({**values, **dict.fromkeys(wrong)})


def take_in(run: Run, path: Path) -> Path:
    """Keep the results at ``path`` in the run folder; return where.

    Raises UsageError when it is not a results.json, or one of another plan.
    """
    results = read_results(path, run.talk)
    stale = stale_stage(run, results)
    if stale:
        raise UsageError(
            f"{path} was measured with another {stale} than that of {run.path}.",
            "Give the run that was packaged, or package this one and install it again.",
        )
    return keep(run, results)


def keep(run: Run, results: DeviceResults) -> Path:
    """Write results of this plan into the run folder; return where."""
    kind = ".bench" if results.bench else ""
    folder = run.path / FOLDER
    kept = path_inside(folder, results.target, "The target of results.json", suffix=f"{kind}.json")
    folder.mkdir(exist_ok=True)
    values = results.model_dump(mode="json")
    write_text(kept, json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return kept


def device_infos(run: Run) -> tuple[DeviceInfo, ...]:
    """Return the devices' results of this plan, by target.

    Warns of those of an earlier plan, and of files that are not results, and leaves them out.
    """
    infos = []
    for path in sorted((run.path / FOLDER).glob("*.json")):
        try:
            results = read_results(path, run.talk)
        except UsageError as error:
            run.talk.warn(f"left out of the report: {error.message}")
            continue
        if stale_stage(run, results):
            run.talk.warn(f"{path} belongs to an earlier plan and is left out of the report")
        else:
            infos.append(device_info(results))
    return tuple(infos)


def device_info(results: DeviceResults) -> DeviceInfo:
    """Return what the report shows of one device."""
    engine, reference, times = results.engine, results.reference, results.latency
    errors = list(reference.cases.values())
    finite = [error for error in errors if error is not None]
    device = results.device
    wrong = [one for one in engine.problems if one.severity == "wrong"]
    return DeviceInfo(
        target=results.target,
        device=device.board or device.gpu or device.machine,
        builder=f"{engine.backend} {engine.version}",
        engine_bytes=engine.bytes,
        weights_bytes=engine.weights_bytes,
        activation_bytes=engine.activation_bytes,
        layers_verified=engine.verified,
        problems=tuple(f"{one.layer}: {one.message}" for one in wrong),
        outputs_agree=reference.passed,
        output_nmse=max(finite) if finite and len(finite) == len(errors) else None,
        not_run=reference.why,
        median_ms=times.p50_ms if times else None,
        p99_ms=times.p99_ms if times else None,
        calls=times.calls if times else None,
        graph=engine.backend == ORT,
        ratio=_ratio(results.bench),
    )


def _ratio(bench: _Bench | None) -> Ratio | None:
    if bench is None or bench.ratio is None:
        return None
    ratio = bench.ratio
    return Ratio(against=bench.subjects[1].name, value=ratio.value, low=ratio.low, high=ratio.high)


def stale_stage(run: Run, results: DeviceResults) -> str:
    """The first stage whose outputs are not those that were packaged; empty when all are."""
    digests = results.package.digests
    made_by = {name: run.deployed_stage if name == "quantize" else name for name in STAGES}
    return next((name for name in STAGES if digests.get(name) != run.digest(made_by[name])), "")
