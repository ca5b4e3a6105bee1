"""A diffusers scheduler with PTQD's correction in front of it.

Every scheduler gets the corrected output. A scheduler that adds noise and lets its variance be
reached (DDPM; DDIM with eta > 0) adds less of it, by the variance that the residual has brought
into the sample already; ``variance_note`` says whether this one does. Needs torch and diffusers,
which are imported with the first step.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.runtime.correction import Correction, StepCorrection

# With x_0 predicted from the output m at signal power p (alpha-bar), by diffusers' prediction
# types:   epsilon       x_0 = (x - sqrt(1-p) m) / sqrt(p)      epsilon = m   sample        x_0 = m
# epsilon = (x - sqrt(p) m) / sqrt(1-p)   v_prediction  x_0 = sqrt(p) x - sqrt(1-p) m
# epsilon = sqrt(p) m + sqrt(1-p) x An error of variance v that is uncorrelated with the sample adds
# (d x_{t-1} / d output)^2 v to the variance of x_{t-1}. PTQD treats epsilon: for DDPM (d x_{t-1} /
# d epsilon)^2 = beta^2 / (alpha (1 - p)), for DDIM (sqrt(1 - p_prev - sigma^2) - sqrt(p_prev (1-p)
# / p))^2, as in the authors' code. The same derivative for the other two types is our extension.
PREDICTIONS = ("epsilon", "sample", "v_prediction")
DDPM = ("DDPMScheduler", "DDPMParallelScheduler")
DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
# What DDPM's _get_variance returns, by variance_type: the variance, its root, or its logarithm.
# (fixed_large_log is left out: diffusers takes the root of a logarithm there.)
VARIANCE_FORMS = {
    "fixed_small": "variance",
    "fixed_large": "variance",
    "learned": "variance",
    "fixed_small_log": "root",
    "learned_range": "logarithm",
}
_OWN = frozenset(
    {"correction", "last_step", "variance_note", "_scheduler", "_reach", "_residual_factor"}
)


@dataclass(frozen=True)
class StepNote:
    """What one step did.

    ``noise_share``: the residual's part of the noise's variance, mean over elements, before it is
    cut at 1; 0 where no noise was reached.
    """

    timestep: float
    slope: float
    noise_share: float


class CorrectedScheduler:
    """Any diffusers scheduler with ``step`` corrected; all else is the wrapped scheduler's.

    The output is corrected as PTQD does, for any prediction type and sampler. [paper] The
    residual's variance comes out of the noise of DDPM and of DDIM with eta > 0, cut at 0, for
    epsilon prediction. [ours] The same for v and sample prediction (``PREDICTIONS``); where x_0 is
    clipped, the residual's way through it is closed and takes nothing out; DDIM's mean keeps its
    sigma (the authors' code also puts the reduced sigma into the direction term).

    ``guidance_scale`` w is what the pipeline guides with. The correction is fitted on single calls;
    the guided output (1 - w) u + w c has the same k and b, because the weights add up to 1, and a
    residual of variance (1-w)^2 + w^2 + 2 w (1-w) rho = 1 + 2 w (w - 1) (1 - rho) times that of one
    call, where rho is the correlation of the two calls' residuals. rho is not measured:
    ``residual_correlation`` 1, the default, takes the minimum out of the noise (for w > 1). [ours]
    A guidance rescale after guidance is not linear: correct before it, with ``Correction.apply``.

    Raises UsageError for a scheduler of another prediction type, or rho outside [-1, 1].
    """

    def __init__(
        self,
        scheduler: Any,
        correction: Correction,
        *,
        guidance_scale: float = 1.0,
        residual_correlation: float = 1.0,
    ) -> None:
        predicts = scheduler.config.get("prediction_type")
        if predicts is not None and predicts != correction.prediction_type:
            raise UsageError(
                f"The scheduler expects {predicts}, but the correction is for a model that predicts "
                f"{correction.prediction_type}.",
                "Set the scheduler's prediction_type to the model's.",
            )
        if not -1 <= residual_correlation <= 1:
            raise UsageError(
                f"residual_correlation is {residual_correlation}.", "Give one from -1 to 1."
            )
        self._scheduler = scheduler
        self.correction = correction
        self.last_step: StepNote | None = None
        self._residual_factor = 1 + 2 * guidance_scale * (guidance_scale - 1) * (
            1 - residual_correlation
        )
        self._reach, self.variance_note = _reach(scheduler)

    def __getattr__(self, name: str) -> Any:
        # Copying asks for special names before there is a wrapped scheduler.
        if name.startswith("__") or name == "_scheduler":
            raise AttributeError(name)
        return getattr(self._scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._scheduler, name, value)

    def __len__(self) -> int:
        return len(self._scheduler)

    def __repr__(self) -> str:
        return f"CorrectedScheduler({self._scheduler!r})"

    @property
    def step(self) -> Callable[..., Any]:
        """The wrapped scheduler's ``step``, corrected, with the same parameters."""

        @functools.wraps(self._scheduler.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            return self._step(*args, **kwargs)

        return step

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self._scheduler.step).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        timestep = _one_timestep(given["timestep"])
        at = self.correction.at(timestep)
        given["model_output"] = self._corrected(given["model_output"], at)
        variance = at.error_variance * self._residual_factor
        share = 0.0
        if variance > 0 and self._reach is not None:
            result, share = self._reach(self._scheduler, bound, self.correction, variance)
        else:
            result = self._scheduler.step(*bound.args, **bound.kwargs)
        self.last_step = StepNote(timestep, at.slope, share)
        return result

    def _corrected(self, output: Any, at: StepCorrection) -> Any:
        """Return (m_q - b) / (1 + k) in the output's type, by float32; [N, C or 2C, ...]."""
        import torch

        self.correction.check_channels(output.shape[1])
        if not at.changes_output:
            return output
        channels = self.correction.channels
        wide = torch.promote_types(output.dtype, torch.float32)
        bias = torch.as_tensor(at.bias, dtype=wide, device=output.device).reshape(
            -1, *[1] * (output.ndim - 2)
        )
        mean = ((output[:, :channels].to(wide) - bias) / (1 + at.slope)).to(output.dtype)
        return (
            torch.cat([mean, output[:, channels:]], dim=1) if output.shape[1] > channels else mean
        )


Reach = Callable[[Any, inspect.BoundArguments, Correction, float], tuple[Any, float]]


def _reach(scheduler: Any) -> tuple[Reach | None, str]:
    """Return how the noise of ``scheduler`` is reduced (None: not at all), and that in words."""
    name, config = type(scheduler).__name__, scheduler.config
    if name not in (*DDPM, *DDIM):
        return None, f"slope and bias only: {name} adds no noise, or none that can be changed"
    if config.prediction_type not in PREDICTIONS:
        return None, f"slope and bias only: the prediction type is {config.prediction_type}"
    if config.thresholding:
        return None, "slope and bias only: dynamic thresholding is not linear in the output"
    if name in DDIM:
        return (
            _ddim_step,
            f"slope and bias; where eta > 0 the residual's variance comes out of {name}'s noise",
        )
    if config.variance_type not in VARIANCE_FORMS:
        return None, f"slope and bias only: {name} with variance_type {config.variance_type}"
    return _ddpm_step, f"slope and bias; the residual's variance comes out of {name}'s noise"


def _one_timestep(timestep: Any) -> float:
    import torch

    values = torch.as_tensor(timestep).flatten()
    if not len(values) or bool((values != values[0]).any()):
        raise UsageError(
            f"One step was called with {len(values)} different timesteps.",
            "Call step once per timestep.",
        )
    return float(values[0])


def _ddpm_step(
    scheduler: Any, bound: inspect.BoundArguments, correction: Correction, variance: float
) -> Any:
    """Take a DDPM step with the residual's variance out of its noise; return it and that share."""
    import torch

    given = bound.arguments
    timestep = int(given["timestep"])
    if timestep == 0:
        return scheduler.step(*bound.args, **bound.kwargs), 0.0
    before = scheduler.previous_timestep(timestep)
    power = float(scheduler.alphas_cumprod[timestep])
    previous = float(scheduler.alphas_cumprod[before] if before >= 0 else scheduler.one)
    effect = ddpm_effect(scheduler.config.prediction_type, power, previous)
    brought = effect**2 * variance * _unclipped(scheduler, given, correction, power)
    form, original = VARIANCE_FORMS[scheduler.config.variance_type], scheduler._get_variance
    shares: list[float] = []

    def reduced(*args: Any, **kwargs: Any) -> Any:
        value = original(*args, **kwargs)
        own = {"variance": lambda x: x, "root": torch.square, "logarithm": torch.exp}[form](value)
        shares.append(float((brought / own).mean()))
        left = torch.clamp(own - brought, min=0)
        return {"variance": lambda x: x, "root": torch.sqrt, "logarithm": torch.log}[form](left)

    # The instance's attribute hides the method in this step; DDPM reads its variance only there.
    scheduler._get_variance = reduced
    try:
        return scheduler.step(*bound.args, **bound.kwargs), shares[0] if shares else 0.0
    finally:
        del scheduler._get_variance


def _ddim_step(
    scheduler: Any, bound: inspect.BoundArguments, correction: Correction, variance: float
) -> Any:
    """Take a DDIM step, its noise reduced by the residual's variance; return it and that share."""
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    given = bound.arguments
    timestep, eta = int(given["timestep"]), float(given["eta"])
    before = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    sigma = eta * float(scheduler._get_variance(timestep, before)) ** 0.5
    if sigma == 0:
        return scheduler.step(*bound.args, **bound.kwargs), 0.0
    power = float(scheduler.alphas_cumprod[timestep])
    previous = float(
        scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    )
    clean, noise = ddim_effect(scheduler.config.prediction_type, power, previous, sigma)
    open_ = _unclipped(scheduler, given, correction, power)
    effect = (clean + noise) * open_ if given["use_clipped_model_output"] else clean * open_ + noise
    share = torch.as_tensor(effect**2 * variance / sigma**2)
    drawn = given["variance_noise"]
    if drawn is None:
        output = given["model_output"]
        drawn = randn_tensor(
            output.shape, generator=given["generator"], device=output.device, dtype=output.dtype
        )
    given["variance_noise"] = drawn * torch.sqrt(torch.clamp(1 - share, min=0)).to(drawn)
    given["generator"] = None
    return scheduler.step(*bound.args, **bound.kwargs), float(share.mean())


def _unclipped(scheduler: Any, given: dict[str, Any], correction: Correction, power: float) -> Any:
    """Return 1.0, or [N, C, ...] with 0 where the scheduler clips the predicted x_0."""
    if not scheduler.config.clip_sample:
        return 1.0
    output, x = given["model_output"][:, : correction.channels], given["sample"]
    signal, noise = power**0.5, (1 - power) ** 0.5
    if scheduler.config.prediction_type == "epsilon":
        clean = (x - noise * output) / signal
    else:
        clean = (
            output if scheduler.config.prediction_type == "sample" else signal * x - noise * output
        )
    return (clean.abs() <= scheduler.config.clip_sample_range).to(x.dtype)


def clean_slope(prediction_type: str, power: float) -> float:
    """Return d x_0 / d output at signal power ``power``. Raises UsageError if unknown."""
    if prediction_type == "epsilon":
        return -math.sqrt((1 - power) / power)
    if prediction_type == "sample":
        return 1.0
    if prediction_type == "v_prediction":
        return -math.sqrt(1 - power)
    raise UsageError(
        f"The residual's effect is not known for the prediction type '{prediction_type}'.",
        f"{nearest(prediction_type, PREDICTIONS)}Known: {', '.join(PREDICTIONS)}.",
    )


def noise_slope(prediction_type: str, power: float) -> float:
    """Return d epsilon / d output, from x = sqrt(p) x_0 + sqrt(1-p) epsilon at fixed x."""
    if prediction_type == "epsilon":
        return 1.0
    return -math.sqrt(power / (1 - power)) * clean_slope(prediction_type, power)


def ddpm_effect(prediction_type: str, power: float, previous: float) -> float:
    """Return d x_{t-1} / d output of DDPM's posterior mean (Ho et al. 2020, equation 7)."""
    beta = 1 - power / previous
    return math.sqrt(previous) * beta / (1 - power) * clean_slope(prediction_type, power)


def ddim_effect(
    prediction_type: str, power: float, previous: float, sigma: float
) -> tuple[float, float]:
    """Return d x_{t-1} / d output of DDIM (Song et al. 2021, eq. 12), through x_0 and epsilon.

    Their sum is the effect; they are apart because clipping x_0 stops the first.
    """
    direction = math.sqrt(max(1 - previous - sigma**2, 0.0))
    through_clean = math.sqrt(previous) * clean_slope(prediction_type, power)
    return through_clean, direction * noise_slope(prediction_type, power)
