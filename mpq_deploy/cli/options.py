"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from mpq_deploy.system.parallel.work import Crew

OF_MODEL = "What the model does not bring"


class Sensitivity(str, Enum):
    """Values of --sensitivity."""

    probe = "probe"
    gain = "gain"
    local_error = "local_error"
    exhaustive = "exhaustive"
    kurtosis = "kurtosis"
    orm = "orm"
    size_only = "size-only"
    random = "random"


class CorrectionKind(str, Enum):
    """Values of --correction."""

    none = "none"
    ptqd = "ptqd"


class Objective(str, Enum):
    """Values of --objective."""

    loss = "loss"
    latency = "latency"


ModelArgument = Annotated[
    Optional[str],  # noqa: UP045  (typer reads annotations at run time on Python 3.10)
    typer.Argument(
        metavar="MODEL",
        help="A diffusers folder, an ONNX file with its YAML, a hub id, or a bundled demo (emoji, digits). "
        "Default: emoji.",
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)]
ReportArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or a report.json.", show_default=False)
]
BudgetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--budget",
        "-b",
        metavar="SIZE",
        help="Size of all constants: a fraction of the FP16 size (0.35), a size (600MB), or bits per weight (4.5bits).",
        show_default="0.35",
    ),
]
RecipeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        help="A bundled recipe (see 'mpq-deploy recipe') or a YAML file. Options override it.",
        show_default=False,
    ),
]
TargetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--target", "-t", metavar="NAME", help="What the engine runs on: see 'mpq-deploy targets'.", show_default="rtx"
    ),
]
OutOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", "-o", metavar="RUN", help="The run folder.", show_default="runs/<model>"),
]
ConditionsOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--conditions",
        metavar="FILE.npz",
        help="Arrays by input name, one row per condition.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
SchedulerOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--scheduler",
        metavar="PATH",
        help="A scheduler_config.json, or the folder that holds it.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
PromptsOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts for calibration and images, one per line.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
ComponentOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--component",
        metavar="PART",
        help="A part of a pipeline: vae, text_encoder ...",
        show_default="the one that denoises",
    ),
]
SensitivityOption = Annotated[
    Optional[Sensitivity],  # noqa: UP045
    typer.Option("--sensitivity", help="How losses are predicted.", show_default="probe"),
]
MaxLatencyOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-latency", metavar="TIME", help="Limit on one call, such as 120ms.", show_default=False),
]
ObjectiveOption = Annotated[
    Optional[Objective],  # noqa: UP045
    typer.Option("--objective", help="What is least within the budget.", show_default="loss"),
]
LatencyTableOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--latency-table", metavar="FILE", help="From 'mpq-deploy profile'.", show_default="estimates"),
]
WORKERS = "Where it is computed"
WorkersOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Processes that share the work.",
        rich_help_panel=WORKERS,
        show_default="this one",
    ),
]
RayOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="A Ray cluster that shares the work: HOST:PORT, or auto.",
        rich_help_panel=WORKERS,
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--threads",
        min=1,
        metavar="T",
        help="Of each worker. Last digits depend on it, not on how many workers there are.",
        rich_help_panel=WORKERS,
        show_default="as many as this process has",
    ),
]


def crew_for(workers: int | None, ray: str | None, threads: int | None) -> Crew | None:
    """Return who computes what can be spread over workers; None: this process."""
    from mpq_deploy.system.parallel.crew import crew_for as crew_of

    return crew_of(workers, ray, threads)


def latency_settings(max_latency: str | None, objective: Objective | None, table: Path | None) -> dict[str, Any]:
    """Return the recipe entries of the three options about latency."""
    return {
        "allocate.max_latency": max_latency,
        "allocate.objective": objective.value if objective else None,
        "allocate.latency_table": str(table) if table else None,
    }
