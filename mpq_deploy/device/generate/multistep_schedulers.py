"""DPM-Solver++ and UniPC in NumPy, as diffusers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mpq_deploy.device.generate.noise_schedule import (
    Array,
    converted_sigmas,
    products_of,
    rounded,
    shifted,
    sigma_to_timestep,
    sigmas_of,
    spaced_timesteps,
    stretched_to,
    thresholded,
)
from mpq_deploy.device.generate.scheduler_base import (
    CONVERTED,
    DIFFUSION,
    THRESHOLD,
    Draw,
    Scheduler,
)
from mpq_deploy.errors import InputError

SOLVER: dict[str, Any] = {
    **DIFFUSION,
    **CONVERTED,
    **THRESHOLD,
    "solver_order": 2,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
PREDICTED = ("epsilon", "sample", "v_prediction", "flow_prediction")
# Below so many steps lower_order_final lowers the order of the last ones (diffusers).
FEW_STEPS = 15
FLOW_EPSILON = 1e-6  # what keeps the first flow sigma from 1 (diffusers)


class MultistepScheduler(Scheduler):
    """A solver that remembers the denoiser's last predictions."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.alphas = products_of(self.config)
        self.outputs: list[Array] = []

    def begin(self, index: int) -> None:  # noqa: D102
        super().begin(index)
        self.outputs = []

    def parts(self, index: int) -> tuple[Any, Any, Any]:
        """Return alpha, sigma and log(alpha / sigma) of a variance-preserving sample at a step."""
        sigma = self.sigmas[index]
        if self.config["use_flow_sigmas"]:
            alpha, own = np.float32(1) - sigma, sigma
        else:
            alpha = np.float32(1) / np.sqrt(sigma**2 + np.float32(1))
            own = sigma * alpha
        with np.errstate(divide="ignore"):
            return alpha, own, rounded(np.log, alpha) - rounded(np.log, own)

    def clean(self, output: Array, sample: Array) -> Array:
        """Return the predicted clean sample, thresholded where the settings say so."""
        alpha, sigma, _ = self.parts(self.index)
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            clean = (sample - sigma * output) / alpha
        elif kind == "v_prediction":
            clean = alpha * sample - sigma * output
        elif kind == "flow_prediction":
            clean = sample - self.sigmas[self.index] * output
        else:
            clean = output
        if self.config["thresholding"]:
            ratio = self.config["dynamic_thresholding_ratio"]
            return thresholded(clean, ratio, self.config["sample_max_value"])
        return clean

    def add_noise(self, original: Array, noise: Array) -> Array:  # noqa: D102
        alpha, sigma, _ = self.parts(self.index)
        noisy: Array = alpha * original + sigma * noise
        return noisy


