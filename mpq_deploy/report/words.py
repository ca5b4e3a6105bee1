"""Numbers and sentences for people, the same in Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mpq_deploy.allocate.predicted_images import psnr_text
from mpq_deploy.evaluate.interval import MARGIN_DB
from mpq_deploy.report.data import (
    Control,
    DeviceInfo,
    ExpectedLatency,
    FrechetInfo,
    ImportanceInfo,
    Interval,
    Quality,
    Ratio,
    ReportData,
    ScoreInfo,
)
from mpq_deploy.rounding.control_schemes import CONTROLS, SIMULATED_TWIN

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SIZE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
NOT_MEASURED = "not measured"
NOT_PREDICTED = "not predicted"


def size(count: int | None) -> str:
    """Return bytes with a decimal unit and three digits: ``1.41 MB``."""
    if count is None:
        return "unknown"
    for unit, name in _SIZE_UNITS:
        if count >= 0.9995 * unit:
            return f"{digits(count / unit)} {name}"
    return f"{count} B"


def digits(value: float, significant: int = 3) -> str:
    """Return ``value`` with ``significant`` digits and no exponent: 1.41, 14.1, 141."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{significant - 1}e}")
    places = significant - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(places, 0)}f}"


def percent(ratio: float) -> str:
    """Return a ratio in percent with one decimal: ``35.0 %``."""
    return f"{100 * ratio:.1f} %"


def error(value: float | None) -> str:
    """Return an NMSE with two digits: ``1.7 × 10⁻⁶``."""
    if value is None:
        return NOT_MEASURED
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def decibels(value: float | None, identical: bool = False) -> str:
    """Return a PSNR: ``56.6 dB``, or that the images are identical."""
    if value is None:
        return "identical images" if identical else NOT_MEASURED
    return f"{value:.1f} dB"


def psnr(row: Quality) -> str:
    """Return a PSNR with its interval where it has one: ``51.4 dB (49.8 to 53.1)``."""
    return decibels(row.psnr_db, row.identical) + _between(row.psnr_db_interval, 1)


def similarity(row: Quality) -> str:
    """Return an SSIM with its interval where it has one: ``0.9991 (0.9988 to 0.9993)``."""
    return NOT_MEASURED if row.ssim is None else f"{row.ssim:.4f}" + _between(row.ssim_interval, 4)


def ranged_error(value: float | None, interval: Interval | None) -> str:
    """Return an NMSE with its interval where it has one: ``1.7 (1.5 to 2.0) × 10⁻⁶``."""
    if not value or interval is None:
        return error(value)
    mantissa, power = error(value).split(" ", 1)
    exponent = int(f"{value:.1e}".split("e")[1])
    low, high = (end / 10.0**exponent for end in (interval.low, interval.high))
    return f"{mantissa} ({low:.1f} to {high:.1f}) {power}"


def error_ends(data: ReportData) -> str:
    """Return the ends of the measured error's interval, behind a comma; empty without one."""
    if not data.measured_nmse or data.nmse_interval is None:
        return ""
    between = ranged_error(data.measured_nmse, data.nmse_interval).split("(")[1].replace(")", "")
    return f", 95 % interval {between}"


def _between(interval: Interval | None, places: int) -> str:
    return "" if interval is None else f" ({interval.low:.{places}f} to {interval.high:.{places}f})"


def intervals_note(data: ReportData) -> str:
    """Say what stands in brackets behind a quality figure, and why nothing does behind an error."""
    none = ""
    if data.measured_nmse and data.nmse_interval is None and data.evaluation is not None:
        none = "The error of the output has no interval: it takes two images at each timestep."
    if data.psnr_db_interval is None and data.ssim_interval is None:
        return none
    number = (
        f" over {count(data.evaluation.samples, 'image')}"
        if data.evaluation is not None
        else " over the images"
    )
    errors = "" if none else "; that of the error by a t interval of its logarithm"
    return f"In parentheses: the 95 % interval of the mean, by a bootstrap{number}{errors}. {none}".strip()


