"""report.html of a whole pipeline's run: its parts' shares of bytes, time and error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from mpq_deploy.evaluate.cache import write_aside
from mpq_deploy.report.page import rendered
from mpq_deploy.run.folder import COMPONENTS
from mpq_deploy.run.pipeline_file import PartFigures, PipelineFile, WholeDevice

PAGE = "report.html"
COLUMNS = (
    *("Part", "Bytes", "Of its FP16", "Share of bytes", "Share of time", "Gain"),
    *("Predicted error of images", "Measured, alone", "Measured / predicted"),
)
NONE = "–"


def write_pipeline(run: Path, view: PipelineFile) -> Path:
    """Write the page of the whole; return its path."""
    write_aside(run / PAGE, pipeline_page(view).encode())
    return run / PAGE


def pipeline_page(view: PipelineFile) -> str:
    """Return the page. Every string of the view is escaped."""
    rows = part_rows(view)
    for row in rows[:-1]:
        link = Markup('<a href="{}">{}</a>')
        row[0] = link.format(f"{COMPONENTS}/{quote(row[0].split(' ')[0])}/{PAGE}", row[0])
    return rendered(
        "parts.html.j2",
        model=f"{view.source} ({view.class_name})",
        heading=f"{len(view.parts)} parts under one budget",
        columns=COLUMNS,
        rows=rows,
        facts=[*pipeline_facts(view), *device_facts(view)],
        notes=view.notes,
    )


def part_rows(view: PipelineFile) -> list[list[str]]:
    """Return a row of text for each part, and one for all of them."""
    rows = [_row(name, part, view) for name, part in view.parts.items()]
    together = PartFigures(
        state="quantized",
        fp16_size_bytes=view.fp16_size_bytes,
        size_bytes=view.size_bytes,
        predicted_image_error=view.predicted_image_error,
        measured_image_error=view.measured_image_error,
        image_ms=view.image_ms,
    )
    return [*rows, _row("all together", together, view)]


def _row(name: str, part: PartFigures, view: PipelineFile) -> list[str]:
    predicted, measured = part.predicted_image_error, part.measured_image_error
    pinned = " (FP16)" if part.state == "pinned" else ""
    curved = " (not quadratic)" if part.quadratic is False else ""
    return [
        name + pinned,
        NONE if part.size_bytes is None else f"{part.size_bytes:,}",
        _share(part.size_bytes, part.fp16_size_bytes),
        _share(part.size_bytes, view.size_bytes),
        _share(part.image_ms, view.image_ms),
        NONE if part.gain is None else f"{part.gain:.3g}{curved}",
        NONE if predicted is None else f"{predicted:.2e}",
        NONE if measured is None else f"{measured:.2e}",
        f"{measured / predicted:.2f}" if measured is not None and predicted else NONE,
    ]


def _share(part: float | None, whole: float | None) -> str:
    return NONE if part is None or not whole else f"{100 * part / whole:.1f} %"


def pipeline_facts(view: PipelineFile) -> list[str]:
    """Return bytes, time and error of the whole, a sentence each; nothing before it is planned."""
    if view.size_bytes is None or not view.fp16_size_bytes:
        return []
    size = f"{view.size_bytes:,} of {view.budget_bytes:,} bytes"
    facts = [f"{size}, {view.size_bytes / view.fp16_size_bytes:.4f} of all parts in FP16"]
    if view.image_ms is not None:
        facts.append(f"{view.image_ms:.3g} ms of layers and other kernels per image, estimated")
    if view.measured_image_error is not None:
        psnr = "" if view.psnr_db is None else f", PSNR {view.psnr_db:.1f} dB"
        facts.append(
            f"Relative error of {view.images} final images {view.measured_image_error:.2e}"
            f" (predicted {view.predicted_image_error or 0:.2e}){psnr}"
        )
    return facts


def device_facts(view: PipelineFile) -> list[str]:
    """Return what each device measured, a sentence each."""
    return [_device(one) for one in view.devices]


def _device(one: WholeDevice) -> str:
    name = f"On {one.target}" + (f" ({one.device})" if one.device else "")
    layers = {None: "no engines", True: "engines as planned", False: "engines DIFFER from the plan"}
    facts = [layers[one.verified]]
    wrong = [part for part, agrees in one.outputs_agree.items() if agrees is False]
    if wrong:
        facts.append(f"outputs of {', '.join(wrong)} DIFFER")
    if one.median_ms:
        calls = ", ".join(f"{part} {time:.3g}" for part, time in one.median_ms.items())
        whole = "" if one.image_ms is None else f"{one.image_ms:.3g} ms per image measured, "
        facts.append(f"{whole}ms of a call: {calls}")
    if one.images_agree is None:
        return f"{name}: {'; '.join(facts)}; no reference images: {one.not_made}"
    error = "not finite" if one.image_error is None else f"{one.image_error:.2e}"
    agree = "agree" if one.images_agree else "DIFFER"
    return f"{name}: {'; '.join(facts)}; images {agree} (error {error}, allowed {one.tolerance:g})"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table]


def pipeline_text(view: PipelineFile, run: Path) -> str:
    """Return the result for a terminal."""
    if view.size_bytes is None:
        names = "\n".join(f"  {run / COMPONENTS / name}" for name in view.parts)
        return f"{view.class_name}, a run for each part:\n{names}"
    lines = aligned([list(COLUMNS), *part_rows(view)])
    page = [f"report: {run / PAGE}"] if (run / PAGE).is_file() else []
    return "\n".join(
        [
            f"{view.class_name}: {'; '.join(pipeline_facts(view))}",
            "",
            *lines,
            "",
            *device_facts(view),
            *page,
        ]
    ).rstrip()
