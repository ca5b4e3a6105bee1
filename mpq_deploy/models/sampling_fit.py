"""Whether a model can be sampled with as samplers do it: shapes of its output, kinds of timesteps.

In: a description, the shape of an output, numbers of steps. Out: nothing, or a ModelError before
any calibration.
"""

from __future__ import annotations

from collections.abc import Iterable

from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.recipe import SamplerKind
from mpq_deploy.runtime.ort import first_fraction

EXTRA = (
    "Give a model that denoises all its input channels: samplers do not fill in a mask or an image."
)


def check_output(spec: DenoiserSpec, shape: tuple[int, ...]) -> None:
    """Raise ModelError unless an output of ``shape`` [N, ...] is noise for a sample, or noise and variance.

    A learned variance doubles the channels, and its half is left out. A model in its own pipeline
    may give anything: that takes it.
    """
    if not spec.sampled:
        return
    sample, output = spec.sample.shape, tuple(shape[1:])
    why, remedy = _misfit(sample, output, str(spec.scheduler.get("variance_type", "")))
    if why:
        raise ModelError(
            f"The model takes samples of shape {list(sample)} and gives {list(output)}: {why}.",
            remedy,
        )


def _misfit(sample: tuple[int, ...], output: tuple[int, ...], variance: str) -> tuple[str, str]:
    """Say why an output is nothing that a sampler takes, and what to do; empty: it is."""
    if output not in (sample, (2 * sample[0], *sample[1:])):
        if len(output) == len(sample) and output[0] < sample[0] and output[1:] == sample[1:]:
            beyond = sample[0] - output[0]
            return (
                f"{beyond} of its {sample[0]} channels are not noise, but a mask or an image",
                EXTRA,
            )
        return (
            "a denoiser gives the shape that it takes, or twice the channels (a learned variance)",
            "Name the right output (output: in the YAML of an ONNX file), or export the model again.",
        )
    if output == sample and variance.startswith("learned") and sample[0] % 2 == 0:
        half = sample[0] // 2
        return (
            f"by its scheduler's variance_type {variance} {half} of these channels are noise and {half} its variance, "
            f"so {half} of what it takes are an image",
            f"{EXTRA} Where no output is a variance, give the scheduler that says so: --scheduler FILE.",
        )
    return "", ""


def check_declared(spec: DenoiserSpec) -> None:
    """Check what a UNet's configuration says of its output, before it is exported. Raises ModelError."""
    channels = spec.config.get("out_channels")
    unet = str(spec.config.get("_class_name")).startswith("UNet")
    if (
        unet
        and isinstance(channels, int)
        and spec.config.get("in_channels") == spec.sample.shape[0]
    ):
        check_output(spec, (1, channels, *spec.sample.shape[1:]))


def check_timesteps(
    spec: DenoiserSpec, numbers_of_steps: Iterable[int], kind: SamplerKind = "auto"
) -> None:
    """Raise ModelError where the model takes whole timesteps and the sampler has fractions between them."""
    if not spec.sampled or spec.timestep is None or not spec.timestep.dtype.startswith("int"):
        return
    for steps in sorted(set(numbers_of_steps)):
        timesteps = make_sampler(spec.scheduler, steps, kind=kind).timesteps
        fraction = first_fraction(timesteps)
        if fraction is not None:
            raise ModelError(
                f"The timestep '{spec.timestep.name}' is {spec.timestep.dtype}, but {spec.scheduler['_class_name']} "
                f"has {fraction:g} among its timesteps of {steps} steps.",
                "Export the model with a float timestep, or give a scheduler of whole timesteps (--scheduler FILE; "
                "timestep_spacing leading or trailing gives them in most).",
            )
