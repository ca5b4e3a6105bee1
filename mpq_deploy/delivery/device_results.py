"""results.json of a device or of 'mpq-deploy bench': checked, kept, and read for the report.

It must be of the run's present plan. Kept in ``RUN/devices/<target>.json``, outside the stages,
since timings do not repeat.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.bench.timed_subject import ORT
from mpq_deploy.device.installer import read_results
from mpq_deploy.errors import UsageError
from mpq_deploy.report.data import DeviceInfo, Ratio
from mpq_deploy.system.files import write_text

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

FOLDER = "devices"
STAGES = ("allocate", "quantize")


def take_in(run: Run, path: Path) -> Path:
    """Keep the results at ``path`` in the run folder; return where.

    Raises UsageError when it is no results.json, or one of another plan.
    """
    results = read_results(path)
    stale = _stale(run, results)
    if stale:
        raise UsageError(
            f"{path} was measured with another {stale} than that of {run.path}.",
            "Give the run that was packaged, or package this one and install it again.",
        )
    kind = ".bench" if "bench" in results else ""
    kept = run.path / FOLDER / f"{results['target']}{kind}.json"
    kept.parent.mkdir(exist_ok=True)
    write_text(kept, json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return kept


def device_infos(run: Run) -> tuple[DeviceInfo, ...]:
    """Return the devices' results of this plan, by target; warn about those of an earlier plan."""
    infos = []
    for path in sorted((run.path / FOLDER).glob("*.json")):
        results = read_results(path)
        if _stale(run, results):
            run.talk.warn(f"{path} belongs to a former plan and is left out of the report")
        else:
            infos.append(device_info(results))
    return tuple(infos)


def device_info(results: dict[str, Any]) -> DeviceInfo:
    """Read one results.json for the report."""
    engine, reference, times = results["engine"], results["reference"], results["latency"] or {}
    errors = list(reference["cases"].values())
    device = results["device"]
    wrong = [one for one in engine["problems"] if one["severity"] == "wrong"]
    return DeviceInfo(
        target=results["target"],
        device=device["board"] or device["gpu"] or device["machine"],
        builder=f"{engine['backend']} {engine['version']}",
        engine_bytes=engine["bytes"],
        weights_bytes=engine["weights_bytes"],
        activation_bytes=engine["activation_bytes"],
        layers_verified=engine["verified"],
        problems=tuple(f"{one['layer']}: {one['message']}" for one in wrong),
        outputs_agree=reference["passed"],
        output_nmse=max(errors) if errors and None not in errors else None,
        not_run=reference["why"],
        median_ms=times.get("p50_ms"),
        p99_ms=times.get("p99_ms"),
        calls=times.get("calls"),
        graph=engine["backend"] == ORT,
        ratio=_ratio(results.get("bench")),
    )


def _ratio(bench: dict[str, Any] | None) -> Ratio | None:
    if bench is None or bench["ratio"] is None:
        return None
    figures = {key: bench["ratio"][key] for key in ("value", "low", "high")}
    return Ratio(against=bench["subjects"][1]["name"], **figures)


def _stale(run: Run, results: dict[str, Any]) -> str:
    """The first stage whose outputs are not those that were packaged; empty when all are."""
    digests = results["package"].get("digests", {})
    made_by = {name: run.deployed_stage if name == "quantize" else name for name in STAGES}
    return next((name for name in STAGES if digests.get(name) != run.digest(made_by[name])), "")
