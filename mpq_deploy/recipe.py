"""The recipe: every setting of a run, validated once; its sections are the options that the other packages take.

In: a YAML file, the name of a bundled recipe, command-line options, or values from Python. Out: a
frozen Recipe, its YAML with every default, and the same with a comment per setting.
"""

from __future__ import annotations

import difflib
import itertools
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.formats.ranges import RANGE_KINDS
from mpq_deploy.formats.scheme import BRANCH_KINDS, NEW_FAMILIES, schemes_named
from mpq_deploy.models.lora_option import parse_lora
from mpq_deploy.system.inputs import read_text
from mpq_deploy.system.names import LONGEST_NAME, printable
from mpq_deploy.system.quantities import (
    NO_SIZES,
    Budget,
    BudgetEntry,
    DurationEntry,
    LatencyEntry,
    SizesEntry,
)
from mpq_deploy.system.validated import error_text
from mpq_deploy.system.yaml_file import YAML_BYTES, parse_yaml

Estimator = Literal["biased", "debiased"]
Aggregation = Literal["mean", "exponential"]
Reach = Literal["layer", "later"]
Bits = Literal["nominal", "deployed"]
SamplerKind = Literal["auto", "ddim", "folder"]
Effort = Literal["quick", "standard", "thorough"]
Loss = Literal["output", "eps", "v", "sample", "relation", "memory"]
# Losses of recovery: see ``recover.losses``.
LOSSES: tuple[Loss, ...] = get_args(Loss)
# What the target simulate chooses from unless the recipe says otherwise: few enough to measure
# quickly (our choice).
SIMULATED_DEFAULT = ("fp16", *(f"w{bits}a{a}-sim" for bits in (2, 3, 4, 5, 6, 8) for a in (8, 16)))


# The largest seed of NumPy's and torch's generators; other whole numbers end at a billion (our
# choice).
LARGEST_SEED, LARGEST_NUMBER = 2**63 - 1, 10**9
# Characters of an error's message that are shown (our choice).
LONGEST_MESSAGE = 500
# Columns of a recipe that is printed with comments (our choice).
COLUMNS = 100
# Settings that are paths, beside LoRAs and tables; what the recipe that a run keeps begins with.
PATHS = (
    *("model", "description", "conditions", "scheduler", "prompts", "call", "calls"),
    "config",
)
BUNDLED = ("emoji", "digits")  # models.locate.DEMOS, which imports this module
START = "# Relative paths start at "


AnySection = TypeVar("AnySection", bound="Section")


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would count as 1 or 0: YAML reads yes, no, on and off as true and false."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("Input should not be true or false (yes, no, on or off)")
        return value

    @model_validator(mode="after")
    def _of_usual_size(self) -> Section:
        for name, value in self:
            if isinstance(value, int) and value > LARGEST_NUMBER and name != "seed":
                raise ValueError(f"{name} is {value:,}, more than {LARGEST_NUMBER:,}")
            if isinstance(value, float) and abs(value) > LARGEST_NUMBER:
                raise ValueError(f"{name} is {value:g}, which is too large")
            # An empty model name is refused where the model is opened.
            texts = value if isinstance(value, (tuple, dict)) else (value,)
            texts = () if (name, value) == ("model", "") else texts
            if any(isinstance(text, str) and not _usable(text) for text in texts):
                what = "is empty, too long, or holds a control character"
                raise ValueError(f"{name} {what}: {_short(value)}")
        return self

    def replace(self: AnySection, **values: Any) -> AnySection:
        """Return the section with other ``values``, validated."""
        return type(self)(**{**dict(self), **values})


def _usable(text: str) -> bool:
    return bool(text.strip()) and len(text) <= LONGEST_NAME and printable(text) == text


