"""How often a model is called for a sample: once, or twice with classifier-free guidance."""

from __future__ import annotations

from typing import Any

from mpq_deploy.models.spec import DenoiserSpec


def rows_per_step(spec: DenoiserSpec) -> int:
    """Return the rows that the model is given per sample and step: two with guidance."""
    if spec.pipeline is None:
        return 1 if spec.guidance_scale == 1 or spec.uncond_row is None else 2
    import inspect

    import diffusers

    call = spec.pipeline.calls[0]
    taken = inspect.signature(getattr(diffusers, spec.pipeline.class_name).__call__).parameters
    # Pipelines of models that take the guidance as an input have another name for the true one.
    name = "true_cfg_scale" if "true_cfg_scale" in taken else "guidance_scale"
    given: Any = call.get(name, taken[name].default if name in taken else 1)
    return 2 if isinstance(given, (int, float)) and given > 1 and "prompt" in taken else 1
