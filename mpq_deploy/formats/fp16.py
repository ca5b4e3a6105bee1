"""FP16: the scheme of a layer that is not quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpq_deploy.formats.interfaces import Scheme, WeightFormat
from mpq_deploy.formats.sizes import FP16_BYTES

if TYPE_CHECKING:
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.recover.trained_weights import LayerTwin, StartingWeight, TwinKit


@dataclass(frozen=True)
class Half(WeightFormat):
    """The weight in FP16, without codes or added nodes."""

    bits = 16
    quantized = False
    engine_types = ("Half", "Float", "BFloat16")

    @property
    def form(self) -> str:
        return "fp16"

    def bytes_of(self, layer: Layer) -> int:
        return FP16_BYTES * layer.weights

    def joins(self, alone: bool) -> bool:
        return True

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        return kit.of_half(start.weight)


FP16 = Scheme("fp16", Half(), meaning="16-bit floats, as in the original")