def _home(path: str) -> str:
    """Return ``path`` with a leading ~ expanded, as a shell does; ~ of an unknown user stays."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        return path


class CalibrateSettings(Section):
    """The calls that the float model is observed on, and how activation scales are chosen."""

    timesteps: int = Field(20, ge=1, description="recorded timesteps, spread evenly over the steps")
    samples: int = Field(128, ge=1, description="trajectories")
    observed: int = Field(48, ge=1, description="recorded calls that activations are observed on")
    steps: int = Field(20, ge=1, description="sampler steps per trajectory")
    batch_size: int = Field(16, ge=1, description="samples per call, fewer where memory is short")
    seed: int = Field(1, ge=0, le=LARGEST_SEED, description="seed of the initial noise")
    scale: Literal["mse", "percentile", "absmax"] = Field(
        "mse", description="how INT8 activation scales are chosen"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="percentile of absolute values, for scale: percentile"
    )
    reservoir: int = Field(
        8192, ge=256, description="values kept per activation to choose its scale"
    )
    shifts: bool = Field(
        True, description="centre the channels of what convolutions read in INT8, where that pays"
    )


class OrmSettings(Section):
    """Orthogonality (MPQ-Diff): settings of measure.method orm and of its controls.

    ``beta``: gamma is in [0, 1], after division by L - 1. ``eta``: growth of the timesteps' weights
    over the whole denoising trajectory. ``bits`` that the objective counts: 4, 8 and 16, or with
    scales, so that finer blocks count as more. ``activation_budget`` is over the activations that
    have the choice.
    """

    beta: float = Field(1.0, ge=0, allow_inf_nan=False, description="theta = exp(-beta gamma)")
    estimator: Estimator = Field("biased", description="of linear CKA between layer outputs")
    aggregation: Aggregation = Field("mean", description="of theta over timesteps")
    eta: float = Field(
        1.0, allow_inf_nan=False, description="growth rate of the exponential weights"
    )
    importance: Reach = Field("layer", description="later: mean over a layer and all later ones")
    bits: Bits = Field("nominal", description="deployed: scales count as bits")
    activation_bits: Literal["int8", "program", "fp16"] = Field(
        "int8",
        description="of layers that may have INT8 activations; program: chosen by a second program",
    )
    activation_budget: float = Field(
        12.0, ge=8, le=16, description="bits per activation element, for program"
    )


# Random adjoint directions of a call, by default.
OUTPUT_PROBES, IMAGE_PROBES = 1, 4


class MeasureSettings(Section):
    """How the loss of every (layer, scheme) is predicted."""

    method: Literal[
        "auto",
        "probe",
        "trajectory",
        "gain",
        "local_error",
        "exhaustive",
        "kurtosis",
        "orm",
        "size-only",
        "random",
    ] = Field(
        "auto",
        description="sensitivity metric; auto: trajectory (final images) where whole ones fit, else probe (outputs)",
    )
    probes: int | None = Field(
        None,
        ge=1,
        description="random adjoint directions per call; by default 1, of whole trajectories 4",
    )
    timesteps: int = Field(20, ge=1, description="calibrated timesteps that are measured")
    samples: int = Field(
        96, ge=1, description="calibration samples measured on and kept from rounding"
    )
    calls: int = Field(12, ge=1, description="samples measured at each timestep, in rotation")
    batch_size: int = Field(16, ge=1, description="samples per call")
    seed: int = Field(
        2, ge=0, le=LARGEST_SEED, description="seed of probes, noise and random losses"
    )
    sampling: Literal["uniform", "adaptive"] = Field(
        "uniform",
        description="adaptive: more timesteps where the layers' importance (ORM) changes fastest",
    )
    coarse_timesteps: int = Field(
        5, ge=2, description="timesteps of adaptive sampling's first pass"
    )
    orm: OrmSettings = OrmSettings()

    @property
    def directions(self) -> int:
        """How many random adjoint directions each call has.

        One direction more tells less than another call does, where losses are steadied by parts of
        the projections (docs/results/few-entries.md); trajectories have no parts.
        """
        if self.probes is not None:
            return self.probes
        return OUTPUT_PROBES if self.method == "probe" else IMAGE_PROBES


class ProtectRule(Section):
    """Layers whose name matches ``layers`` (shell pattern) may only take ``schemes``."""

    layers: str = Field(description="shell pattern of layer names, such as up_blocks.*")
    schemes: tuple[str, ...] = Field(description="the only schemes that these layers may take")

    @field_validator("schemes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        _check_schemes(names)
        return names


class AllocateSettings(Section):
    """What the solver may choose from."""

    schemes: tuple[str, ...] = Field(
        ("fp16", "w8a8", "w8a16", "w4a16", "w4a8"),
        description="schemes that layers may take, where the target supports them",
    )
    branches: tuple[str, ...] = Field(
        ("rows", "scale"),
        description="branches beside a quantized body, where the target supports them; omq and zres: simulated only",
    )
    ranges: tuple[str, ...] = Field(
        RANGE_KINDS,
        description="ranges of quantized activations besides static ones: per timestep, or from the values (dynamic)",
    )
    branch_penalty: float = Field(
        0.002,
        ge=0,
        description="share of the plan's loss that each kernel of a branch must take off to be worth it",
    )
    cross_terms: bool = Field(
        True, description="refine the plan with the cross terms between layers if that helps"
    )
    objective: Literal["balanced", "quality", "latency"] = Field(
        "balanced",
        description="within the budget: quality (minimum error), latency (fastest), balanced (fastest within slack)",
    )
    slack: float = Field(
        2.0,
        ge=1,
        allow_inf_nan=False,
        description="with objective balanced: how many times the minimum predicted error a faster plan may have",
    )
    max_latency: LatencyEntry | None = Field(
        None, description="latency limit of one call at engine.batch_opt, besides the budget: 120ms"
    )
    max_loss: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="with objective latency: limit on the sum of the predicted losses",
    )
    latency_table: str | None = Field(
        None, description="file of 'mpq-deploy profile'; what it lacks is estimated"
    )
    protect: tuple[ProtectRule, ...] = Field(
        (), description="layers that may only take some schemes"
    )
    trim: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="share of the images, those of the largest errors, that do not count (measure.method: trajectory)",
    )
    images_count: Literal["inverse", "equal"] = Field(
        "inverse",
        description="measured images count by the inverse of their own error, or equally (measure.method: trajectory)",
    )
    tail: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="minimize the mean error of this share of the images, the worst (measure.method: trajectory)",
    )
    tie_qkv: bool = Field(
        True,
        description="queries, keys and values of one input share a scheme: TensorRT may fuse their products",
    )
    attention: Literal["fp16", "fp8"] = Field(
        "fp16",
        description="fp8: each softmax(QK^T)V may compute in FP8, where the target has it, for less time (probes)",
    )
    gap: float = Field(1e-4, ge=0, lt=1, description="relative gap at which the solver may stop")
    time_limit: float = Field(60.0, gt=0, description="seconds")

    @field_validator("latency_table")
    @classmethod
    def _of_the_user(cls, path: str | None) -> str | None:
        return None if path is None else _home(path)

    @field_validator("schemes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        _check_schemes(names)
        return names

    @field_validator("ranges")
    @classmethod
    def _known_ranges(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            if kind not in RANGE_KINDS:
                raise ValueError(
                    f"unknown range '{kind}'. {nearest(kind, RANGE_KINDS)}Known: {', '.join(RANGE_KINDS)}"
                )
        return kinds

    @field_validator("branches")
    @classmethod
    def _known_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            if kind not in BRANCH_KINDS:
                raise ValueError(
                    f"unknown branch '{kind}'. {nearest(kind, BRANCH_KINDS)}Known: {', '.join(BRANCH_KINDS)}"
                )
        return kinds


class QuantizeSettings(Section):
    """How weights are rounded."""

    rounding: Literal["gptq", "nearest"] = Field("gptq", description="nearest is a baseline")
    noise_draws: int = Field(
        1,
        ge=0,
        description="fresh noises per recorded sample for the Hessians; 0: the recorded ones",
    )
    damping: float = Field(
        0.05, gt=0, description="damping added to the Hessian's diagonal, relative to each element"
    )
    salience: Literal["probe", "kurtosis"] = Field(
        "probe", description="order of channels in a rows branch"
    )
    refinements: int = Field(
        2, ge=0, description="rounds of refitting INT4 scales and codes after GPTQ"
    )
    hessian_rows: int = Field(
        8192, ge=64, description="input vectors per layer's Hessian, at least 2 per column"
    )
    hessian_width: int = Field(
        4096,
        ge=64,
        description="above this width, or where memory_mb is short, the Hessian is block-diagonal",
    )
    memory_mb: int = Field(512, ge=16, description="limit on the size of the Hessians held at once")


# Updates where recovery is asked for without a number: ``build --recover``.
RECOVER_STEPS = 2050


class RecoverSettings(Section):
    """Training of the quantized model towards the float one (AdamW); steps 0: none.

    Learning rates hold for a plan with a measured NMSE of 1e-3 or more, below which they follow its
    square root; each has a warm-up and a cosine to zero, and a rate of 0 freezes that kind of
    parameter.
    """

    steps: int = Field(0, ge=0, description="updates; 0: no recovery")
    batch_size: int = Field(16, ge=1, description="calls per update")
    trajectories: int = Field(80, ge=1, description="float trajectories per round, recorded anew")
    round_steps: int = Field(100, ge=1, description="updates per round")
    replay: int = Field(6, ge=1, description="rounds drawn from, the current one included")
    held_out: int = Field(
        32, ge=1, description="validation trajectories: they choose the state kept"
    )
    check_every: int = Field(
        200, ge=1, description="updates between validations, each with a checkpoint"
    )
    rank: int = Field(
        0, ge=0, description="maximum rank of the adapters; 0: full, as memory allows"
    )
    margin: float = Field(
        0.0,
        ge=0,
        le=0.499,
        description="initial distance of weights from their code, in quantization steps",
    )
    initialization: Literal["zero", "svd"] = Field(
        "zero", description="of the adapters; svd as in MPQ-DMv2"
    )
    losses: dict[Loss, float] = Field(
        {"output": 1.0}, description=f"weights, by name: {', '.join(LOSSES)}"
    )
    timesteps: Literal["uniform", "sensitivity"] = Field(
        "sensitivity", description="sensitivity: drawn more often where the plan's error is larger"
    )
    adapter_rate: float = Field(
        45.0, ge=0, description="learning rate, in units of a layer's mean step / 2500"
    )
    scale_rate: float = Field(0.0015, ge=0, description="learning rate of log scales")
    constant_rate: float = Field(
        0.0015, ge=0, description="learning rate of FP16 constants, in units of their rms"
    )
    warmup: int = Field(10, ge=0, description="updates")
    segments: int = Field(
        1, ge=1, description="graph parts recomputed in the backward pass, to save memory"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of training; auto: bfloat16 on a GPU that has it"
    )
    relation_pixels: int = Field(
        256, ge=1, description="maximum pixels per map in the relation loss"
    )
    memory_size: int = Field(
        20000, ge=1, description="size of the memory loss's ring buffer, in pixels"
    )
    memory_pixels: int = Field(
        128, ge=1, description="pixels compared and then stored at each update"
    )
    memory_anchors: int = Field(4096, ge=1, description="stored pixels that they are compared with")
    seed: int = Field(4, ge=0, le=LARGEST_SEED, description="seed of batches and noise")

    @field_validator("losses")
    @classmethod
    def _any_weight(cls, losses: dict[Loss, float]) -> dict[Loss, float]:
        for name, weight in losses.items():
            if not 0 <= weight <= LARGEST_NUMBER:
                raise ValueError(f"the weight of {name} is {weight:g}; it must be 0 to 1e9")
        if not any(weight > 0 for weight in losses.values()):
            raise ValueError("at least one loss needs a weight above 0")
        return losses


class EngineSettings(Section):
    """How the engine is built."""

    build: bool = Field(True, description="false: run every stage except the engine")
    batch_min: int = Field(1, ge=1, description="smallest batch")
    batch_opt: int = Field(2, ge=1, description="batch that the engine is tuned for")
    batch_max: int = Field(8, ge=1, description="largest batch")

    @model_validator(mode="after")
    def _ascending(self) -> EngineSettings:
        batches = (self.batch_min, self.batch_opt, self.batch_max)
        if list(batches) != sorted(batches):
            raise ValueError(
                f"batch_min, batch_opt and batch_max are {', '.join(map(str, batches))}; they must be ascending"
            )
        return self


class EvaluateSettings(Section):
    """How the quantized model is compared with the float one."""

    samples: int = Field(32, ge=1, description="images per model, from the same noise")
    steps: int = Field(20, ge=1, description="sampler steps per image")
    timesteps: int = Field(
        20, ge=1, description="timesteps at which the output's error is measured"
    )
    calls: int = Field(
        8, ge=1, description="images measured at each timestep, in rotation; each at least once"
    )
    batch_size: int = Field(16, ge=1, description="samples per call, fewer where memory is short")
    seed: int = Field(
        1234, ge=0, le=LARGEST_SEED, description="seed of the initial noise; not calibration's"
    )
    sampler: SamplerKind = Field(
        "auto", description="auto: built-in DDIM for DDIM and DDPM, else the folder's own class"
    )
    controls: bool = Field(
        True,
        description="also evaluate everything INT8, INT4, FP8, FP4 and NVIDIA's rule, where the target takes them",
    )
    controls_images: Literal["needed", "all"] = Field(
        "needed",
        description="of each control; needed: until it is distinguished from the plan, at least 8",
    )
    correction: Literal["none", "ptqd"] = Field(
        "none", description="ptqd: also sample with corrected outputs"
    )
    correction_bias: Literal["channel", "scalar"] = Field(
        "channel", description="one bias per channel, or one"
    )


class ComputeSettings(Section):
    """The device that computes the stages."""

    device: str = Field(
        "auto", description="auto: an NVIDIA GPU where there is one; cpu, cuda, cuda:N"
    )

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device):
            raise ValueError(f"unknown device '{device}': auto, cpu, cuda or cuda:N")
        return device


class Recipe(Section):
    """All settings of a run."""

    model: str | None = Field(
        None, description="folder, checkpoint, ONNX file, hub id or bundled model; null: emoji"
    )
    budget: BudgetEntry = Field(
        Budget.parse("0.35"),
        description="size of all constants: share of FP16 (0.35), size (600MB) or bits per weight (4.5bits)",
    )
    effort: Effort = Field(
        "standard",
        description="sets the counts that the recipe leaves open; standard: at most 2 hours, if possible",
    )
    time: DurationEntry | None = Field(
        None,
        description="time limit of a whole build on this machine: 30min; counts are lowered to fit it",
    )
    target: str = Field(
        "rtx", description="name of a target (mpq-deploy targets), or a YAML file; several: a,b"
    )
    description: str | None = Field(
        None, description="YAML of an ONNX model, where it is not beside it"
    )
    conditions: str | None = Field(
        None, description=".npz: arrays by input name, one row per condition"
    )
    scheduler: str | None = Field(None, description="scheduler_config.json, or its folder")
    prompts: str | None = Field(None, description="text file, one prompt per line")
    call: str | None = Field(
        None, description="YAML: keyword arguments of the pipeline, a list of calls"
    )
    calls: str | None = Field(None, description="folder that mpq_deploy.record wrote, for ONNX")
    config: str | None = Field(
        None, description="folder with a pipeline's configurations, for a checkpoint in one file"
    )
    lora: tuple[str, ...] = Field(
        (), description="LoRA files to fuse into the model: FILE.safetensors or FILE:SCALE"
    )
    lora_slots: int = Field(
        0,
        ge=0,
        le=1024,
        description="rank of the slots that the engine gets for LoRAs that are given when it runs; 0: none",
    )
    component: str | None = Field(
        None,
        description="pipeline parts: unet, vae_decoder, text_encoder ..., several: a,b; null: all, or the denoiser",
    )
    pinned: tuple[str, ...] = Field((), description="parts of a whole pipeline that stay in FP16")
    component_samples: int = Field(
        64, ge=8, description="inputs that a VAE is calibrated and compared with"
    )
    guidance_scale: float | None = Field(
        None, description="classifier-free guidance; null: the model's own"
    )
    sizes: SizesEntry = Field(
        NO_SIZES,
        description="WIDTHxHEIGHT that one engine takes: [512x512, 768x512], or FROM:TO[:STEP]; empty: its own one",
    )
    first_token: Literal["quantized", "precomputed"] = Field(
        "quantized",
        description="precomputed: a text's first token has FP16 keys and values (MixDQ)",
    )
    compute: ComputeSettings = ComputeSettings()
    calibrate: CalibrateSettings = CalibrateSettings()
    measure: MeasureSettings = MeasureSettings()
    allocate: AllocateSettings = AllocateSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    recover: RecoverSettings = RecoverSettings()
    engine: EngineSettings = EngineSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @field_validator(
        "target",
        *PATHS,
    )
    @classmethod
    def _of_the_user(cls, path: str | None) -> str | None:
        """Expand a leading ~ to the home folder, as a shell does."""
        return None if path is None else _home(path)

    @field_validator("target", mode="before")
    @classmethod
    def _of_a_list(cls, given: Any) -> Any:
        """Accept several targets as a list, too."""
        several = isinstance(given, (list, tuple)) and all(isinstance(one, str) for one in given)
        return ",".join(given) if several else given

    @field_validator("lora")
    @classmethod
    def _with_scales(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        """Check the scales; expand a leading ~ to the home folder."""
        given = tuple(map(_home, given))
        try:
            for text in given:
                parse_lora(text)
        except UsageError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return given

    @model_validator(mode="before")
    @classmethod
    def _newer_by_default(cls, values: Any) -> Any:
        """Let a target choose from FP8 and FP4 too where it lists them and the recipe names no schemes."""
        from mpq_deploy.engine.target import load_target

        name = values.get("target") if isinstance(values, dict) else None
        section = values.get("allocate", {}) if isinstance(values, dict) else None
        if not isinstance(name, str) or not isinstance(section, dict) or "schemes" in section:
            return values
        try:
            taken = {f for listed in load_target(name).schemes.values() for f in listed}
        except UsageError:
            # A bad target is reported where the recipe is checked.
            return values
        newer = tuple(family for family in NEW_FAMILIES if family in taken)
        if not newer:
            return values
        schemes = (*AllocateSettings.model_fields["schemes"].default, *newer)
        return {**values, "allocate": {**section, "schemes": schemes}}

    @model_validator(mode="before")
    @classmethod
    def _simulated_by_default(cls, values: Any) -> Any:
        """Let the target simulate choose from simulated schemes where the recipe names none."""
        if not isinstance(values, dict) or values.get("target") != "simulate":
            return values
        section = values.get("allocate", {})
        if not isinstance(section, dict) or "schemes" in section:
            return values
        return {**values, "allocate": {**section, "schemes": SIMULATED_DEFAULT}}

    def to_yaml(self) -> str:
        """Return the whole recipe, every default written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    def stored(self) -> str:
        """Return ``to_yaml`` below the folder that relative paths start at, as runs keep it."""
        start = str(Path.cwd())
        return (f"{START}{start}\n" if printable(start) == start else "") + self.to_yaml()

    def explained(self) -> str:
        """Return the whole recipe as YAML with a comment for every setting."""
        return "\n".join(_explained(self)) + "\n"