FRECHET_COLUMNS = (
    "variant",
    "distance",
    "95 % interval",
    "over the float model's",
    "95 % interval",
    "verdict",
)


def frechet_about(row: FrechetInfo) -> str:
    """Say what a Frechet distance depends on, and which distances to compare it with."""
    named = f"{row.against_samples:,}" in row.against_source
    known = f" ({count(row.against_samples, 'image')})" if row.against_samples and not named else ""
    parts = [
        f"{row.title}, {count(row.samples, 'image')}, {_sampler(row)}, seed {row.seed}, to "
        f"{row.against_source}{known if row.against == 'real' else ''}."
    ]
    if row.against == "float":
        parts.append(
            f"Two sets of the float model's images from different noise are {digits(row.other_noise)} apart."
        )
    else:
        parts.append(
            f"The float model's own: {digits(row.floor)}, from other noise {digits(row.other_noise)}."
        )
    if row.real_floor is not None and row.real_floor_samples is not None:
        parts.append(
            f"Real against real: {digits(row.real_floor)} (halves of {row.real_floor_samples:,})."
        )
    if row.extrapolated is not None and row.extrapolated_floor is not None:
        parts.append(
            f"Extrapolated to infinitely many images: {row.extrapolated:.3g}, the float model "
            f"{row.extrapolated_floor:.3g}."
        )
    return " ".join(parts)


def _sampler(row: FrechetInfo | ScoreInfo) -> str:
    """Name the sampler with its steps, which most names hold already."""
    return (
        row.sampler if f"{row.steps} steps" in row.sampler else f"{row.sampler}, {row.steps} steps"
    )


def frechet_verdict(row: FrechetInfo) -> str:
    """Say in a few words whether a distance shows a difference from the float model."""
    if row.against == "float":
        return "below other noise's" if row.within_noise else "not below other noise's"
    if row.within_noise:
        return "no difference shown"
    return "further away" if row.increase > 0 else "nearer"


def frechet_row(title: str, row: FrechetInfo) -> list[str]:
    """Return the cells of ``FRECHET_COLUMNS``."""
    ends = [f"{one.low:.3g} to {one.high:.3g}" for one in (row.interval, row.increase_interval)]
    return [
        title,
        f"{row.distance:.4g}",
        ends[0],
        f"{row.increase:+.3g}",
        ends[1],
        frechet_verdict(row),
    ]


def frechet_other(row: FrechetInfo) -> str:
    """Return KID, precision and recall, each with the float model's own; empty if not measured."""
    figures = (
        ("KID", row.kid, row.kid_floor),
        ("precision", row.precision, row.precision_floor),
        ("recall", row.recall, row.recall_floor),
    )
    parts = [
        f"{name} {ours:.3g} (float {own:.3g})"
        for name, ours, own in figures
        if ours is not None and own is not None
    ]
    against = (
        "the float model's images from other noise" if row.against == "float" else "the real images"
    )
    return f"Against {against}: {', '.join(parts)}." if parts else ""


def frechet_groups(data: ReportData) -> list[tuple[str, list[list[str]], str]]:
    """Return each distance of this plan: its description, its row with the controls', KID etc."""
    groups = []
    for own in data.frechet:
        same = [
            (title_of(name, data), row)
            for name, rows in (("ours", (own,)), *data.frechet_controls.items())
            for row in rows
            if row.kind == own.kind
        ]
        groups.append(
            (
                frechet_about(own),
                [frechet_row(title, row) for title, row in same],
                frechet_other(own),
            )
        )
    return groups


# The float model's own LPIPS is 0: nothing to be over.
SCORE_COLUMNS: dict[str, tuple[str, ...]] = {
    "lpips": ("variant", "mean", "95 % interval", "verdict"),
    "clip-score": (
        "variant",
        "mean",
        "95 % interval",
        "over the float model's",
        "95 % interval",
        "verdict",
    ),
}


