"""report.html: one self-contained page made of ``templates/``; it fetches nothing."""

from __future__ import annotations

from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mpq_deploy.formats.scheme import FP16
from mpq_deploy.report import words
from mpq_deploy.report.budget_curve import budget_view
from mpq_deploy.report.charts import (
    prediction_chart,
    recovery_chart,
    size_quality_chart,
    timestep_chart,
)
from mpq_deploy.report.data import ReportData, SchemeTotal, kept_in_fp16
from mpq_deploy.report.network import branched, layer_details, legend, network_rows
from mpq_deploy.report.orthogonality_charts import orm_view
from mpq_deploy.report.pictures import picture_table


def html_page(data: ReportData) -> str:
    """Return the page. Every string of ``data`` is escaped by the templates."""
    titles = {name: words.title_of(name, data) for name in ("float", "ours", *data.compared)}
    pictures = (
        picture_table(data.images, titles)
        if data.images is not None and data.images.images
        else None
    )
    return rendered(
        "report.html.j2",
        data=data,
        script=asset("page.js") + asset("budgets.js"),
        pictures=pictures,
        titles=titles,
        size_chart=size_quality_chart(data),
        timestep_chart=timestep_chart(data),
        prediction_chart=prediction_chart(data),
        recovery_chart=recovery_chart(data),
        network=network_rows(data.layers),
        legend=legend(data),
        branched=branched(data),
        details=layer_details(data),
        budgets=budget_view(data),
        curve_note=words.curve_note(data),
        scheme_table=scheme_table(data.totals),
        kept=kept_in_fp16(data),
        orm=orm_view(data.orm) if data.orm is not None else None,
    )


def rendered(template: str, **values: object) -> str:
    """Return a page from a template, with the style and the words that all pages share."""
    return (
        _environment()
        .get_template(template)
        .render(words=words, style=asset("style.css"), **values)
    )


@cache
def _environment() -> Environment:
    """Return where templates are compiled, once for all pages of a process."""
    return Environment(
        loader=PackageLoader("mpq_deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def scheme_table(
    totals: tuple[SchemeTotal, ...],
) -> tuple[list[str], list[tuple[str, list[SchemeTotal | None], int, int]]]:
    """Return the schemes in use and, per operator, its totals with the sums of layers and bytes."""
    schemes = sorted({total.scheme for total in totals}, key=lambda name: (name != FP16.name, name))
    by_pair = {(total.op, total.scheme): total for total in totals}
    rows = []
    for op in sorted({total.op for total in totals}):
        cells = [by_pair.get((op, scheme)) for scheme in schemes]
        present = [cell for cell in cells if cell is not None]
        rows.append(
            (op, cells, sum(cell.layers for cell in present), sum(cell.bytes for cell in present))
        )
    return schemes, rows


def asset(name: str) -> Markup:
    """Return a file of ``templates/`` as it is: it is ours, and holds nothing of the user's."""
    return Markup(
        (resources.files("mpq_deploy.report") / "templates" / name).read_text(encoding="utf-8")
    )
