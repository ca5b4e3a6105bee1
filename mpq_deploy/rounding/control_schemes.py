"""Controls: what a user would get without this tool, at the same rounding, and what an input must be for that.

In: a graph, the target, what is known of activations. Out: the scheme of every layer under every
control that the target takes, by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpq_deploy.calibrate.scales import LARGEST_SCALE, QUANT_MAX
from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.engine.target import Target
from mpq_deploy.formats.candidates import choices_for
from mpq_deploy.formats.scheme import FP16, SCHEMES, Scheme, schemes_named
from mpq_deploy.graph.attention import attended_layers
from mpq_deploy.graph.layers import Layer, LayerGraph

# What INT8 codes reach under the largest scale.
LARGEST_ACTIVATION = QUANT_MAX * LARGEST_SCALE
Names = tuple[str, ...]


@dataclass(frozen=True)
class Control:
    """A plan by a rule: layers take the first of the preferred schemes that they may take, else FP16.

    ``products``: of Gemm and MatMul; ``convs`` (None: as products); ``attended``: of products whose
    result attention multiplies (None: as products). ``needs``: schemes of which some layer must have
    one; without, the target does not take the control.
    """

    title: str
    products: Names
    convs: Names | None = None
    attended: Names | None = None
    needs: Names = ()

    def preferred(self, layer: Layer, attended: bool) -> Names:
        """Return the schemes that ``layer`` is to have, best first."""
        own = self.convs if layer.op == "Conv" else self.attended if attended else None
        return self.products if own is None else own


STATIC_INT8 = "int8-static"
# Of controls that ONNX Runtime has only a twin of.
SIMULATED_TWIN = ", simulated"
# The last of each is what the target simulate takes instead. INT8 also has the ranges and factors
# that were measured as best, and stands without them, where that differs, under a name of its own.
INT8_RULE = ("w8a8", "w8a16", "w8a8-sim")
CONTROLS = {
    "int8": Control("Everything INT8", INT8_RULE),
    STATIC_INT8: Control("Everything INT8, static", INT8_RULE),
    "int4": Control("Everything INT4", ("w4a16-b32", "w4a16-b64", "w4a16-b128", "w4a16-sim")),
    "fp8": Control("Everything FP8", ("f8a8",), needs=("f8a8",)),
    "fp4": Control(f"Everything FP4{SIMULATED_TWIN}", ("nvfp4", "f8a8"), needs=("nvfp4",)),
    # Of SDXL: Model-Optimizer pull request 2336. Its exceptions by name (time embeddings, first and
    # last convolution) are not made here.
    "nvidia": Control(
        f"NVIDIA's rule{SIMULATED_TWIN}", ("nvfp4",), convs=("f8a8",), attended=(), needs=("nvfp4",)
    ),
}


def control_plans(
    graph: LayerGraph, target: Target, stats: CalibrationStats | None = None
) -> dict[str, dict[str, Scheme]]:
    """Return the controls that ``target`` takes: name -> layer -> scheme.

    ``stats``: of the layers' inputs, some of which are too large to be rounded.
    """
    attended, ranks = attended_layers(graph), tensor_ranks(graph)
    plans = {
        name: {
            layer.name: control_scheme(
                layer, control.preferred(layer, layer.name in attended), target, stats, ranks
            )
            for layer in graph.layers
        }
        for name, control in CONTROLS.items()
    }
    return {
        name: plan
        for name, plan in plans.items()
        if not (needs := CONTROLS[name].needs) or any(s.name in needs for s in plan.values())
    }


def control_scheme(
    layer: Layer,
    preferred: Names,
    target: Target,
    stats: CalibrationStats | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Scheme:
    """Return the first of the ``preferred`` schemes that ``layer`` may take on ``target``; FP16 when none.

    ``stats`` of its inputs and their ``ranks``: as far as they are to be looked at.
    """

    def refusal(layer: Layer, scheme: Scheme) -> str:
        too_large = "" if stats is None else beyond_scales(layer, scheme, stats)
        shapeless = "" if ranks is None else rank_refusal(layer, scheme, ranks)
        return target.refusal(layer, scheme) or too_large or shapeless

    allowed = {s.name: s for s in choices_for(layer, schemes_named(preferred), refusal).schemes}
    return next((allowed[name] for name in preferred if name in allowed), FP16)


def layer_counts(schemes: Iterable[str]) -> dict[str, int]:
    """Count the layers of each family, most first."""
    return dict(Counter(SCHEMES[name].family for name in schemes).most_common())


def tensor_ranks(graph: LayerGraph) -> dict[str, int]:
    """Return the number of dimensions of each tensor of which it is known."""
    inner = graph.model.graph
    values = [*inner.inputs, *(value for node in inner for value in node.outputs)]
    return {v.name or "": len(v.shape) for v in values if v.shape is not None}


def beyond_scales(layer: Layer, scheme: Scheme, stats: CalibrationStats) -> str:
    """Say that the layer's input is too large for INT8 codes under an FP16 scale; empty when it is not.

    A range that moves has the inverse of its widest in FP16, which ends earlier.
    """
    largest = max(float(stats.activations[name].amax.max()) for name in layer.inputs)
    most = LARGEST_SCALE if scheme.range.moves else LARGEST_ACTIVATION
    if scheme.activation is None or largest <= most:
        return ""
    return f"its input reaches {largest:.3g}, too large for INT8 codes with an FP16 scale"


def rank_refusal(layer: Layer, scheme: Scheme, ranks: Mapping[str, int]) -> str:
    """Say that an input has more or fewer dimensions than the scheme's activations may."""
    allowed = scheme.activation.ranks if scheme.activation else ()
    for tensor in layer.inputs if allowed else ():
        rank = ranks.get(tensor)
        if rank not in allowed:
            found = "an unknown number of" if rank is None else rank
            wanted = " or ".join(map(str, allowed))
            return (
                f"{scheme.family} takes inputs of {wanted} dimensions, but '{tensor}' has {found}"
            )
    return ""
