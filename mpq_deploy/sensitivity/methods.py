"""The sensitivity metrics by name. A new one is a file of this folder and a line here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A metric: ``measure_MODULE`` of the ``module`` of that name makes its table.

    ``predicts``: its losses are expected relative squared errors of the denoiser's output, or of the
    final ``images``; those of others only rank. ``probes``: by random adjoint probes.
    ``weighs_bits``: by an importance of each layer, and the timesteps with it. ``any_size``: of
    calls of several sizes all; others take those of the largest. ``control``: measured beside orm,
    to show what its ranking is worth.
    """

    module: str
    predicts: bool = False
    images: bool = False
    probes: bool = False
    weighs_bits: bool = False
    any_size: bool = True
    control: bool = False


METHODS = {
    "probe": Method("probe", predicts=True, probes=True),
    "trajectory": Method("trajectory", predicts=True, images=True, probes=True, any_size=False),
    "gain": Method("gain", predicts=True, any_size=False),
    "local_error": Method("local_error"),
    "exhaustive": Method("exhaustive", predicts=True),
    "kurtosis": Method("kurtosis", weighs_bits=True),
    "orm": Method("orm", weighs_bits=True, any_size=False),
    "size-only": Method("size_only", weighs_bits=True, control=True),
    "random": Method("random_importance", weighs_bits=True, control=True),
}
ORM_CONTROLS = tuple(name for name, method in METHODS.items() if method.control)
