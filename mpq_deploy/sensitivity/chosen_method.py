"""Which metric measures a run: the one that the recipe names, or what its ``auto`` stands for.

In: the recipe, the model's specification, and what shares the measurement. Out: the metric, its
calls, and why. In as many backward passes trajectories gave better plans than single outputs where
all that is quantized computes in low precision: rounded activations hardly add up over steps, weights
do (docs/results/trajectory.md). So ``auto`` takes them there, where whole trajectories are possible
for the time that single outputs take. Where weights alone may be quantized, plans were as good or
better by single outputs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpq_deploy.calls.loop import guided
from mpq_deploy.calls.sampler import takes_built_in
from mpq_deploy.formats.scheme import schemes_named

if TYPE_CHECKING:
    from mpq_deploy.models.spec import DenoiserSpec
    from mpq_deploy.recipe import Recipe

AUTO = "auto"
OUTPUTS, IMAGES = "probe", "trajectory"
# The figures are of twelve trajectories; of fewer than these a single one decides too much of a plan
# (our choice), and none is left out by the default of allocate.trim below six.
LEAST_TRAJECTORIES = 8


@dataclass(frozen=True)
class ChosenMethod:
    """A metric of ``METHODS``, its calls at each timestep or its trajectories, and why ``auto`` took it.

    ``reason``: empty where the recipe names the metric.
    """

    name: str
    calls: int
    reason: str = ""

    @property
    def text(self) -> str:
        """What is said of it beside the measurement; empty where the recipe names the metric."""
        return f"measure.method auto is {self.name}: {self.reason}" if self.reason else ""


def chosen_method(recipe: Recipe, spec: DenoiserSpec, shared_by: str = "") -> ChosenMethod:
    """Return the metric of a run.

    ``shared_by``: who shares the measurement, in words, such as "several targets"; empty for a run
    of one target and one part. What only torch can tell, when it evaluates the graph or takes a
    sampler's step, is found out by ``measure``, which then measures what is possible and says so.
    """
    section = recipe.measure
    if section.method != AUTO:
        return ChosenMethod(section.method, section.calls)
    against = _against_trajectories(recipe, spec, shared_by)
    if against:
        return ChosenMethod(OUTPUTS, section.calls, against)
    count, steps = trajectories(recipe, spec), recipe.calibrate.steps
    return ChosenMethod(IMAGES, count, f"{count} whole trajectories of {steps} steps")


def trajectories(recipe: Recipe, spec: DenoiserSpec) -> int:
    """Return how many trajectories have as many calls at a step as single outputs at a timestep."""
    calls = min(recipe.measure.calls, recipe.measure.samples, recipe.calibrate.samples)
    # With guidance each has two.
    return calls // 2 if guided(spec) else calls


def _against_trajectories(recipe: Recipe, spec: DenoiserSpec, shared_by: str) -> str:
    """Return why single outputs are measured; empty where trajectories are."""
    section, steps = recipe.measure, recipe.calibrate.steps
    timesteps = min(section.timesteps, recipe.calibrate.timesteps)
    if shared_by:
        return f"{shared_by} share the measurement"
    if spec.timestep is None:
        return "the part is called once"
    if not spec.sampled:
        who = "a script" if spec.recorded else "a diffusers pipeline"
        return f"the calls are those of {who}, not of our sampler"
    if spec.decoder is not None:
        return "a decoder makes the images, and only those of a model of pixels are predicted"
    if spec.sizes:
        return "trajectories are measured at one size, and the model has several"
    if any(s.quantized and s.activation is None for s in schemes_named(recipe.allocate.schemes)):
        return "weights alone may be quantized, which single outputs plan as well or better"
    if section.sampling != "uniform":
        return "measure.sampling is adaptive"
    built_in = takes_built_in(spec.scheduler, recipe.evaluate.sampler)
    if built_in and spec.scheduler.get("thresholding"):
        return "the thresholding of the built-in DDIM cannot be differentiated"
    if timesteps < steps:
        return f"{timesteps} timesteps are measured of the {steps} that a whole trajectory has"
    count = trajectories(recipe, spec)
    if count < LEAST_TRAJECTORIES:
        of = ", of two calls each," if guided(spec) else ""
        return f"{count} trajectories{of} fit in {section.calls} calls, and it takes {LEAST_TRAJECTORIES}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return ""
