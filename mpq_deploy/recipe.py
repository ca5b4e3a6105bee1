"""The recipe: everything a user may set, validated once. From a YAML file, command-line options, or Python."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mpq_deploy.errors import UsageError
from mpq_deploy.formats.scheme import schemes_named

# What the target simulate chooses from unless the recipe says otherwise: few enough to measure quickly (our choice).
SIMULATED_DEFAULT = ("fp16", *(f"w{bits}a{a}-sim" for bits in (2, 3, 4, 5, 6, 8) for a in (8, 16)))


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrateSection(Section):
    """Which inputs the float model is observed on, and how activation scales are chosen."""

    timesteps: int = Field(20, ge=1, description="K: timesteps, midpoints of equal strides of the sampler's steps")
    samples: int = Field(160, ge=1, description="trajectories")
    observed: int = Field(48, ge=1, description="of the recorded calls, those that activations are observed on")
    steps: int = Field(20, ge=1, description="steps of the sampler")
    batch_size: int = Field(16, ge=1, description="samples per call")
    seed: int = Field(1, description="of the noise that trajectories start from")
    scale: Literal["mse", "percentile", "absmax"] = Field(
        "mse", description="how INT8 scales of activations are chosen"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="of absolute values, for scale percentile")
    reservoir: int = Field(8192, ge=256, description="values kept per activation for choosing its scale")


class OrmSection(Section):
    """MPQ-Diff's importance of layers: settings of the method "orm" and of its controls."""

    beta: float = Field(1.0, ge=0, allow_inf_nan=False, description="theta = exp(-beta gamma), gamma in [0, 1]")
    estimator: Literal["biased", "debiased"] = Field("biased", description="of linear CKA between two layers' outputs")
    aggregation: Literal["mean", "exponential"] = Field("mean", description="of theta over timesteps")
    eta: float = Field(1.0, allow_inf_nan=False, description="growth of exponential weights in denoising order")
    importance: Literal["layer", "later"] = Field("layer", description="later: mean over a layer and all later ones")
    bits: Literal["nominal", "deployed"] = Field("nominal", description="deployed: scales count as bits")
    activation_bits: Literal["int8", "programme", "fp16"] = Field(
        "int8", description="of every layer that may have them; programme: by a second one"
    )
    activation_budget: float = Field(12.0, ge=8, le=16, description="bits per activation element, for programme")


class MeasureSection(Section):
    """How the loss of every (layer, scheme) is predicted."""

    method: Literal["probe", "gain", "local_error", "exhaustive", "kurtosis", "orm", "size-only", "random"] = Field(
        "probe", description="sensitivity: what the solver's losses are"
    )
    probes: int = Field(4, ge=1, description="random directions per call, for probe")
    timesteps: int = Field(20, ge=1, description="of the calibrated timesteps, those that are measured")
    samples: int = Field(128, ge=1, description="calibration samples kept from rounding and measured on")
    calls: int = Field(24, ge=1, description="of these samples, those measured at each timestep; others at the next")
    batch_size: int = Field(16, ge=1, description="samples per call")
    seed: int = Field(2, description="of probes, noise and random losses")
    sampling: Literal["uniform", "adaptive"] = Field(
        "uniform", description="adaptive: more timesteps where the layers' importance (ORM) changes fastest"
    )
    coarse_timesteps: int = Field(5, ge=2, description="of the first pass that adaptive sampling follows")
    orm: OrmSection = OrmSection()


