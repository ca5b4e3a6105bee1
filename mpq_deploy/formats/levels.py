"""Weights whose levels are not uniform (FP8, NVFP4, INT4 via FP8): common base and rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mpq_deploy.formats.interfaces import Rounder, Scheme, WeightFormat
from mpq_deploy.formats.layer_rounding import LayerRounding, importance_of
from mpq_deploy.rounding.arrays import placed
from mpq_deploy.rounding.float_levels import LevelMatrix, round_levels

if TYPE_CHECKING:
    from mpq_deploy.formats.interfaces import DeployedMatrix
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.models.spec import Array
    from mpq_deploy.recover.trained_weights import LayerTwin, StartingWeight, TwinKit


@dataclass(frozen=True)
class LevelWeight(WeightFormat):
    """Codes of a ``LevelMatrix``; subclasses choose its scales and write nodes."""

    matrix: ClassVar[type[LevelMatrix]]
    takes_branches = False

    def scaled(self, layer: Layer, weight: Array, importance: Array) -> LevelMatrix:
        """Return a matrix with the scales of ``weight`` [O, K] and zero codes.

        ``importance`` [K]: the mean square of the input's columns.
        """
        raise NotImplementedError

    @property
    def rounder(self) -> Rounder:
        return round_floats

    def read(self, arrays: Mapping[str, Array]) -> LevelMatrix:
        return self.matrix.of(arrays)

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        return kit.of(kit.float_levels(start.matrix, start.weight))


def level_format(scheme: Scheme) -> LevelWeight:
    """Return the weight format of a scheme with non-uniform levels."""
    assert isinstance(scheme.weight, LevelWeight)
    return scheme.weight


def round_floats(schemes: Sequence[Scheme], layer: LayerRounding) -> dict[str, DeployedMatrix]:
    """Round ``layer`` for all ``schemes`` at once, with one GPTQ factor: weight form -> matrix."""
    formats = {scheme.weight_form: level_format(scheme) for scheme in schemes}
    parts: dict[str, list[LevelMatrix]] = {form: [] for form in formats}
    for weight, blocks in layer.groups():
        weight, blocks = placed(weight), [placed(block) for block in blocks]
        importance = importance_of(blocks)
        grids = {f: own.scaled(layer.layer, weight, importance) for f, own in formats.items()}
        for form, matrix in round_levels(weight, grids, blocks, layer.how).items():
            parts[form].append(matrix.fetched())
    return {form: formats[form].matrix.joined(pieces) for form, pieces in parts.items()}
