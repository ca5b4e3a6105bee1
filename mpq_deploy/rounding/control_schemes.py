"""Controls: plans by a fixed rule, with the same rounding, to compare the solver's plan with.

In: a graph, the target, the activation statistics. Out: control name -> layer -> scheme, for the
controls that the target takes. Also: why a layer's input cannot be quantized.
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

# The largest magnitude that INT8 codes represent under the largest FP16 scale.
LARGEST_ACTIVATION = QUANT_MAX * LARGEST_SCALE
Names = tuple[str, ...]


@dataclass(frozen=True)
class Control:
    """A plan by a rule: each layer takes the first preferred scheme that it may take, else FP16.

    ``products``: the preferred schemes of Gemm and MatMul. ``convs``: those of Conv. ``attended``:
    those of the query, key and value layers of attention; None for either: as ``products``.
    ``needs``: the target takes the control only if some layer has one of these schemes.
    """

    title: str
    products: Names
    convs: Names | None = None
    attended: Names | None = None
    needs: Names = ()

    def preferred(self, layer: Layer, attended: bool) -> Names:
        """Return the names of the preferred schemes of ``layer``, best first."""
        own = self.convs if layer.op == "Conv" else self.attended if attended else None
        return self.products if own is None else own


STATIC_INT8 = "int8-static"
# Part of the title of controls that ONNX Runtime can only simulate.
SIMULATED_TWIN = ", simulated"
# The last scheme of INT8 and of INT4 is for the target "simulate". "int8" also gets the activation
# ranges and factors that were measured as best; STATIC_INT8 is the control without them, where the
# two differ.
INT8_RULE = ("w8a8", "w8a16", "w8a8-sim")
CONTROLS = {
    "int8": Control("Everything INT8", INT8_RULE),
    STATIC_INT8: Control("Everything INT8, static", INT8_RULE),
    "int4": Control("Everything INT4", ("w4a16-b32", "w4a16-b64", "w4a16-b128", "w4a16-sim")),
    "fp8": Control("Everything FP8", ("f8a8",), needs=("f8a8",)),
    "fp4": Control(f"Everything FP4{SIMULATED_TWIN}", ("nvfp4", "f8a8"), needs=("nvfp4",)),
    # NVIDIA's rule for SDXL: Model-Optimizer pull request 2336, without its exceptions by layer
    # name (time embeddings, first and last convolution).
    "nvidia": Control(
        f"NVIDIA's rule{SIMULATED_TWIN}", ("nvfp4",), convs=("f8a8",), attended=(), needs=("nvfp4",)
    ),
}


def control_plans(
    graph: LayerGraph, target: Target, stats: CalibrationStats | None = None
) -> dict[str, dict[str, Scheme]]:
    """Return the controls that ``target`` takes: name -> layer -> scheme.

    ``stats``: those of the layers' inputs, for ``beyond_scales``; None: do not check them.
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
    """Return the first ``preferred`` scheme that ``layer`` may take on ``target``, else FP16.

    ``stats``, ``ranks``: those of the layer's inputs; None: do not check them.
    """

    def refusal(layer: Layer, scheme: Scheme) -> str:
        too_large = "" if stats is None else beyond_scales(layer, scheme, stats)
        shapeless = "" if ranks is None else rank_refusal(layer, scheme, ranks)
        return target.refusal(layer, scheme) or too_large or shapeless

    allowed = {s.name: s for s in choices_for(layer, schemes_named(preferred), refusal).schemes}
    return next((allowed[name] for name in preferred if name in allowed), FP16)


def layer_counts(schemes: Iterable[str]) -> dict[str, int]:
    """Count the layers of each scheme family, most frequent first."""
    return dict(Counter(SCHEMES[name].family for name in schemes).most_common())


def tensor_ranks(graph: LayerGraph) -> dict[str, int]:
    """Return tensor name -> number of dimensions, where the graph knows the tensor's shape."""
    inner = graph.model.graph
    values = [*inner.inputs, *(value for node in inner for value in node.outputs)]
    return {v.name or "": len(v.shape) for v in values if v.shape is not None}


def beyond_scales(layer: Layer, scheme: Scheme, stats: CalibrationStats) -> str:
    """Return why the layer's input is too large for codes with an FP16 scale; "" if it is not.

    A range that moves also stores the inverse of its widest range in FP16: its limit is lower.
    """
    largest = max(float(stats.activations[name].amax.max()) for name in layer.inputs)
    most = LARGEST_SCALE if scheme.range.moves else LARGEST_ACTIVATION
    if scheme.activation is None or largest <= most:
        return ""
    return f"its input reaches {largest:.3g}, too large for codes with an FP16 scale"


def rank_refusal(layer: Layer, scheme: Scheme, ranks: Mapping[str, int]) -> str:
    """Return why the rank of an input does not suit the activation format; "" if it does."""
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