class ProtectRule(Section):
    """Layers whose name matches ``layers`` (shell pattern) may only take ``schemes``."""

    layers: str = Field(description="shell pattern of layer names, such as up_blocks.*")
    schemes: tuple[str, ...] = Field(description="what those layers may take")

    @field_validator("schemes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        _check_schemes(names)
        return names


class AllocateSection(Section):
    """What the solver may choose from."""

    schemes: tuple[str, ...] = Field(
        ("fp16", "w8a8", "w8a16", "w4a16", "w4a8"), description="what a layer may take, where the target takes it"
    )
    branches: tuple[Literal["rows", "cols", "lowrank", "scale", "omq", "zres"], ...] = Field(
        ("rows",),
        description="what may stand beside a quantized body, where the target takes it; omq and zres: simulated alone",
    )
    branch_charge: float = Field(
        0.002, ge=0, description="share of the plan's loss that each kernel of a branch must take off to be worth it"
    )
    cross_terms: bool = Field(True, description="refine the plan with the cross terms between layers, where that helps")
    objective: Literal["loss", "latency"] = Field("loss", description="what is least, within the budget")
    max_latency: str | None = Field(
        None, description="of one call at engine.batch_opt: 120ms; a limit beside the budget"
    )
    max_loss: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="with objective latency: limit on the sum of the predicted losses"
    )
    latency_table: str | None = Field(None, description="file of 'mpq-deploy profile'; what it lacks is estimated")
    protect: tuple[ProtectRule, ...] = Field((), description="layers that may only take some schemes")
    gap: float = Field(1e-4, ge=0, lt=1, description="relative gap at which the solver may stop")
    time_limit: float = Field(60.0, gt=0, description="seconds")

    @field_validator("schemes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        _check_schemes(names)
        return names


class QuantizeSection(Section):
    """How weights are rounded."""

    rounding: Literal["gptq", "nearest"] = Field("gptq", description="nearest: for comparing")
    noise_draws: int = Field(
        3, ge=0, description="fresh noises per recorded sample behind the Hessians; 0: the trajectories themselves"
    )
    damping: float = Field(0.05, gt=0, description="added to each diagonal element of the Hessian, as a share of it")
    salience: Literal["probe", "kurtosis"] = Field(
        "probe", description="which output channels a rows branch promotes first"
    )
    refinements: int = Field(2, ge=0, description="after GPTQ, rounds of fitting INT4 scales and revisiting codes")
    hessian_rows: int = Field(8192, ge=64, description="input vectors per layer behind its Hessian, at least 4 K")
    hessian_width: int = Field(4096, ge=64, description="beyond this width the Hessian is block-diagonal")
    memory_mb: int = Field(512, ge=16, description="cap on the Hessians held at once")


# Updates where recovery is asked for without a number: ``build --recover``.
RECOVER_STEPS = 2050


class RecoverSection(Section):
    """How the plan's model is trained back towards the float one; ``steps`` 0: not at all."""

    steps: int = Field(0, ge=0, description="updates; 0: recovery is off")
    batch_size: int = Field(16, ge=1, description="samples per update")
    trajectories: int = Field(80, ge=1, description="float trajectories to learn from, recorded anew every round")
    round_steps: int = Field(100, ge=1, description="updates per round")
    replay: int = Field(6, ge=1, description="rounds, the present one included, whose trajectories are drawn from")
    held_out: int = Field(32, ge=1, description="trajectories never trained on: they decide which state is kept")
    check_every: int = Field(200, ge=1, description="updates between measurements on them, each with a checkpoint")
    rank: int = Field(0, ge=0, description="of the low-rank adapters, at most; 0: full, for what memory allows")
    margin: float = Field(0.0, ge=0, le=0.499, description="how far a latent weight may start off its code, in steps")
    initialization: Literal["zero", "svd"] = Field("zero", description="of the adapters; svd: our reading of MPQ-DMv2")
    losses: dict[Literal["output", "eps", "v", "sample", "relation", "memory"], float] = Field(
        {"output": 1.0}, description="what is matched, with weights"
    )
    timesteps: Literal["uniform", "sensitivity"] = Field(
        "sensitivity", description="which are drawn more often: all alike, or where the plan's error is larger"
    )
    # Learning rates for a plan whose NMSE is 1e-3 or more; below they follow the root of the measured one.
    adapter_rate: float = Field(45.0, ge=0, description="learning rate, in units of the layer's weight step / 2500")
    scale_rate: float = Field(0.0015, ge=0, description="learning rate of the logarithms of scales")
    constant_rate: float = Field(0.0015, ge=0, description="learning rate of FP16 constants, in units of their rms")
    warmup: int = Field(10, ge=0, description="updates")
    segments: int = Field(1, ge=1, description="of the graph, computed again in the backward pass to save memory")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of training; auto: bfloat16 on a GPU that has it"
    )
    relation_pixels: int = Field(
        256, ge=1, description="most pixels of a map in the relation loss: a grid of larger ones"
    )
    memory_size: int = Field(20000, ge=1, description="pixels in the memory loss's ring buffer")
    memory_pixels: int = Field(128, ge=1, description="pixels compared and then remembered at each update")
    memory_anchors: int = Field(4096, ge=1, description="remembered pixels that they are compared with")
    seed: int = Field(4, ge=0, description="of batches and noise")


