"""A target written from a probe's results: what the device has proven is allowed from then on.

In: ``probe-results.json`` from the device. Out: a YAML that extends the target, to be given as
``--target`` and shared as a file. Candidates, the check and what ``profile`` times follow it; the
probe's own times are evidence alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError

from mpq_deploy.delivery.device_results import (
    Bytes,
    DeviceLatency,
    DeviceProblem,
    DeviceReference,
    PlainName,
    Section,
    Text,
)
from mpq_deploy.delivery.probe_package import PROBED, PRODUCTS, Probed
from mpq_deploy.device.form_probe import RESULTS_FORMAT
from mpq_deploy.engine.target import Target, known_targets, load_target
from mpq_deploy.errors import InputError, UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.system.files import read_sealed, write_text
from mpq_deploy.system.names import printable
from mpq_deploy.system.validated import first_error

HINT = "Give the probe-results.json that run.sh wrote on the device."
# One line of text: it goes into a YAML and onto the terminal.
Line = Annotated[str, Field(max_length=200), AfterValidator(printable)]


class _Builder(Section):
    name: Literal["trtexec", "tensorrt", "tensorrt_rtx"]
    version: Annotated[str, Field(pattern=r"^\d+(\.\d+){1,4}$")]


class _Device(Section):
    board: Line = ""
    release: Line = ""
    machine: Line = ""
    gpu: Line = ""
    compute_capability: Line = ""


class ProbedForm(Section):
    """What a device made of one form."""

    built: bool
    error: Text = ""
    verified: bool | None
    problems: list[DeviceProblem] = Field(max_length=1000)
    kernels: dict[Line, Annotated[int, Field(ge=0)]] = Field(default={}, max_length=100)
    weights_bytes: Bytes | None = None
    constant_bytes: Bytes = 0
    reference: DeviceReference | None = None
    latency: DeviceLatency | None = None

    @property
    def proven(self) -> bool:
        """Built, stored and computed as planned, and outputs, if it ran, agree."""
        wrong = any(one.severity == "wrong" for one in self.problems)
        differs = self.reference is not None and self.reference.passed is False
        return self.built and self.verified is True and not wrong and not differs

    @property
    def said(self) -> str:
        """What happened, in a few words."""
        if not self.built:
            return f"refused: {self.error}" if self.error else "refused"
        if not self.proven and self.verified is not None:
            return next((one.message for one in self.problems), "its outputs differ")
        packed = f"{self.weights_bytes or 0:,} bytes for {self.constant_bytes:,} of constants"
        words = ["packed and computed as planned" if self.verified else f"built, {packed}"]
        if any(one.severity == "slow" for one in self.problems):
            words.append("unpacked at each call")
        ran = self.reference is not None and self.reference.ran
        words.append("outputs agree" if ran else "not run")
        if self.latency is not None:
            words.append(f"{self.latency.p50_ms:.3f} ms")
        return ", ".join(words)


class ProbeResults(Section):
    """What ``device.form_probe`` wrote, every value checked."""

    format: Literal[1] = RESULTS_FORMAT  # type: ignore[assignment]
    made_by: Line = ""
    probe_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    target: PlainName
    dialect: Line
    builder: _Builder
    device: _Device
    forms: dict[PlainName, ProbedForm] = Field(max_length=100)
    finished: bool

    @property
    def where(self) -> str:
        """The device and its TensorRT in words."""
        named = self.device.board or self.device.gpu or self.device.machine or "a device"
        release = f" ({self.device.release})" if self.device.release else ""
        return f"{named}{release}, {self.builder.name} {self.builder.version}"


def read_probe_results(path: Path) -> ProbeResults:
    """Read a device's results. Raises UsageError for a file that holds none, or was altered."""
    try:
        return ProbeResults.model_validate(read_sealed(path))
    except InputError as error:
        raise UsageError(error.message, HINT) from error
    except ValidationError as error:
        raise UsageError(
            f"{path} does not hold a probe's results: {first_error(error)}.", HINT
        ) from error


def take_probe(path: Path, out: Path | None = None) -> tuple[Path, ProbeResults]:
    """Write the target that the results at ``path`` prove, as a YAML; return where, and the results.

    ``out``: default ``TARGET-proven.yaml`` in the current folder. Raises UsageError for results of a
    target that is none, or was for another TensorRT.
    """
    results = read_probe_results(path)
    if results.target not in known_targets():
        raise UsageError(
            f"{path} is of the target '{results.target}', which mpq-deploy does not have.",
            "Probe for a shipped target, and edit the resulting YAML by hand.",
        )
    target = load_target(results.target)
    if results.dialect != target.dialect or not target.build_target.takes_version(
        results.builder.version
    ):
        versions = " or ".join(f"{version.rstrip('.')}.x" for version in target.versions)
        raise UsageError(
            f"{path} was made with {results.builder.name} {results.builder.version}; {target.name} is for "
            f"{versions or 'any version'} (dialect {target.dialect}).",
            "Probe again with the builder of the target, or for the target of that builder.",
        )
    out = out or Path(f"{target.name}-proven.yaml")
    text = yaml.safe_dump(_fields(target, results), sort_keys=False, width=100, allow_unicode=True)
    write_text(out, f"# What {results.where} has shown, by a probe of mpq-deploy.\n{text}")
    load_target(out)
    return out, results


def _fields(target: Target, results: ProbeResults) -> dict[str, Any]:
    """Return the YAML's fields: what the target has, and what is proven beyond."""
    proven = [one for one in PROBED if one.name in results.forms and results.forms[one.name].proven]
    schemes = {op: list(target.schemes[op]) for op in target.schemes}
    branches = {op: list(target.branches.get(op, ())) for op in target.schemes}
    for one in proven:
        scheme = SCHEMES[one.scheme]
        # A convolution as a product takes what a MatMul takes.
        for op in () if one.windowed or one.shifted else one.ops:
            kind = scheme.branch.kind
            wanted, into = (kind, branches) if scheme.branch else (scheme.family, schemes)
            if wanted not in into[op]:
                into[op].append(wanted)
    return {
        "extends": target.name,
        "name": f"{target.name}-proven",
        "title": f"{target.title}, as probed",
        "schemes": schemes,
        "branches": {op: kinds for op, kinds in branches.items() if kinds},
        "shown": sorted(set(target.shown) | _shown(proven)),
        "proven": [
            {
                "what": _what(name),
                "proof": "built on the device",
                "by": f"{results.where}: {form.said}",
            }
            for name, form in results.forms.items()
        ],
    }


def _shown(proven: list[Probed]) -> set[str]:
    """The forms of the dialect that are proven: for convolutions and for products alike."""
    names = {one.name for one in proven}
    pairs = {
        "int4_conv": {"w4a16-conv"},
        "requantized": {"w4a8-conv", "w4a8-product"},
        "int8_weights_only": {"w8a16-conv", "w8a16-product"},
    }
    return {form for form, needed in pairs.items() if needed <= names}


def _what(name: str) -> str:
    known = {one.name: one for one in PROBED}
    if name not in known:
        return name
    ops = "Gemm and MatMul" if known[name].ops == PRODUCTS else "Conv"
    return f"{known[name].what} ({known[name].scheme}, {ops})"
