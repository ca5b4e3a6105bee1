"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mpq_deploy.errors import UsageError

if TYPE_CHECKING:
    from mpq_deploy.device.signature import SecretKey
    from mpq_deploy.system.parallel.work import Crew

OF_MODEL = "Model inputs"
# The largest seed that NumPy's and torch's generators both take.
LARGEST_SEED = 2**63 - 1
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def signing_key(path: Path | None) -> SecretKey | None:
    """Read a minisign secret key, before any work. Raises UsageError, also if cryptography is missing."""
    if path is None:
        return None
    from mpq_deploy.device.signature import read_secret_key, require_crypto

    require_crypto()
    return read_secret_key(path)


def expanded(path: Path | None) -> Path | None:
    """Return ``path`` with ``~`` expanded to the home folder: shells leave it as it is in ``--out=~/x``."""
    return None if path is None else path.expanduser()


def output_file(path: Path | None) -> Path | None:
    """Return the file that a command is to write; no folder is made for it.

    Raises UsageError, before any work, for a folder, for a device file, and where its folder does
    not exist.
    """
    if path is None:
        return None
    path = path.expanduser()
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder.", "Give the file to write.")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file.", "Give the file to write.")
        if not path.parent.is_dir():
            raise UsageError(
                f"There is no folder {path.parent}.", "Create it first, or give another path."
            )
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)[:200]} cannot be written: {error}.") from error
    return path


def output_picture(path: Path) -> Path:
    """Return the picture to write, a PNG where its name has no ending. UsageError as ``output_file``."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", f"Name a picture, such as {path / 'image.png'}.")
    path = output_file(path if path.suffix else path.with_name(f"{path.name}.png")) or path
    if path.suffix.lower() not in PICTURES:
        raise UsageError(
            f"{path} has no ending of a picture.", f"Give a name with {', '.join(PICTURES)}."
        )
    return path


class Sensitivity(str, Enum):
    """Values of --sensitivity."""

    auto = "auto"
    probe = "probe"
    trajectory = "trajectory"
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


class EffortKind(str, Enum):
    """Values of --effort."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


class Objective(str, Enum):
    """Values of --objective."""

    balanced = "balanced"
    quality = "quality"
    latency = "latency"