class EngineSection(Section):
    """How the engine is built."""

    build: bool = Field(True, description="false: no engine, all else")
    batch_min: int = Field(1, ge=1, description="smallest batch that the engine takes")
    batch_opt: int = Field(2, ge=1, description="batch that it is tuned for")
    batch_max: int = Field(8, ge=1, description="largest batch")


class EvaluateSection(Section):
    """How the quantized model is compared with the float one."""

    samples: int = Field(32, ge=1, description="images compared with the float model's")
    steps: int = Field(20, ge=1, description="steps of the sampler")
    timesteps: int = Field(20, ge=1, description="at which the error of the output is measured")
    calls: int = Field(
        8, ge=1, description="measured at each of them; others at the next, and every image at least once"
    )
    batch_size: int = Field(16, ge=1, description="samples per call")
    seed: int = Field(1234, description="of the noise; not that of calibration")
    sampler: Literal["auto", "ddim", "folder"] = Field(
        "auto", description="auto: the built-in DDIM for DDIM and DDPM, else the folder's own class"
    )
    controls: bool = Field(True, description="also everything INT8 and everything INT4")
    correction: Literal["none", "ptqd"] = Field("none", description="ptqd: also sample with the output corrected")
    correction_bias: Literal["channel", "scalar"] = Field("channel", description="one bias per channel, or one")


class Recipe(Section):
    """All settings of a run. ``model`` None is the bundled demo."""

    model: str | None = Field(None, description="folder, ONNX file, hub id or bundled name; null: emoji")
    budget: str = Field(
        "0.35", description="of all constants: share of FP16, a size (600MB), or bits per weight (4.5bits)"
    )
    target: str = Field("rtx", description="name of a shipped target, or a YAML file")
    description: str | None = Field(None, description="YAML of an ONNX model, when it does not lie beside it")
    conditions: str | None = Field(None, description=".npz: arrays by input name, one row per condition")
    scheduler: str | None = Field(None, description="scheduler_config.json, or the folder that holds it")
    prompts: str | None = Field(None, description="text file, one prompt per line")
    component: str | None = Field(
        None, description="part of a pipeline: unet, transformer, vae, text_encoder ...; None: the one that denoises"
    )
    component_samples: int = Field(64, ge=8, description="inputs that a vae is calibrated and compared with")
    guidance_scale: float | None = Field(None, description="classifier-free guidance; None: the model's own")
    first_token: Literal["quantized", "precomputed"] = Field(
        "quantized",
        description="of a text in cross-attention; precomputed: its keys and values are FP16 constants (MixDQ)",
    )
    calibrate: CalibrateSection = CalibrateSection()
    measure: MeasureSection = MeasureSection()
    allocate: AllocateSection = AllocateSection()
    quantize: QuantizeSection = QuantizeSection()
    recover: RecoverSection = RecoverSection()
    engine: EngineSection = EngineSection()
    evaluate: EvaluateSection = EvaluateSection()

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

    @field_validator("budget", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> str:
        return str(value)

    def to_yaml(self) -> str:
        """Return the whole recipe, every default written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


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
            hint = f"Did you mean '{close[0]}'? " if close else ""
            hint += f"Known keys there: {', '.join(known)}."
            raise UsageError(f"Unknown key '{where}' in {source}.", hint) from error
        message = str(first["msg"]).removeprefix("Value error, ")
        raise UsageError(f"{where} in {source}: {message} (found {first['input']!r}).") from error


def load_recipe(path: Path | None, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file (None: all defaults) and lay ``overrides`` (dotted keys) over it."""
    values: dict[str, Any] = {}
    source = "the options"
    if path is not None:
        source = path.name
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"There is no recipe {path}.", "Give the path of a YAML file.") from error
        except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
            raise UsageError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
        if read is not None and not isinstance(read, dict):
            raise UsageError(f"{path} holds a {type(read).__name__}, not keys and values.")
        values = read or {}
    for dotted, value in (overrides or {}).items():
        if value is None:
            continue
        place = values
        *parents, last = dotted.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return make_recipe(values, source)


def _keys_at(path: tuple[str, ...]) -> list[str]:
    model: Any = Recipe
    for name in path:
        annotation = model.model_fields[name].annotation
        nested = [annotation, *get_args(annotation)]
        model = next((a for a in nested if isinstance(a, type) and issubclass(a, BaseModel)), model)
    return list(model.model_fields)