def score_about(row: ScoreInfo) -> str:
    """Say what a score depends on, and what to compare it with."""
    text = f"{row.title}, {count(row.samples, 'image')}, {_sampler(row)}, seed {row.seed}"
    if row.score == "lpips":
        return (
            f"{text}, each to the float model's image from the same noise; lower is better. The float model's images "
            f"from other noise have {row.other_noise:.3g}."
        )
    return (
        f"{text}, each image with its prompt; higher is better. The float model's own: {row.floor:.4g}, from "
        "other noise "
        f"{row.other_noise:.4g}."
    )


def score_verdict(row: ScoreInfo) -> str:
    """Say in a few words what a score shows."""
    if row.score == "lpips":
        return "below other noise's" if row.value < row.other_noise else "not below other noise's"
    if (
        row.increase_interval is None
        or row.increase_interval.low <= 0 <= row.increase_interval.high
    ):
        return "no difference shown"
    return "fits better" if row.increase > 0 else "fits worse"


def score_row(title: str, row: ScoreInfo) -> list[str]:
    """Return the cells of ``SCORE_COLUMNS``."""
    ends = [
        "" if one is None else f"{one.low:.3g} to {one.high:.3g}"
        for one in (row.interval, row.increase_interval)
    ]
    over = [] if row.score == "lpips" else [f"{row.increase:+.3g}", ends[1]]
    return [title, f"{row.value:.4g}", ends[0], *over, score_verdict(row)]


SIZE_COLUMNS = ("size", "variant", "PSNR", "SSIM", "output error (NMSE)", "images")


def size_rows(data: ReportData) -> list[list[str]]:
    """Return the figures at each of several sizes."""
    return [
        [
            row.size,
            row.title,
            decibels(row.psnr_db, row.psnr_db is None),
            NOT_MEASURED if row.ssim is None else f"{row.ssim:.4f}",
            error(row.measured_nmse),
            str(row.samples),
        ]
        for row in data.by_size
    ]


def score_groups(data: ReportData) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Return each score of this plan: its description, columns, its row with the controls'."""
    return [
        (
            score_about(own),
            SCORE_COLUMNS[own.score],
            [
                score_row(title_of(row.variant, data), row)
                for row in data.scores
                if row.kind == own.kind
            ],
        )
        for own in data.scores
        if own.variant == "ours"
    ]


def duration(seconds: float | None) -> str:
    """Return a time: ``0.42 s``, ``12.3 s``, ``2 min 5 s``."""
    if seconds is None:
        return NOT_MEASURED
    if seconds >= 100:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def count(number: int, noun: str) -> str:
    """Return ``1 layer`` or ``12 layers``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def title_of(name: str, data: ReportData) -> str:
    """Return a variant's title: as its control or its pictures say, else our own words."""
    if name in data.compared:
        return data.compared[name].title
    given = data.images.titles if data.images is not None else {}
    plan = "This plan (simulated)" if data.simulated else "This plan"
    return given.get(name) or {"float": "Original (float)", "ours": plan}.get(name, name)


