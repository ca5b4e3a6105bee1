"""The sensitivity metrics by name. A new metric is a file in this folder and a line here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A metric, whose table the function ``measure_MODULE`` of the file ``module`` makes.

    ``predicts``: losses are expected relative squared errors of the denoiser's output, or of the
    final images where ``images``; other metrics only rank. ``probes``: uses random adjoint probes.
    ``weighs_bits``: losses are an importance per layer times missing bits, and the metric weights
    the timesteps itself. ``any_size``: measures calls of all sizes; other metrics take those of the
    largest size. ``control``: measured beside orm to show what orm's ranking is worth.
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
