"""Find mistakes in a recipe that need neither the model nor a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.engine.target import RTX, Target, builder_present, load_target
from mpq_deploy.errors import MissingDependencyError, UsageError
from mpq_deploy.formats.fp8 import FP8_SCHEME
from mpq_deploy.graph.layers import Layer
from mpq_deploy.latency.plan_latency import check_latency
from mpq_deploy.rounding.candidate_store import wanted_schemes
from mpq_deploy.run.folder import MARKER
from mpq_deploy.sensitivity.chosen_method import AUTO
from mpq_deploy.sensitivity.methods import METHODS

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse a run as model, an unknown target, and options that contradict each other."""
    if recipe.model and (Path(recipe.model) / MARKER).is_file():
        hint = f"To go on with it: mpq-deploy build -o {recipe.model}"
        raise UsageError(f"{recipe.model} is a run folder, not a model.", hint)
    target = load_target(recipe.target)
    if recipe.engine.build and target.builder == RTX and not builder_present(target):
        raise MissingDependencyError(
            "tensorrt-rtx", "rtx", f"Building an engine for '{target.name}'"
        )
    _check_schemes(recipe, target)
    _check_attention(recipe, target)
    _check_sizes(recipe)
    _check_tail(recipe)
    check_latency(recipe, target)
    if recipe.measure.method == "orm" or recipe.measure.sampling == "adaptive":
        check_timesteps(recipe)
    if recipe.evaluate.seed == recipe.calibrate.seed:
        raise UsageError(
            f"evaluate.seed and calibrate.seed are both {recipe.evaluate.seed}.",
            "Give them different seeds: evaluate on noise that calibration has not used.",
        )


def _check_schemes(recipe: Recipe, target: Target) -> None:
    """Refuse a simulated scheme where bytes are real, and schemes that the target never takes."""
    schemes = [scheme for scheme in wanted_schemes(recipe) if scheme.quantized]
    families = {family for families in target.schemes.values() for family in families}
    accepted = [scheme for scheme in schemes if scheme.family in families]
    strict = target.simulated or not accepted
    # FP8 and FP4 are candidates by themselves where the target lists them: here they were named.
    named = (s for s in schemes if s not in accepted)
    refused = (s for s in named if s.simulated or s.weight.generation or strict)
    wrong = next(refused, None)
    if wrong is not None:
        reason = target.refusal(Layer("any", "MatMul", "any", (64, 64), 1, 1, ()), wrong)
        raise UsageError(
            f"The target {target.name} does not take '{wrong.name}' (allocate.schemes): {reason}.",
            "Leave it out."
            if wrong.weight.generation
            else "Simulated schemes are for --target simulate, deployable ones for the other targets.",
        )


def _check_attention(recipe: Recipe, target: Target) -> None:
    """Refuse attention in FP8 where it cannot be built, measured, or kept."""
    if recipe.allocate.attention == "fp16":
        return
    if FP8_SCHEME not in target.schemes["MatMul"]:
        raise UsageError(
            f"allocate.attention is fp8, and the target {target.name} has no FP8 products.",
            "Choose a target of GPUs that have them (rtx-ada, rtx-blackwell, jetson-thor), or leave attention at fp16.",
        )
    probed = recipe.measure.method == AUTO or METHODS[recipe.measure.method].probes
    if not probed or recipe.recover.steps:
        what = (
            f"measure.method is {recipe.measure.method}"
            if not probed
            else f"recover.steps is {recipe.recover.steps}"
        )
        raise UsageError(
            f"allocate.attention is fp8, and {what}: attention in FP8 is measured by probes and not trained.",
            "Leave out one of them.",
        )


def _check_sizes(recipe: Recipe) -> None:
    """Refuse what is made for one size alone beside several."""
    alone = {
        "recover.steps": recipe.recover.steps,
        "evaluate.correction": recipe.evaluate.correction != "none",
        "--calls": recipe.calls,
    }
    given = next((name for name, value in alone.items() if value), "")
    if len(recipe.sizes) > recipe.calibrate.samples:
        raise UsageError(
            f"calibrate.samples is {recipe.calibrate.samples}, and {len(recipe.sizes)} sizes are given (--sizes).",
            "Calibrate on at least one sample of each.",
        )
    if len(recipe.sizes) > 1 and given:
        raise UsageError(
            f"{given} is for one size, and {len(recipe.sizes)} are given (--sizes).",
            "Leave one of them out.",
        )


def _check_tail(recipe: Recipe) -> None:
    """Refuse a share of the worst images where no images are measured."""
    method = recipe.measure.method
    if recipe.allocate.tail is None:
        return
    if method == AUTO or not METHODS[method].images:
        # What auto stands for may change with a count, and with it what the plan is for.
        known = "final images may not be" if method == AUTO else "no final images are"
        raise UsageError(
            f"allocate.tail is {recipe.allocate.tail:g}, but measure.method is {method}: {known} measured.",
            "Set measure.method to trajectory, or leave allocate.tail out.",
        )


def check_timesteps(recipe: Recipe) -> None:
    """Refuse more timesteps than there are, for methods whose K must not quietly shrink."""
    steps, calibrated = recipe.calibrate.steps, recipe.calibrate.timesteps
    counts = {"measure.timesteps": recipe.measure.timesteps}
    if recipe.measure.sampling == "adaptive":
        counts["measure.coarse_timesteps"] = recipe.measure.coarse_timesteps
    for key, count in counts.items():
        if count > steps:
            raise UsageError(
                f"{key} is {count}, but the sampler takes only {steps} steps (calibrate.steps).",
                f"Choose at most {steps} timesteps, or more steps.",
            )
        if count > calibrated:
            raise UsageError(
                f"{key} is {count}, but only {calibrated} timesteps are calibrated (calibrate.timesteps).",
                f"Choose at most {calibrated}, or calibrate at more.",
            )
