"""The scheduler that a scheduler_config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpq_deploy.device.generate.alpha_schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from mpq_deploy.device.generate.euler_schedulers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from mpq_deploy.device.generate.multistep_schedulers import (
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from mpq_deploy.device.generate.scheduler_base import Scheduler
from mpq_deploy.errors import InputError

SCHEDULERS: dict[str, type[Scheduler]] = {
    one.__name__: one
    for one in (
        *(DDIMScheduler, DDPMScheduler, PNDMScheduler, LCMScheduler),
        *(EulerDiscreteScheduler, EulerAncestralDiscreteScheduler),
        *(FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler),
    )
}
# Relatives that share a configuration but no name.
INSTEAD = {
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "DEISMultistepScheduler": "DPMSolverMultistepScheduler",
    "LMSDiscreteScheduler": "EulerDiscreteScheduler",
    "TCDScheduler": "LCMScheduler",
}


def scheduler_from_config(config: Mapping[str, Any]) -> Scheduler:
    """Return the scheduler of a configuration; InputError names the nearest for one not here."""
    name = str(config.get("_class_name"))
    if name in SCHEDULERS:
        return SCHEDULERS[name](config)
    import difflib

    close = difflib.get_close_matches(name, SCHEDULERS, n=1, cutoff=0.0)
    raise InputError(
        f"The scheduler '{name}' is not here.",
        f"The nearest is {INSTEAD.get(name) or close[0]}; here are: {', '.join(SCHEDULERS)}.",
    )