ModelArgument = Annotated[
    Optional[str],
    typer.Argument(
        metavar="MODEL",
        help="A diffusers folder, a checkpoint (.safetensors), an ONNX file with its YAML, a hub id, or a bundled demo "
        "(emoji, digits). "
        "Default: emoji.",
        show_default=False,
    ),
]
RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="The run folder.", show_default=False, callback=expanded),
]
ReportArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run folder, or a report.json.",
        show_default=False,
        callback=expanded,
    ),
]
BudgetOption = Annotated[
    Optional[str],
    typer.Option(
        "--budget",
        "-b",
        metavar="SIZE",
        help="Size of all constants: a fraction of the FP16 size (0.35), a size (600MB), or bits per weight (4.5bits).",
        show_default="0.35",
    ),
]
RecipeOption = Annotated[
    Optional[str],
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        help="A bundled recipe (see 'mpq-deploy recipe') or a YAML file. Options override it.",
        show_default=False,
    ),
]
TargetOption = Annotated[
    Optional[str],
    typer.Option(
        "--target",
        "-t",
        metavar="NAME",
        help="Target of the engine: see 'mpq-deploy targets'.",
        show_default="rtx",
    ),
]
OneTargetOption = Annotated[
    Optional[str],
    typer.Option(
        "--target",
        "-t",
        metavar="NAME",
        help="Only this target, of a run that has several.",
        show_default="all of them",
    ),
]
TargetsOption = Annotated[
    Optional[str],
    typer.Option(
        "--target",
        "-t",
        metavar="NAME[,NAME...]",
        help="Target of the engine: see 'mpq-deploy targets'. Several share one measurement.",
        show_default="rtx",
    ),
]
OutOption = Annotated[
    Optional[Path],
    typer.Option(
        "--out",
        "-o",
        metavar="RUN",
        help="The run folder.",
        show_default="runs/<model>",
        callback=expanded,
    ),
]
ConditionsOption = Annotated[
    Optional[Path],
    typer.Option(
        "--conditions",
        metavar="FILE.npz",
        help="Arrays by input name, one row per condition.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
SchedulerOption = Annotated[
    Optional[Path],
    typer.Option(
        "--scheduler",
        metavar="PATH",
        help="A scheduler_config.json, or the folder that holds it.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
PromptsOption = Annotated[
    Optional[Path],
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts for calibration and images, one per line.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
CallOption = Annotated[
    Optional[Path],
    typer.Option(
        "--call",
        metavar="FILE",
        help="YAML with the arguments that the pipeline is called with.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
RecordedOption = Annotated[
    Optional[Path],
    typer.Option(
        "--calls",
        metavar="FOLDER",
        help="Folder of calls that mpq_deploy.record wrote.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
ConfigOption = Annotated[
    Optional[Path],
    typer.Option(
        "--config",
        metavar="FOLDER",
        help="Folder with the pipeline's configuration files, for a checkpoint.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
LoraOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="LoRA safetensors to fuse into the model; repeatable.",
        rich_help_panel=OF_MODEL,
        show_default=False,
    ),
]
SizesOption = Annotated[
    Optional[str],
    typer.Option(
        "--sizes",
        metavar="WxH,...|WxH:WxH[:STEP]",
        help="Image sizes that one engine takes: a list, or a range from the smallest to the largest.",
        rich_help_panel=OF_MODEL,
        show_default="the model's own",
    ),
]
LoraSlotsOption = Annotated[
    Optional[int],
    typer.Option(
        "--lora-slots",
        metavar="RANK",
        min=0,
        help="Slots of this rank for LoRAs that are given to 'generate', without a rebuild.",
        rich_help_panel=OF_MODEL,
        show_default="0: none",
    ),
]
OnlyOption = Annotated[
    Optional[str],
    typer.Option(
        "--only",
        metavar="PART[,PART]",
        help="Parts of a pipeline: unet, vae, text_encoder ...",
        show_default="the whole pipeline",
    ),
]
PinnedOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--component",
        metavar="PART=fp16",
        help="Part of a pipeline that stays in FP16; repeatable.",
        show_default=False,
    ),
]
SensitivityOption = Annotated[
    Optional[Sensitivity],
    typer.Option(
        "--sensitivity",
        help="Sensitivity metric that predicts each layer's loss; auto: trajectory or probe.",
        show_default="auto",
    ),
]
MaxLatencyOption = Annotated[
    Optional[str],
    typer.Option(
        "--max-latency",
        metavar="TIME",
        help="Latency limit for one call of the model, such as 120ms.",
        show_default=False,
    ),
]
ObjectiveOption = Annotated[
    Optional[Objective],
    typer.Option(
        "--objective", help="What to optimize within the budget.", show_default="balanced"
    ),
]
LatencyTableOption = Annotated[
    Optional[Path],
    typer.Option(
        "--latency-table",
        metavar="FILE",
        help="Latency table from 'mpq-deploy profile'.",
        show_default="estimates",
    ),
]
WORKERS = "Workers"
WorkersOption = Annotated[
    Optional[int],
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Number of processes to use.",
        rich_help_panel=WORKERS,
        show_default="1, this process",
    ),
]
RayOption = Annotated[
    Optional[str],
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster to use: HOST:PORT, or auto.",
        rich_help_panel=WORKERS,
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    Optional[int],
    typer.Option(
        "--threads",
        min=1,
        metavar="T",
        help="Threads per worker. Results depend on it in the last digits; they do not depend on --workers.",
        rich_help_panel=WORKERS,
        show_default="all that this process may use",
    ),
]

ComputeOption = Annotated[
    Optional[str],
    typer.Option(
        "--device",
        metavar="NAME",
        help="Compute device: auto, cpu, cuda, or cuda:N.",
        show_default="auto",
    ),
]

EffortOption = Annotated[
    Optional[EffortKind],
    typer.Option(
        "--effort",
        help="How many calls, probes and images to use where the recipe does not say.",
        show_default="standard",
    ),
]

TimeOption = Annotated[
    Optional[str],
    typer.Option(
        "--time",
        metavar="DURATION",
        help="Lower the counts of --effort so that the build fits this time: 90s, 30min, 2h.",
        show_default=False,
    ),
]

DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Stop after the export, and print the forecast.")
]

MaxSizeOption = Annotated[
    Optional[str],
    typer.Option(
        "--max-size",
        metavar="SIZE",
        help="Size of all constants, written like a budget: 0.36, 36%, 600MB.",
        show_default=False,
    ),
]
MinPsnrOption = Annotated[
    Optional[float],
    typer.Option("--min-psnr", metavar="DB", help="Mean PSNR over the images.", show_default=False),
]
MinSsimOption = Annotated[
    Optional[float],
    typer.Option("--min-ssim", help="Mean SSIM over the images.", show_default=False),
]
MaxNmseOption = Annotated[
    Optional[float],
    typer.Option("--max-nmse", help="Relative squared error of the output.", show_default=False),
]
MaxFrechetOption = Annotated[
    Optional[float],
    typer.Option(
        "--max-frechet-increase",
        help="Frechet distance above the float model's or the baseline's.",
        show_default=False,
    ),
]
LatencyLimitOption = Annotated[
    Optional[str],
    typer.Option(
        "--max-latency",
        metavar="TIME",
        help="Latency of one call: 120ms, 0.12s.",
        show_default=False,
    ),
]
AllowEstimateOption = Annotated[
    bool,
    typer.Option("--allow-estimate", help="Accept an estimated latency where none was measured."),
]
MaxPsnrDropOption = Annotated[
    Optional[float],
    typer.Option(
        "--max-psnr-drop", metavar="DB", help="PSNR below the baseline's.", show_default=False
    ),
]
MaxLpipsOption = Annotated[
    Optional[float],
    typer.Option("--max-lpips", help="LPIPS to the float model's images.", show_default=False),
]
MaxClipDropOption = Annotated[
    Optional[float],
    typer.Option("--max-clip-drop", help="CLIP score below the float model's.", show_default=False),
]
BaselineOption = Annotated[
    Optional[Path],
    typer.Option(
        "--baseline",
        metavar="RUN",
        help="Run folder or report.json to compare with.",
        show_default=False,
    ),
]
SignOption = Annotated[
    Optional[Path],
    typer.Option(
        "--sign",
        metavar="KEY",
        help="Sign the output with this minisign secret key (writes FILE.minisig).",
        show_default=False,
    ),
]
TrustOption = Annotated[
    Optional[str],
    typer.Option(
        "--trust",
        metavar="PUBKEY",
        help="Refuse reports that are not signed with this minisign key.",
        show_default=False,
    ),
]
JunitOption = Annotated[
    Optional[Path],
    typer.Option(
        "--junit",
        metavar="FILE",
        help="Write JUnit XML.",
        show_default=False,
        callback=output_file,
    ),
]
MarkdownFileOption = Annotated[
    Optional[Path],
    typer.Option(
        "--markdown",
        metavar="FILE",
        help="Write a Markdown summary.",
        show_default=False,
        callback=output_file,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
NetworkOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--network",
        metavar="NAME",
        help="demo, efficientnet-lite0, inception, clip or dinov2; repeatable. none: image scores only.",
        show_default="demo for the bundled models, else efficientnet-lite0",
    ),
]
ImagesOption = Annotated[int, typer.Option("--images", min=2, help="Images per model.")]
RealOption = Annotated[
    Optional[Path],
    typer.Option(
        "--real", metavar="PATH", help="Real images: a folder or an .npz file.", show_default=False
    ),
]
WeightsOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--weights",
        metavar="NAME=PATH",
        help="File with a network's weights; repeatable.",
        show_default=False,
    ),
]
SeedOption = Annotated[
    Optional[int],
    typer.Option(
        "--seed", min=0, max=LARGEST_SEED, help="Seed of the noise.", show_default="evaluate.seed"
    ),
]
SamplingWorkersOption = Annotated[
    Optional[int],
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Sampling processes.",
        rich_help_panel=WORKERS,
        show_default="one per core",
    ),
]
ControlsOption = Annotated[
    bool, typer.Option("--controls", help="Also measure everything-INT8 and everything-INT4.")
]
LpipsOption = Annotated[bool, typer.Option("--lpips", help="Also measure LPIPS, image by image.")]
ClipScoreOption = Annotated[
    bool, typer.Option("--clip-score", help="Also measure the CLIP score of images and prompts.")
]
AgainstOption = Annotated[
    Optional[Path],
    typer.Option(
        "--against", metavar="FILE", help="Model to compare with.", show_default="the float model"
    ),
]
BackendOption = Annotated[
    str,
    typer.Option("--backend", metavar="NAME", help="onnxruntime, tensorrt_rtx, tensorrt, or auto."),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, or auto.")]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Samples per call.")]
CallsOption = Annotated[int, typer.Option("--calls", min=1, help="Timed calls per model.")]
RoundsOption = Annotated[
    int,
    typer.Option(
        "--rounds", min=1, help="Rounds that the calls are split into, the models taking turns."
    ),
]
WarmUpOption = Annotated[
    int, typer.Option("--warm-up", min=1, help="Warm-up calls, reported separately.")
]
CpuThreadsOption = Annotated[
    int, typer.Option("--threads", min=0, help="CPU threads; 0: one per core.")
]
ShapeOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--shape",
        metavar="NAME:1x4x8x8",
        help="Shape of an input whose dimensions the file leaves open.",
        show_default=False,
    ),
]
BenchOutOption = Annotated[
    Optional[Path],
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="Write the results, for 'report --device'.",
        show_default=False,
        callback=output_file,
    ),
]