def _explained(section: Section, indent: str = "") -> Iterator[str]:
    """Yield the lines of a section: nested ones with their docstring, others with choices and default."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            heading = (type(value).__doc__ or "").splitlines()[0]
            yield from ("", f"{indent}{name}:  # {heading}")
            yield from _explained(value, indent + "  ")
            continue
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        notes = [" | ".join(map(str, choices)), field.description or ""]
        if value != field.default:
            default = str(field.default) if isinstance(field.default, Budget) else field.default
            notes.append(f"default: {_flow(default)}")
        yield from _commented(
            f"{indent}{name}: {_flow(values[name])}", "; ".join(filter(None, notes))
        )


def _commented(entry: str, comment: str) -> list[str]:
    """Put the comment after the entry if both fit in 100 columns, else above it."""
    line = f"{entry:<30}  # {comment}"
    if len(line) <= COLUMNS:
        return [line]
    start = entry[: len(entry) - len(entry.lstrip())] + "# "
    return [*textwrap.wrap(comment, COLUMNS, initial_indent=start, subsequent_indent=start), entry]


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = str(yaml.safe_dump(plain, default_flow_style=True, width=10_000, sort_keys=False))
    return text.strip().removesuffix("...").strip()


def _check_schemes(names: tuple[str, ...]) -> None:
    try:
        schemes_named(names)
    except UsageError as error:
        raise ValueError(str(error)) from error


def make_recipe(values: dict[str, Any], source: str = "the recipe") -> Recipe:
    """Validate ``values``; the first problem becomes one clear UsageError naming the key and the nearest known one."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _keys_at(tuple(p for p in first["loc"][:-1] if isinstance(p, str)))
            close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
            homes = [key for key in _all_keys(Recipe) if key.split(".")[-1] == first["loc"][-1]]
            hint = f"Did you mean '{close[0]}'? " if close else ""
            hint = f"It is a key of a section: {', '.join(homes)}. " if homes else hint
            hint += f"Known keys there: {', '.join(known)}."
            raise UsageError(f"Unknown key '{where}' in {source}.", hint) from error
        message = error_text(first)[:LONGEST_MESSAGE]
        # A section's own check names the setting and its value.
        found = "" if isinstance(first["input"], dict) else f" (found {_short(first['input'])})"
        place = f"{where} in {source}" if where else source
        raise UsageError(f"{place}: {message}{found}.") from error


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def load_recipe(source: str | Path | None, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe (a YAML file or a bundled name; None: all defaults) and apply ``overrides`` (dotted keys)."""
    values: dict[str, Any] = {}
    if source is not None:
        path = recipe_file(source)
        text = read_text(path, limit=YAML_BYTES, error=UsageError)
        read = parse_yaml(text, str(path), error=UsageError)
        if read is not None and not isinstance(read, dict):
            raise UsageError(f"{path} holds a {type(read).__name__}, not keys and values.")
        values = read or {}
        first = text.split("\n", 1)[0]
        if first.startswith(START):
            values = placed(values, Path(first.removeprefix(START)))
    return recipe_over(values, overrides or {}, "the options" if source is None else path.name)


def placed(values: dict[str, Any], start: Path) -> dict[str, Any]:
    """Return a recipe's values; relative paths that lead somewhere from ``start`` lead there from here."""
    if start == Path.cwd():
        return values

    def there(text: Any) -> Any:
        found = isinstance(text, str) and text and (start / text).exists()
        return str(start / text) if found else text

    def lora(text: Any) -> Any:
        file, colon, scale = str(text).rpartition(":")
        return there(text) if there(text) != text or not colon else f"{there(file)}:{scale}"

    chosen = {key: there(value) for key, value in values.items() if key in PATHS}
    if values.get("model") in BUNDLED:
        chosen["model"] = values["model"]
    if str(values.get("target")).endswith(".yaml"):
        chosen["target"] = there(values["target"])
    if isinstance(values.get("lora"), list):
        chosen["lora"] = [lora(one) for one in values["lora"]]
    section = values.get("allocate")
    if isinstance(section, dict) and "latency_table" in section:
        chosen["allocate"] = {**section, "latency_table": there(section["latency_table"])}
    return {**values, **chosen}


def recipe_over(values: dict[str, Any], overrides: dict[str, Any], source: str) -> Recipe:
    """Return the recipe of ``values`` with ``overrides`` (dotted keys; None: not given) laid over them."""
    for dotted, value in overrides.items():
        if value is None:
            continue
        place = values
        *parents, last = dotted.split(".")
        for parent in parents:
            if not isinstance(place.setdefault(parent, {}), dict):
                break
            place = place[parent]
        else:
            place[last] = value
    return make_recipe(values, source)


def recipe_file(source: str | Path) -> Path:
    """Return the file of a bundled recipe's name, or the given file; UsageError where there is neither."""
    bundled = bundled_recipes()
    if isinstance(source, str) and source in bundled:
        return bundled[source]
    path = Path(_home(str(source)))
    with suppress(OSError, ValueError):
        # The name may be any text: too long for a path, or with a NUL character.
        if path.exists():
            return path
    hint = f"{nearest(path.stem, bundled)}Give a YAML file, or one of {', '.join(bundled)}."
    raise UsageError(f"There is no recipe '{source}'.", hint)


def bundled_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name (``recipes/`` of the source tree)."""
    package = Path(str(resources.files("mpq_deploy")))
    folders = (package / "recipe_files", package.parent / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def recipe_heading(path: Path) -> list[str]:
    """Return the lines of the comment that a recipe begins with, without their #."""
    lines = path.read_text(encoding="utf-8").splitlines()
    heading = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return [line.removeprefix("#").strip() for line in heading]


def _all_keys(section: type[Section], place: str = "") -> Iterator[str]:
    """Yield the dotted name of every key."""
    for name, field in section.model_fields.items():
        yield f"{place}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _all_keys(field.annotation, f"{place}{name}.")


def _keys_at(path: tuple[str, ...]) -> list[str]:
    model: Any = Recipe
    for name in path:
        annotation = model.model_fields[name].annotation
        nested = [annotation, *get_args(annotation)]
        model = next((a for a in nested if isinstance(a, type) and issubclass(a, BaseModel)), model)
    return list(model.model_fields)
