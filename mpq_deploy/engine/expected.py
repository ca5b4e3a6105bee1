"""What the plan promises of an engine: the layers with their schemes, and the bytes of all constants."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.errors import InputError
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.names import printable
from mpq_deploy.system.typed import typed

if TYPE_CHECKING:
    from mpq_deploy.graph.layers import Layer


@dataclass(frozen=True)
class ExpectedLayer:
    """One layer of the plan: the ONNX nodes that apply it, its scheme, and its bytes in the file.

    A Conv that is written as a product is a MatMul here.

    ``reduction`` and ``out_channels`` are those of the weight as a matrix, ``kernel`` its spatial
    shape (empty for products), ``blocks`` how many scales each output channel has.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    scheme: str
    bytes: int
    out_channels: int
    reduction: int
    kernel: tuple[int, ...] = ()
    blocks: int = 1

    @property
    def weights(self) -> int:
        """Number of weight elements."""
        return self.out_channels * self.reduction

    @property
    def form(self) -> Scheme:
        """The scheme itself."""
        return SCHEMES[self.scheme]

    @classmethod
    def of(cls, layer: Layer, scheme: Scheme) -> ExpectedLayer:
        """Describe ``layer`` under ``scheme``."""
        block = scheme.weight.block(layer)
        blocks = layer.reduction // block if block else 1
        nodes = tuple(use.node for use in layer.uses)
        size = scheme.weight_bytes(layer)
        product = scheme.multiplies(layer)
        kernel = () if product else layer.kernel
        shape = (layer.out_channels, layer.reduction, kernel, blocks)
        op = "MatMul" if product else layer.op
        return cls(layer.name, op, nodes, scheme.name, size, *shape)


@dataclass(frozen=True)
class ExpectedLayers:
    """All layers of the plan, the bytes of all constants of the file, and of those how many repeat others.

    ``widened_bytes``: what is added where constants lie in FP32 that the file has in FP16.
    ``fp8_attention``: nodes of products of two activations that read FP8. ``slots``: layers have
    inputs for LoRAs, which keep their products apart.
    """

    layers: tuple[ExpectedLayer, ...]
    total_bytes: int
    repeated_bytes: int = 0
    widened_bytes: int = 0
    fp8_attention: tuple[str, ...] = ()
    slots: bool = False

    @classmethod
    def of(
        cls,
        layers: Iterable[Layer],
        schemes: Mapping[str, Scheme],
        total_bytes: int,
        repeated_bytes: int = 0,
        widened_bytes: int = 0,
    ) -> ExpectedLayers:
        """Describe ``layers`` under ``schemes`` (by layer name); a branch is a layer of its own.

        Raises ValueError for a simulated scheme: no builder may ever see one.
        """
        simulated = sorted({scheme.name for scheme in schemes.values() if scheme.simulated})
        if simulated:
            raise ValueError(f"{', '.join(simulated)}: no engine can hold simulated schemes")
        parts = (part for layer in layers for part in schemes[layer.name].parts(layer))
        return cls(
            tuple(ExpectedLayer.of(layer, scheme) for layer, scheme in parts),
            total_bytes,
            repeated_bytes,
            widened_bytes,
        )

    def save(self, path: Path) -> None:
        """Write as JSON with sorted keys."""
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ExpectedLayers:
        """Read what ``save`` wrote."""
        try:
            return typed(cls, read_json_object(path))
        except ValueError as error:
            raise InputError(f"{path}: {printable(str(error))}.", "Build it again.") from error
