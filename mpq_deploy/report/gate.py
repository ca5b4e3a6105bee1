"""Limits that a run must meet to be released: size, quality, latency, distance to a baseline.

In: a report (``report.read``), limits, a baseline's report. Out: a ``GateResult``, as text,
Markdown, JSON and JUnit XML. A figure that was not measured fails its limit. The point estimate
decides; a limit inside the 95 % interval is pointed out.
"""

from __future__ import annotations

import math
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mpq_deploy.errors import UsageError
from mpq_deploy.report import words
from mpq_deploy.report.compare import figure_difference, model_obstacle, obstacles
from mpq_deploy.report.data import FrechetInfo, Interval, ScoreInfo
from mpq_deploy.report.markdown import plain, table
from mpq_deploy.report.read import ReadReport, slowest
from mpq_deploy.system.quantities import Budget, Latency

Status = Literal["passed", "failed", "not measured"]
SUITE = "mpq-deploy gate"
EVALUATE = "Measure it with 'mpq-deploy evaluate RUN', then 'mpq-deploy report RUN'."
# XML 1.0, section 2.2: what a document may hold.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Limits:
    """The limits; None: not asked for.

    PSNR in dB; NMSE of the output; ``max_frechet_increase`` over the float model's own distance or
    the baseline's; ``max_psnr_drop`` in dB below the baseline; ``max_lpips`` to the float model's
    images; ``max_clip_drop`` below the float model's CLIP score.
    """

    max_size: Budget | None = None
    min_psnr: float | None = None
    min_ssim: float | None = None
    max_nmse: float | None = None
    max_frechet_increase: float | None = None
    max_latency: Latency | None = None
    max_psnr_drop: float | None = None
    max_lpips: float | None = None
    max_clip_drop: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(
                    f"--{field.name.replace('_', '-')} is {value}.", "Give a finite number."
                )
        for name in ("max_nmse", "min_ssim", "max_lpips"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(
                    f"--{name.replace('_', '-')} is {value:g}.", "It cannot be negative."
                )
        if self.min_ssim is not None and self.min_ssim > 1:
            raise UsageError(
                f"--min-ssim is {self.min_ssim:g}.", "SSIM is at most 1, of equal images."
            )


@dataclass(frozen=True)
class Outcome:
    """One limit: the figure as measured (None where there is none), and a remark on it."""

    name: str
    limit: str
    measured: str
    status: Status
    value: float | None = None
    bound: float | None = None
    interval: tuple[float, float] | None = None
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the limit is met; a figure that was not measured does not meet it."""
        return self.status == "passed"


@dataclass(frozen=True)
class GateResult:
    """Every limit's outcome, in the order of the options."""

    run: str
    model: str
    target: str
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()
    baseline: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every limit is met."""
        return all(outcome.passed for outcome in self.outcomes)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "passed": self.passed}


def check_gate(
    report: ReadReport,
    limits: Limits,
    baseline: ReadReport | None = None,
    allow_estimate: bool = False,
) -> GateResult:
    """Check ``report`` against ``limits``; ``allow_estimate`` accepts an estimated latency.

    Raises UsageError without any limit, for a limit without its baseline, a baseline without a
    limit that uses it, and a baseline of another model.
    """
    _check(report, limits, baseline)
    checks: dict[str, Callable[[Any], Outcome]] = {
        "max_size": lambda limit: _size(report, limit),
        "min_psnr": lambda limit: _psnr(report, limit),
        "min_ssim": lambda limit: _ssim(report, limit),
        "max_nmse": lambda limit: _nmse(report, limit),
        "max_frechet_increase": lambda limit: _frechet(report, limit, baseline),
        "max_latency": lambda limit: _latency(report, limit.milliseconds, allow_estimate),
        "max_psnr_drop": lambda limit: _psnr_drop(report, limit, baseline),
        "max_lpips": lambda limit: _lpips(report, limit),
        "max_clip_drop": lambda limit: _clip_drop(report, limit),
    }
    given = {name: getattr(limits, name) for name in checks}
    outcomes = tuple(check(given[n]) for n, check in checks.items() if given[n] is not None)
    notes = []
    if report.simulated:
        notes.append("The plan is simulated: its bytes are nominal, and no engine can hold it.")
    if report.model.synthetic:
        notes.append(report.model.synthetic)
    label = None if baseline is None else baseline.label
    return GateResult(
        report.label, report.model.name, report.target.name, outcomes, tuple(notes), label
    )


def _check(report: ReadReport, limits: Limits, baseline: ReadReport | None) -> None:
    if all(getattr(limits, field.name) is None for field in fields(limits)):
        raise UsageError(
            "No limit was given to check the run against.",
            "Give at least one, such as --max-size 0.36.",
        )
    if limits.max_psnr_drop is not None and baseline is None:
        raise UsageError(
            "--max-psnr-drop needs a baseline.", "Give one with --baseline report.json."
        )
    if baseline is None:
        return
    if limits.max_psnr_drop is None and limits.max_frechet_increase is None:
        raise UsageError(
            "--baseline is given, but no limit uses it.",
            "Add --max-psnr-drop or --max-frechet-increase.",
        )
    other = model_obstacle(baseline, report)
    if other:
        raise UsageError(
            f"The baseline {baseline.label} is that of another model. {other}",
            "Give one of the same model.",
        )


def _size(report: ReadReport, limit: Budget) -> Outcome:
    weights = report.model.weights
    if weights is None:
        weights = sum(layer.weights for layer in report.layers)
    allowed = limit.bytes(report.fp16_size_bytes, weights)
    measured = f"{report.size_ratio:.4f} of FP16, {report.size_bytes:,} bytes"
    status = _status(report.size_bytes <= allowed)
    return Outcome(
        "size", f"at most {limit} ({allowed:,} bytes)", measured, status, report.size_bytes, allowed
    )


def _missing(
    name: str, required: str, bound: float, why: str, shown: str = words.NOT_MEASURED
) -> Outcome:
    """Return the outcome of a limit whose figure is missing: it is not met."""
    return Outcome(name, required, shown, "not measured", None, bound, detail=why)


def _status(passed: bool) -> Status:
    return "passed" if passed else "failed"


def _psnr(report: ReadReport, limit: float) -> Outcome:
    required = f"at least {limit:g} dB"
    if report.identical and report.psnr_db is None:
        return Outcome(
            "PSNR", required, "identical images", "passed", None, limit, detail="An infinite PSNR."
        )
    return _at_least("PSNR", report.psnr_db, report.psnr_db_interval, limit, report)


def _ssim(report: ReadReport, limit: float) -> Outcome:
    return _at_least("SSIM", report.ssim, report.ssim_interval, limit, report)


def _at_least(
    name: str, value: float | None, ends: Interval | None, limit: float, report: ReadReport
) -> Outcome:
    """Check a mean over images against its lower limit."""
    unit, places = (" dB", 2) if name == "PSNR" else ("", 4)
    required, interval = f"at least {limit:g}{unit}", _ends(ends)
    if value is None:
        return _missing(name, required, limit, EVALUATE)
    text = _about(limit, interval, unit, _images(report))
    shown = f"{_shown(value, limit, places)}{unit}"
    return Outcome(name, required, shown, _status(value >= limit), value, limit, interval, text)


def _nmse(report: ReadReport, limit: float) -> Outcome:
    name, required, value = "output error (NMSE)", f"at most {limit:g}", report.measured_nmse
    if value is None:
        return _missing(name, required, limit, EVALUATE)
    interval = _ends(report.nmse_interval)
    text = _about(limit, interval, "", _images(report))
    shown, status = f"{value:.2e}", _status(value <= limit)
    return Outcome(name, required, shown, status, value, limit, interval, text)


def _frechet(report: ReadReport, limit: float, baseline: ReadReport | None) -> Outcome:
    name, required = "Frechet increase", f"at most {limit:g}"
    if not report.frechet:
        text = "The report holds no Frechet distance of this plan. Measure it with 'mpq-deploy metrics RUN'."
        return _missing(name, required, limit, text)
    floors = [(one, _frechet_floor(one, baseline)) for one in report.frechet]
    increases = [(one.distance - floor, one) for one, floor in floors if floor is not None]
    if len(increases) < len(floors):
        text = (
            "The baseline has no distance of the same network, kind, number of images, sampler and seed; "
            "measure one there too."
        )
        return _missing(name, required, limit, text, "not comparable")
    worst, of = max(increases, key=lambda pair: pair[0])
    floor = of.distance - worst
    interval = _increase_interval(of, floor, baseline is not None)
    over = "the baseline's" if baseline is not None else "the float model's own"
    text = f"{of.described}; over {over} {floor:.3g}."
    text = f"{text} {_about(limit, interval, '', f'{of.samples:,} images', '--images')}"
    return Outcome(
        name, required, f"{worst:+.3g}", _status(worst <= limit), worst, limit, interval, text
    )


def _frechet_floor(one: FrechetInfo, baseline: ReadReport | None) -> float | None:
    """Return the float model's own distance, or the baseline's of the same kind."""
    if baseline is None:
        return one.floor
    return next((other.distance for other in baseline.frechet if other.kind == one.kind), None)


def _increase_interval(
    one: FrechetInfo, floor: float, against_baseline: bool
) -> tuple[float, float] | None:
    """The increase's paired interval; over a baseline only the distance's own is known."""
    if one.increase_interval is not None and not against_baseline:
        return _ends(one.increase_interval)
    return None if one.interval is None else (one.interval.low - floor, one.interval.high - floor)


def _latency(report: ReadReport, limit: float, allow_estimate: bool) -> Outcome:
    required, latency = f"at most {limit:g} ms", slowest(report)
    if latency is None:
        return _no_latency(report, limit, required, allow_estimate)
    text = f"{_capital(latency.source)}; the gate itself measures nothing."
    if latency.target != report.target.name:
        text += f" That is the target {latency.target}; the report's is {report.target.name}."
    shown = f"{words.digits(latency.milliseconds)} ms"
    if latency.problem:
        text += f" It does not count: {latency.problem}."
        return Outcome(
            "latency", required, shown, "failed", latency.milliseconds, limit, detail=text
        )
    status = _status(latency.milliseconds <= limit)
    return Outcome("latency", required, shown, status, latency.milliseconds, limit, detail=text)


def _no_latency(report: ReadReport, limit: float, required: str, allow_estimate: bool) -> Outcome:
    """Fail for lack of a measurement, unless there is an estimate and it is accepted."""
    expected = report.expected_latency
    if expected is not None and allow_estimate:
        status = _status(expected.ours_ms <= limit)
        shown = f"{words.digits(expected.ours_ms)} ms, estimated"
        return Outcome(
            "latency", required, shown, status, expected.ours_ms, limit, detail=f"{expected.words}."
        )
    parts = [
        "No engine latency was measured. Run 'mpq-deploy package RUN', install the package on the device, and "
        "add its results with 'mpq-deploy report RUN --device results.json'."
    ]
    if expected is not None:
        parts.append(
            f"There is only an estimate, which --allow-estimate would accept: {expected.words}."
        )
    if report.cpu_latency is not None:
        cpu = report.cpu_latency
        parts.append(
            f"The report's {cpu.ours_ms:g} ms are not a latency of the engine ({cpu.source})."
        )
    return _missing("latency", required, limit, " ".join(parts))


def _psnr_drop(report: ReadReport, limit: float, baseline: ReadReport | None) -> Outcome:
    """Compare the PSNR with the baseline's, image by image where both reports keep them."""
    assert baseline is not None  # checked by _check
    name, required = "PSNR against the baseline", f"at most {limit:g} dB lower"
    different = obstacles(baseline, report)
    if different:
        text = (
            f"{' '.join(different)} Evaluate both with the same evaluate.* entries of the recipe."
        )
        return _missing(name, required, limit, text, "not comparable")
    if report.identical:
        return Outcome(
            name, required, "identical images", "passed", None, limit, detail="An infinite PSNR."
        )
    if baseline.identical:
        text = "The baseline's images are identical to the float model's; these are not."
        return Outcome(
            name,
            required,
            f"{words.decibels(report.psnr_db)} after infinity",
            "failed",
            None,
            limit,
            detail=text,
        )
    difference = figure_difference(baseline, report, "psnr_db")
    if difference is None:
        missing = report if report.psnr_db is None else baseline
        text = f"{missing.label}: {EVALUATE}"
        return _missing(name, required, limit, text)
    interval = difference.interval
    if interval is None:
        text = "Not paired by image: at least one report lacks the PSNR of each image, so there is no interval."
    else:
        text = _about(-limit, interval, " dB", f"{_images(report)}, paired")
        if difference.within_noise:
            text = f"No difference is shown: 0 lies inside the interval. {text}"
    shown = f"{_shown(difference.value, -limit, 2, '+')} dB"
    return Outcome(
        name,
        required,
        shown,
        _status(-difference.value <= limit),
        difference.value,
        -limit,
        interval,
        text,
    )


def _lpips(report: ReadReport, limit: float) -> Outcome:
    required, measured = f"at most {limit:g}", _scores(report, "lpips")
    if not measured:
        text = "The report holds no LPIPS of this plan. Measure it with 'mpq-deploy metrics RUN --lpips'."
        return _missing("LPIPS", required, limit, text)
    worst = max(measured, key=lambda one: one.value)
    interval = _ends(worst.interval)
    text = f"{worst.title}. {_about(limit, interval, '', words.count(worst.samples, 'image'), '--images')}"
    status = _status(worst.value <= limit)
    return Outcome(
        "LPIPS", required, _shown(worst.value, limit, 4), status, worst.value, limit, interval, text
    )


def _clip_drop(report: ReadReport, limit: float) -> Outcome:
    """Compare the CLIP score with the float model's own, from the same noise and prompts."""
    name, required, measured = (
        "CLIP score",
        f"at most {limit:g} below the float model's",
        _scores(report, "clip-score"),
    )
    if not measured:
        text = "The report holds no CLIP score of this plan. Measure it with 'mpq-deploy metrics RUN --clip-score'."
        return _missing(name, required, limit, text)
    worst = min(measured, key=lambda one: one.value - one.floor)
    change, interval = worst.value - worst.floor, _ends(worst.increase_interval)
    text = f"{worst.title}: {worst.value:.4g}, the float model's {worst.floor:.4g}."
    text = f"{text} {_about(-limit, interval, '', f'{worst.samples:,} images, paired', '--images')}"
    status = _status(-change <= limit)
    return Outcome(
        name, required, _shown(change, -limit, 3, "+"), status, change, -limit, interval, text
    )


def _scores(report: ReadReport, kind: str) -> list[ScoreInfo]:
    """Return this plan's scores of a kind: one for each number of images, seed and weights."""
    return [one for one in report.scores if one.variant == "ours" and one.score == kind]


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def _about(
    limit: float,
    interval: tuple[float, float] | None,
    unit: str,
    over: str,
    more: str = "evaluate.samples",
) -> str:
    """State the interval; point out a limit inside it, which other images might cross."""
    if interval is None:
        return "No interval: the report has figures of fewer than two images."
    text = f"95 % interval {interval[0]:.4g} to {interval[1]:.4g}{unit} over {over}."
    if interval[0] <= limit <= interval[1]:
        text += f" The limit lies inside it: other noise might decide otherwise. Raise {more} to narrow it."
    return text


def _shown(value: float, limit: float, places: int, sign: str = "") -> str:
    """Return ``value`` with ``places`` decimals, or as many more as tell it from the limit."""
    while places < 12 and value != limit and round(value, places) == round(limit, places):
        places += 1
    return f"{value:{sign}.{places}f}"


def _images(report: ReadReport) -> str:
    return (
        "the images"
        if report.evaluation is None
        else words.count(report.evaluation.samples, "image")
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def gate_text(result: GateResult) -> str:
    """Return the outcome for a terminal, at most 80 columns wide."""
    lines = []
    for outcome in result.outcomes:
        lines.append(f"{_MARKS[outcome.status]:<12} {outcome.name}: {outcome.measured}")
        for part in (f"limit: {outcome.limit}", outcome.detail):
            lines += textwrap.wrap(part, 80, initial_indent=" " * 13, subsequent_indent=" " * 13)
    for note in result.notes:
        lines += textwrap.wrap(f"note: {note}", 80)
    return "\n".join([*lines, "", headline(result)])


_MARKS: dict[Status, str] = {"passed": "passed", "failed": "FAILED", "not measured": "NOT MEASURED"}


def gate_line(target: str, result: GateResult) -> str:
    """Return the outcome in one line, with the limits that are not met."""
    wrong = ", ".join(outcome.name for outcome in result.outcomes if not outcome.passed)
    return f"{target}: {headline(result).removesuffix('.')}{f' (not {wrong})' if wrong else ''}"


def headline(result: GateResult) -> str:
    """Return one sentence: whether the gate is passed, and by how many limits."""
    kept = sum(outcome.passed for outcome in result.outcomes)
    return f"{'Passed' if result.passed else 'FAILED'}: {kept} of {words.count(len(result.outcomes), 'limit')} met."


def gate_markdown(*results: GateResult) -> str:
    """Return a summary for a pull request or a job's page."""
    return "\n".join(map(_markdown, results))


def _markdown(result: GateResult) -> str:
    rows = [[o.name, o.limit, o.measured, _MARKS[o.status]] for o in result.outcomes]
    details = [f"- {plain(o.name)}: {plain(o.detail)}" for o in result.outcomes if o.detail]
    baseline = f", against the baseline {plain(result.baseline)}" if result.baseline else ""
    parts = [
        f"## Gate: {plain(result.model)} for {plain(result.target)}",
        f"**{headline(result)}** {plain(result.run)}{baseline}.",
        table(("limit", "asked", "measured", ""), rows),
        "\n".join([*details, *(f"- {plain(note)}" for note in result.notes)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def gate_junit(*results: GateResult) -> str:
    """Return JUnit XML: a test case per limit, as Jenkins, GitLab and GitHub Actions read it.

    A suite for each result. A limit without a measurement is a failure of type ``not-measured``,
    never skipped.
    """
    root = ET.Element("testsuites", _counts(*results))
    for result in results:
        _add_suite(root, result)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counts(*results: GateResult) -> dict[str, str]:
    outcomes = [outcome for result in results for outcome in result.outcomes]
    return {
        "name": SUITE,
        "tests": str(len(outcomes)),
        "failures": str(sum(not outcome.passed for outcome in outcomes)),
        "errors": "0",
        "time": "0",
    }


def _add_suite(root: ET.Element, result: GateResult) -> None:
    suite = ET.SubElement(root, "testsuite", {**_counts(result), "skipped": "0"})
    properties = ET.SubElement(suite, "properties")
    stated = {
        "run": result.run,
        "model": result.model,
        "target": result.target,
        "baseline": result.baseline or "",
    }
    for name, value in stated.items():
        ET.SubElement(properties, "property", {"name": name, "value": _xml(value)})
    for outcome in result.outcomes:
        named = {
            "classname": _xml(f"mpq-deploy.gate.{result.model}"),
            "name": _xml(f"{outcome.name} {outcome.limit}"),
        }
        case = ET.SubElement(suite, "testcase", {**named, "time": "0"})
        text = f"{outcome.name}: {outcome.measured}, limit: {outcome.limit}"
        if not outcome.passed:
            kind = outcome.status.replace(" ", "-")
            failure = ET.SubElement(case, "failure", {"message": _xml(text), "type": kind})
            failure.text = _xml(outcome.detail or text)
        ET.SubElement(case, "system-out").text = _xml(f"{text}. {outcome.detail}".strip())


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