class DPMSolverMultistepScheduler(MultistepScheduler):
    """DPM-Solver++ of order 1 to 3 (Lu et al. 2022), and its SDE form."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **SOLVER,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    }
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prediction_type": PREDICTED,
        "solver_order": (1, 2, 3),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "variance_type": (None,),
        "use_dynamic_shifting": (False,),
    }

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        config, known = self.config, sigmas_of(self.alphas)
        log_known, descending = np.log(known), known[::-1]
        lambdas = np.log(np.sqrt(self.alphas)) - np.log(np.sqrt(np.float32(1) - self.alphas))
        clipped = int(np.searchsorted(lambdas[::-1], config["lambda_min_clipped"]))
        last = config["num_train_timesteps"] - clipped
        timesteps = spaced_timesteps(config, steps, last, more=1).round()
        chosen = None if config["use_lu_lambdas"] else converted_sigmas(config, descending, steps)
        if config["use_karras_sigmas"]:
            chosen = converted_sigmas(config, descending, steps)
        rounds = config["use_karras_sigmas"] or config["use_lu_lambdas"]
        if chosen is None and config["use_lu_lambdas"]:
            logs = float(log_known[-1]), float(log_known[0])
            # Lu et al. have exponent 1: evenly in lambda.
            chosen = np.exp(logs[0] + np.linspace(0, 1, steps) * (logs[1] - logs[0]))
        if chosen is not None:
            timesteps = sigma_to_timestep(chosen, log_known)
            if rounds and config["beta_schedule"] != "squaredcos_cap_v2":
                timesteps = timesteps.round()
        elif config["use_flow_sigmas"]:
            flow = 1.0 - np.linspace(1, 1 / config["num_train_timesteps"], steps + 1)
            chosen = shifted(flow, config["flow_shift"])[::-1][:-1]
            timesteps = chosen * config["num_train_timesteps"]
        else:
            chosen = np.interp(timesteps, np.arange(len(known)), known)
        end = known[0] if config["final_sigmas_type"] == "sigma_min" else 0.0
        self.sigmas = np.concatenate([chosen, [end]]).astype(np.float32)
        self.timesteps = timesteps.astype(np.int64)

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        config, count = self.config, len(self.timesteps)
        few = config["lower_order_final"] and count < FEW_STEPS
        exact = config["euler_at_final"] or few or config["final_sigmas_type"] == "zero"
        self.outputs = [*self.outputs, self.clean(output, sample)][-config["solver_order"] :]
        order = len(self.outputs)
        if self.index == count - 1 and exact:
            order = 1
        elif self.index == count - 2 and few:
            order = min(order, 2)
        result = self._update(sample, order, draw)
        self.index += 1
        return result

    def _update(self, sample: Array, order: int, draw: Draw) -> Array:
        """Return the sample at the next sigma by the last ``order`` predictions."""
        alpha, sigma, after = self.parts(self.index + 1)
        _, own, now = self.parts(self.index)
        h, one, half = after - now, np.float32(1), np.float32(0.5)
        stochastic = self.config["algorithm_type"].startswith("sde")
        # The SDE's integrals are the ODE's at twice the step.
        H = np.float32(2) * h if stochastic else h
        decay = rounded(np.exp, -H)
        fall = one - decay
        scale = sigma / own * rounded(np.exp, -h) if stochastic else sigma / own
        result: Array = scale * sample + (alpha * fall) * self.outputs[-1]
        if order > 1:
            first, second = self._differences(h, now, order)
            # (e^-H - 1) / H + 1 with the signs of each form as diffusers has them.
            slope = alpha * (one - fall / H) if order == 3 or self._heun else half * alpha * fall
            result = result + slope * first
            if second is not None:
                curve = (decay - one + H) / H**2 - half
                if stochastic:
                    curve = -((one - decay - H) / H**2 - half)
                result = result - (alpha * curve) * second
        if stochastic:
            result = result + sigma * np.sqrt(fall) * draw()
        return result

    @property
    def _heun(self) -> bool:
        return bool(self.config["solver_type"] == "heun")

    def _differences(self, h: Any, now: Any, order: int) -> tuple[Array, Array | None]:
        """Return the first and (order 3) second differences of the last predictions."""
        one = np.float32(1)
        before = self.parts(self.index - 1)[2]
        r0 = (now - before) / h
        first: Array = (one / r0) * (self.outputs[-1] - self.outputs[-2])
        if order == 2:
            return first, None
        r1 = (before - self.parts(self.index - 2)[2]) / h
        earlier = (one / r1) * (self.outputs[-2] - self.outputs[-3])
        return first + (r0 / (r0 + r1)) * (first - earlier), (one / (r0 + r1)) * (first - earlier)


class UniPCMultistepScheduler(MultistepScheduler):
    """UniPC (Zhao et al. 2023): a predictor, and a corrector of the sample before it."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **SOLVER,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "shift_terminal": None,
    }
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prediction_type": PREDICTED,
        "solver_order": (1, 2, 3),
        "solver_type": ("bh1", "bh2"),
        "solver_p": (None,),
        "use_dynamic_shifting": (False,),
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if self.config["prediction_type"] == "flow_prediction" and not self.config["predict_x0"]:
            raise InputError("UniPCMultistepScheduler with predict_x0 = False predicts no flow.")
        if self.config["shift_terminal"] and not self.config["use_flow_sigmas"]:
            raise InputError("UniPCMultistepScheduler with shift_terminal needs use_flow_sigmas.")
        self._last: Array | None = None
        self._order = 0

    def begin(self, index: int) -> None:  # noqa: D102
        super().begin(index)
        self._last, self._order = None, 0

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        config, known = self.config, sigmas_of(self.alphas)
        train = config["num_train_timesteps"]
        timesteps = spaced_timesteps(config, steps, train, more=1).round()
        chosen = converted_sigmas(config, known[::-1], steps)
        end: Any = 0.0
        if chosen is not None:
            timesteps = sigma_to_timestep(chosen, np.log(known))
            if config["use_karras_sigmas"]:
                timesteps = timesteps.round()
                if config["use_flow_sigmas"]:
                    chosen = chosen / (chosen + 1)
                    timesteps = chosen * train
            end = chosen[-1]
        elif config["use_flow_sigmas"]:
            chosen = shifted(np.linspace(1, 1 / train, steps + 1)[:-1], config["flow_shift"])
            if config["shift_terminal"]:
                chosen = stretched_to(chosen, config["shift_terminal"])
            if abs(chosen[0] - 1) < FLOW_EPSILON:
                chosen[0] -= FLOW_EPSILON
            timesteps, end = chosen * train, chosen[-1]
        else:
            chosen = np.interp(timesteps, np.arange(len(known)), known)
            end = known[0]
        end = end if config["final_sigmas_type"] == "sigma_min" else 0.0
        self.sigmas = np.concatenate([chosen, [end]]).astype(np.float32)
        self.timesteps = timesteps.astype(np.int64)

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        config, previous = self.config, self.index - 1
        converted = self._converted(output, sample)
        if self._last is not None and previous not in config["disable_corrector"]:
            sample = self._moved(self._last, previous, self._order, converted)
        self.outputs = [*self.outputs, converted][-config["solver_order"] :]
        left = len(self.timesteps) - self.index
        order = min(config["solver_order"], left if config["lower_order_final"] else left + 3)
        self._order, self._last = min(order, len(self.outputs)), sample
        result = self._moved(sample, self.index, self._order, None)
        self.index += 1
        return result

    def _converted(self, output: Array, sample: Array) -> Array:
        """Return the clean sample, or the noise where the solver works on it."""
        if self.config["predict_x0"]:
            return self.clean(output, sample)
        alpha, sigma, _ = self.parts(self.index)
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            return output
        noise: Array = (
            (sample - alpha * output) / sigma
            if kind == "sample"
            else alpha * output + sigma * sample
        )
        return noise

    def _moved(self, sample: Array, place: int, order: int, given: Array | None) -> Array:
        """Return ``sample`` moved from step ``place`` to the next.

        ``given``: the prediction there, which the corrector knows.
        """
        alpha, sigma, after = self.parts(place + 1)
        alpha0, sigma0, now = self.parts(place)
        h, newest, clean = after - now, self.outputs[-1], self.config["predict_x0"]
        signed = -h if clean else h
        grown = rounded(np.expm1, signed)
        width = signed if self.config["solver_type"] == "bh1" else grown
        ratios, differences = [], []
        for i in range(1, order):
            ratio = (self.parts(place - i)[2] - now) / h
            ratios.append(ratio)
            differences.append((self.outputs[-(i + 1)] - newest) / ratio)
        weights = _weights(ratios, signed, grown, width, corrector=given is not None)
        change: Any = sum((w * d for w, d in zip(weights, differences)), np.float32(0))
        if given is not None:
            change = change + weights[-1] * (given - newest)
        keep, factor = (sigma / sigma0, alpha) if clean else (alpha / alpha0, sigma)
        moved: Array = keep * sample - factor * grown * newest - factor * width * change
        return moved


def _weights(ratios: list[Any], h: Any, grown: Any, width: Any, corrector: bool) -> Any:
    """Return the differences' weights (UniPC, formula 9); the simple ones at the lowest orders."""
    known = len(ratios) + corrector
    if known <= 1:
        return [np.float32(0.5)] * known
    points = np.array([*ratios, 1.0], np.float32)
    rows, values, factorial, phi = [], [], 1, grown / h - np.float32(1)
    for i in range(1, len(points) + 1):
        rows.append(points ** (i - 1))
        values.append(phi * np.float32(factorial) / width)
        factorial *= i + 1
        phi = phi / h - np.float32(1 / factorial)
    matrix, vector = np.stack(rows), np.array(values, np.float32)
    if not corrector:
        matrix, vector = matrix[:-1, :-1], vector[:-1]
    return np.linalg.solve(matrix, vector)