AuditOutOption = Annotated[
    Optional[Path],
    typer.Option(
        "--out",
        "-o",
        metavar="RUN",
        help="Run folder of the audit.",
        show_default="runs/audit-<model>",
    ),
]
BudgetListOption = Annotated[
    str,
    typer.Option(
        "--budgets", metavar="LIST", help="FROM:TO, FROM:TO:STEP, or a comma-separated list."
    ),
]
MethodsOption = Annotated[
    Optional[str],
    typer.Option(
        "--methods",
        metavar="LIST",
        help="Sensitivity metrics, comma-separated.",
        show_default="all",
    ),
]
PairsOption = Annotated[
    int,
    typer.Option(
        "--pairs", min=1, help="Maximum number of (layer, scheme) pairs measured exhaustively."
    ),
]
ImageTruthOption = Annotated[
    bool,
    typer.Option("--images", help="Measure also what each pair does to final images."),
]
CallsPerTimestepOption = Annotated[
    Optional[int],
    typer.Option(
        "--samples",
        min=1,
        help="Calls measured at each timestep.",
        show_default="measure.calls: 24",
    ),
]
SetOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set an entry of the recipe; repeatable.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Compute:
    """The options for workers and the compute device; ``with_compute`` passes them as one argument."""

    workers: WorkersOption = None
    ray: RayOption = None
    threads: ThreadsOption = None
    device: ComputeOption = None

    def crew(self) -> Crew | None:
        """Return the workers for what can be spread over several; None: this process does it all."""
        return crew_for(self.workers, self.ray, self.threads)


