"""What an error of the denoiser's output does to the next sample: the bookkeeping behind taking variance out of noise.

In: the prediction type and the signal powers (alpha-bar) of a step. Out: d x_{t-1} / d output. An error of variance v
that is uncorrelated with the sample adds (d x_{t-1} / d output)^2 v to the variance of x_{t-1}; so much is taken out of
the sampler's own noise.

With x_0 predicted from the output m at power p (diffusers' three prediction types):

    epsilon       x_0 = (x - sqrt(1-p) m) / sqrt(p)         epsilon = m
    sample        x_0 = m                                   epsilon = (x - sqrt(p) m) / sqrt(1-p)
    v_prediction  x_0 = sqrt(p) x - sqrt(1-p) m             epsilon = sqrt(p) m + sqrt(1-p) x

PTQD (arXiv 2305.10657) treats epsilon: for DDPM (d x_{t-1} / d epsilon)^2 = beta^2 / (alpha (1 - p)), for DDIM
(sqrt(1 - p_prev - sigma^2) - sqrt(p_prev (1-p) / p))^2, as in the authors' code. The other two types are our extension:
the same derivative through the table above.
"""

from __future__ import annotations

import math

from mpq_deploy.errors import UsageError, nearest

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def clean_slope(prediction_type: str, power: float) -> float:
    """Return d x_0 / d output at signal power ``power``. Raises UsageError for another prediction type."""
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
    """Return d epsilon / d output. From x = sqrt(p) x_0 + sqrt(1-p) epsilon at fixed x, for every prediction type."""
    if prediction_type == "epsilon":
        return 1.0
    return -math.sqrt(power / (1 - power)) * clean_slope(prediction_type, power)


def ddpm_effect(prediction_type: str, power: float, previous: float) -> float:
    """Return d x_{t-1} / d output of DDPM's posterior mean (Ho et al. 2020, equation 7)."""
    beta = 1 - power / previous
    return math.sqrt(previous) * beta / (1 - power) * clean_slope(prediction_type, power)


def ddim_effect(prediction_type: str, power: float, previous: float, sigma: float) -> tuple[float, float]:
    """Return d x_{t-1} / d output of DDIM (Song et al. 2021, equation 12), through x_0 and through epsilon.

    Their sum is the effect; they are apart because clipping x_0 stops the first.
    """
    direction = math.sqrt(max(1 - previous - sigma**2, 0.0))
    through_clean = math.sqrt(previous) * clean_slope(prediction_type, power)
    return through_clean, direction * noise_slope(prediction_type, power)