def counted(layers: Mapping[str, int]) -> str:
    """Return layers by family, most first: ``47 f8a8, 44 nvfp4``."""
    order = sorted(layers.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {family}" for family, number in order)


def control_layers(data: ReportData) -> str:
    """Say how many layers of each control have which format; empty where that is not known."""
    said = [f"{c.title}: {counted(c.layers)}" for c in data.controls.values() if c.layers]
    return f"Layers: {'; '.join(said)}." if said else ""


def controls_note(data: ReportData) -> str:
    """Say how far each control is behind the plan, and on how many images; empty where that is not known."""
    said, fewer, samples = [], False, data.evaluation.samples if data.evaluation is not None else 0
    for control in data.controls.values():
        if control.behind_db is not None:
            images = len(control.psnr_db_each)
            between = _between(control.behind_db_interval, 1)
            said.append(f"{control.title} {control.behind_db:+.1f} dB{between} on {images}")
            fewer |= images < samples
    if not said:
        return ""
    rest = (
        f" A control gets no more images, and no more calls for its error, once its 95 % interval (over all "
        f"interim looks) is clear of zero by {MARGIN_DB:g} dB."
    )
    return (
        f"The plan's PSNR minus a control's, image by image: {'; '.join(said)} of {samples} images."
        + (rest if fewer else "")
    )


def headline(data: ReportData) -> list[str]:
    """Return the result in at most three sentences that need no knowledge of this project."""
    nominal = " (simulated: nominal bytes, which no engine reaches)" if data.simulated else ""
    parts = [
        f"{percent(data.size_ratio)} of the FP16 size: {size(data.size_bytes)} instead of "
        f"{size(data.fp16_size_bytes)}{nominal}."
    ]
    if data.identical:
        parts.append("The images are identical to the original model's.")
    elif data.psnr_db is not None:
        parts.append(
            f"The images match the original model's to {decibels(data.psnr_db)} PSNR (higher is closer)."
        )
    else:
        parts.append("The images have not been compared with the original model's.")
    reference = _reference_control(data)
    if reference is not None:
        reached = (
            "gives identical images"
            if reference.identical
            else f"reaches {decibels(reference.psnr_db)}"
        )
        if data.evaluation and 0 < len(reference.psnr_db_each) < data.evaluation.samples:
            reached += f" on {len(reference.psnr_db_each)} of them"
        parts.append(f"{reference.title} takes {percent(reference.size_ratio)} and {reached}.")
    return parts


def against_control(data: ReportData) -> str:
    """Compare the images with the first control's, in dB and squared error; empty without both."""
    reference = _reference_control(data)
    if reference is None or reference.psnr_db is None or data.psnr_db is None:
        return ""
    # On the same images, where a control has fewer.
    gain = data.psnr_db - reference.psnr_db if reference.behind_db is None else reference.behind_db
    factor = 10 ** (abs(gain) / 10)
    size_factor = data.size_bytes / reference.size_bytes if reference.size_bytes else 0.0
    less = "less" if gain >= 0 else "more"
    return (
        f"{gain:+.1f} dB against {_within(reference.title)}: {digits(factor, 2)} times {less} squared pixel error, in "
        f"{digits(size_factor, 2)} times its bytes"
    )


def prediction(data: ReportData) -> str:
    """Compare the predicted error with the measured one, or say that none is predicted."""
    if data.predicted_images is not None:
        of = "" if data.psnr_db is None else f"; measured {decibels(data.psnr_db)} (mean)"
        return f"predicted {psnr_text(data.predicted_images)}{of}"
    if data.predicted_nmse is None:
        return f"not predicted by the metric {data.sensitivity}".rstrip()
    ratio = data.prediction_ratio
    predicted = ranged_error(data.predicted_nmse, data.predicted_interval)
    if ratio is None:
        return f"predicted {predicted}"
    return f"predicted {predicted}, that is {ratio:.2f} times the measured error"


def curve_note(data: ReportData) -> str:
    """Say what the predictions of other plans are, and how this run's own plan lies to them."""
    if data.predicted_nmse is None and data.predicted_images is None:
        return f"The metric {data.sensitivity} does not predict errors.".replace("  ", " ")
    objective = data.expected_latency.objective if data.expected_latency else "quality"
    note = ""
    if data.sensitivity in ("probe", "trajectory"):
        note = "Predictions include the cross terms between layers. "
    if objective in PLACES:
        return f"{note}{PLACES[objective]}"
    if data.sensitivity in ("probe", "trajectory"):
        note += "A build also refines its plan with those terms, so this run's own may lie a little below the line."
    return note.strip()


# How a plan lies to the line of the minimum errors, by objective.
PLACES = {
    "balanced": "This run's own plan is the fastest whose error is within the slack of the minimum "
    "(objective balanced), so it may lie above the line.",
    "latency": "This run's own plan is the fastest within its limits (objective latency), "
    "so it may lie above the line.",
}


def importance(info: ImportanceInfo) -> str:
    """Say which importance chose the plan, and how near it is to the linear bound."""
    share = percent(info.weighted_bits / info.linear_bound) if info.linear_bound else "all"
    return (
        f"The plan gives the most bits, weighted by the layers' importance, that its bytes allow: {share} of what the "
        f"linear program over continuous bits reaches, which no plan of whole bits exceeds. {info.settings}."
    )


def engine_state(data: ReportData) -> tuple[str, str]:
    """Return a word and a line about the engine."""
    engine = data.engine
    if engine is None:
        return "not built", data.engine_note or "no engine was requested"
    built = (
        f", built in {duration(engine.build_seconds)}" if engine.build_seconds is not None else ""
    )
    return (
        "verified" if engine.verified else "not verified",
        f"{engine.backend} {engine.version}{built}",
    )


def latency(data: ReportData) -> tuple[str, str]:
    """Return the engine's latency and where it was measured; never an estimate instead."""
    if data.engine is not None and data.engine.latency_ms is not None:
        return f"{digits(data.engine.latency_ms)} ms", data.engine.latency_source
    return "not measured here", "this machine did not run the engine"


def expected_latency(info: ExpectedLatency) -> str:
    """Say what a call is expected to take, and that this is not a measurement of the engine."""
    word = {"estimated": "Estimated", "measured": "Summed from measured layers"}.get(
        info.source, "Summed from measured and estimated layers"
    )
    basis = "; ".join(filter(None, (info.basis, info.fusion)))
    limit = f", at most {digits(info.limit_ms)} ms requested" if info.limit_ms is not None else ""
    return (
        f"{word}, not measured: {digits(info.ours_ms)} ms per call at batch {info.batch}{limit}; everything FP16 "
        f"{digits(info.fp16_ms)} ms, everything INT8 {digits(info.int8_ms)} ms ({basis})"
        + (f". {info.slower.removesuffix('.')}" if info.slower else "")
    )


def glance_rows(data: ReportData) -> list[list[str]]:
    """Return the headline's table: this plan, FP16 and the uniform plans."""
    expected = data.expected_latency
    times = {}
    if expected is not None:
        times = {"fp16": expected.fp16_ms, "ours": expected.ours_ms, "int8": expected.int8_ms}
        times |= {} if expected.int4_ms is None else {"int4": expected.int4_ms}
        times |= expected.controls_ms

    def row(key: str, title: str, bytes_: int, quality: str) -> list[str]:
        time = [f"{digits(times[key])} ms" if key in times else "not estimated"] if times else []
        return [title, size(bytes_), percent(bytes_ / data.fp16_size_bytes), quality, *time]

    rows = [
        row("ours", title_of("ours", data), data.size_bytes, decibels(data.psnr_db, data.identical))
    ]
    rows.append(row("fp16", "Everything FP16", data.fp16_size_bytes, "the reference"))
    rows += [
        row(key, control.title, control.size_bytes, decibels(control.psnr_db, control.identical))
        for key, control in data.controls.items()
    ]
    return rows


def glance_columns(data: ReportData) -> list[str]:
    """Return the header of ``glance_rows``; the column of latencies says how they are known."""
    bytes_ = "Size (nominal)" if data.simulated else "Size"
    expected = data.expected_latency
    source = {"measured": "summed from measured layers", "estimated": "estimated"}
    time = [f"Latency, {source.get(expected.source, 'partly estimated')}"] if expected else []
    return ["", bytes_, "Of FP16", "PSNR", *time]


def latency_rows(data: ReportData) -> list[list[str]]:
    """Return every latency with what it is of and how it is known; measurements first."""
    rows = []
    if data.engine is not None and data.engine.latency_ms is not None:
        rows.append(
            [
                "This engine",
                f"{digits(data.engine.latency_ms)} ms",
                f"measured: {data.engine.latency_source}",
            ]
        )
    for device in data.devices:
        if device.median_ms:
            calls = f", median of {device.calls:,} calls" if device.calls else ""
            rows.append(
                [
                    f"This plan on {device.device}",
                    f"{digits(device.median_ms)} ms",
                    f"measured there{calls}",
                ]
            )
    expected = data.expected_latency
    if expected is not None:
        known = {
            "estimated": "estimated layer by layer, not measured",
            "measured": "summed from measured layers, not measured as a whole",
        }.get(expected.source, "summed from measured and estimated layers, not measured as a whole")
        rows += [[title, f"{digits(ms)} ms", known] for title, ms in _expected_times(expected)]
    if data.cpu_latency is not None:
        cpu = data.cpu_latency
        rows.append(
            ["Float, on the building machine's CPU", f"{digits(cpu.float_ms)} ms", cpu.source]
        )
        rows.append(
            [
                "This plan, on that CPU",
                f"{digits(cpu.ours_ms)} ms",
                "as above; says nothing about the device",
            ]
        )
    return rows


def _expected_times(info: ExpectedLatency) -> list[tuple[str, float]]:
    """Return the expected milliseconds of the plan and of what it is compared with, by title."""
    uniform = {"int8": info.int8_ms, "int4": info.int4_ms, **info.controls_ms}
    # What ONNX Runtime simulates, an engine computes.
    titles = {
        name: control.title.removesuffix(SIMULATED_TWIN) for name, control in CONTROLS.items()
    }
    named = [(titles.get(name, name), ms) for name, ms in uniform.items() if ms is not None]
    return [("This plan", info.ours_ms), ("Everything FP16", info.fp16_ms), *named]


def measured_latency(data: ReportData) -> bool:
    """Tell whether the engine was timed anywhere."""
    here = data.engine is not None and data.engine.latency_ms is not None
    return here or any(device.median_ms for device in data.devices)


def latency_line(data: ReportData) -> str:
    """Return the expected latency in a few words; empty where nothing is known."""
    expected = data.expected_latency
    if expected is None:
        return ""
    how = "estimated" if expected.source == "estimated" else "expected from single layers"
    return f"{how}: {digits(expected.ours_ms)} ms, FP16 {digits(expected.fp16_ms)} ms"


DEVICE_COLUMNS = ("device", "engine", "layers", "outputs", "latency (median, p99)")


def device_row(info: DeviceInfo) -> tuple[str, str, str, str, str]:
    """Return the cells of ``DEVICE_COLUMNS`` for one device."""
    layers = (
        "as planned" if info.layers_verified else f"not as planned: {'; '.join(info.problems[:2])}"
    )
    layers = "the graph itself" if info.graph else layers
    if info.outputs_agree is None:
        outputs = f"not run: {info.not_run}"
    else:
        shown = "not finite" if info.output_nmse is None else f"NMSE {error(info.output_nmse)}"
        outputs = f"{'agree' if info.outputs_agree else 'differ'} ({shown})"
    times = (
        f"{digits(info.median_ms)} ms, {digits(info.p99_ms)} ms"
        if info.median_ms and info.p99_ms
        else NOT_MEASURED
    )
    where = f"{info.device} ({info.target})"
    times += f"; {_ratio(info.ratio)}" if info.ratio else ""
    return where, f"{info.builder}, {size(info.engine_bytes)}", layers, outputs, times


def _ratio(ratio: Ratio) -> str:
    ends = (
        f" ({ratio.low:.2f} to {ratio.high:.2f})"
        if ratio.low is not None and ratio.high is not None
        else ""
    )
    return f"{ratio.value:.2f}{ends} of {ratio.against}'s time"


def _within(title: str) -> str:
    """Return a title as it stands inside a sentence: ``everything INT8``, but ``INT8``."""
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


def _reference_control(data: ReportData) -> Control | None:
    measured = [c for c in data.controls.values() if c.psnr_db is not None or c.identical]
    return (
        data.controls.get("int8")
        if data.controls.get("int8") in measured
        else next(iter(measured), None)
    )