HERE = Compute()


def with_compute(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``compute`` by the options of ``Compute``."""
    options = inspect.signature(Compute, eval_str=True).parameters

    @wraps(command)
    def call(**given: Any) -> None:
        compute = Compute(**{name: given.pop(name) for name in options})
        command(**given, compute=compute)

    own = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.parameters.items():
        parameters += options.values() if name == "compute" else [parameter]
    call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def crew_for(workers: int | None, ray: str | None, threads: int | None) -> Crew | None:
    """Return the workers for what can be spread over several; None: this process does it all."""
    from mpq_deploy.system.parallel.crew import crew_for as crew_of

    return crew_of(workers, ray, threads)


def pinned_parts(given: list[str] | None) -> list[str] | None:
    """Read NAME=fp16; None where none was given. Raises UsageError for anything else."""
    names = [text.removesuffix("=fp16") for text in given or ()]
    wrong = next((one for one in given or () if not one[:-5] or not one.endswith("=fp16")), None)
    if wrong is not None:
        part = wrong.partition("=")[0] or "vae"
        raise UsageError(
            f"--component {wrong} pins no part.",
            f"Write --component {part}=fp16; to build a part alone: --only {part}.",
        )
    return names or None


def latency_settings(
    max_latency: str | None, objective: Objective | None, table: Path | None
) -> dict[str, Any]:
    """Return the recipe entries of the three options about latency."""
    return {
        "allocate.max_latency": max_latency,
        "allocate.objective": objective,
        "allocate.latency_table": table,
    }
