"""What rounding one layer starts from: its weight, the second moments of its input, and how to round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpq_deploy.formats.sizes import input_channels
from mpq_deploy.rounding.arrays import names_of
from mpq_deploy.rounding.quantizers import Rounding

if TYPE_CHECKING:
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.models.spec import Array


@dataclass(frozen=True)
class InputMoments:
    """What is known of a layer's input.

    ``blocks`` float [group * B, w, w]: for each group the B diagonal blocks of the mean of x x^T,
    of which block b covers ``widths[b]`` columns (their sum is K). For branches that want them:
    ``outliers`` int32 [C], the input channels, those to take out of INT8 first; ``factors`` float16
    [A, C], by what channels are multiplied for each exponent; ``amax`` [K], the absolute maximum per column.
    """

    blocks: Array
    widths: tuple[int, ...]
    outliers: Array | None = None
    factors: Array | None = None
    amax: Array | None = None


@dataclass(frozen=True)
class LayerRounding:
    """A ``weight`` float32 [O, K] to round, and what decides how."""

    layer: Layer
    weight: Array
    inputs: InputMoments
    how: Rounding

    def groups(self) -> Iterator[tuple[Array, list[Array]]]:
        """Yield the rows of each group with the diagonal blocks of its inputs' second moments."""
        rows = self.layer.out_channels // self.layer.group
        per_group = len(self.inputs.blocks) // self.layer.group
        for group in range(self.layer.group):
            padded = self.inputs.blocks[group * per_group : (group + 1) * per_group]
            blocks = [block[:w, :w] for block, w in zip(padded, self.inputs.widths, strict=True)]
            yield self.weight[group * rows : (group + 1) * rows], blocks

    @property
    def moments(self) -> list[Array]:
        """The diagonal blocks of a layer of one group."""
        assert self.layer.group == 1
        return next(self.groups())[1]

    @property
    def taps(self) -> int:
        """Columns of the weight per input channel."""
        return self.layer.reduction // input_channels(self.layer)

    def unrefined(self) -> Rounding:
        """How a weight of its own is rounded, which shares nothing with the other forms."""
        return replace(self.how, refinements=0)


def importance_of(blocks: list[Array]) -> Array:
    """Return the mean square of each column, [K]."""
    xp = names_of(blocks[0])
    return xp.concatenate([xp.diagonal(block) for block in blocks])
