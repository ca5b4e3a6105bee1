"""The inputs of rounding one layer: its weight, the second moments of its input, the settings."""

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
    """Statistics of a layer's input.

    ``blocks`` float [group * B, w, w]: for each group the B diagonal blocks of the mean of x x^T.
    Block b covers ``widths[b]`` columns; the widths add up to K. For branches: ``outliers`` int32
    [C], the input channels in the order in which they leave INT8; ``factors`` float16 [A, C], the
    channel factors of each exponent; ``amax`` [K], the absolute maximum per column.
    """

    blocks: Array
    widths: tuple[int, ...]
    outliers: Array | None = None
    factors: Array | None = None
    amax: Array | None = None


@dataclass(frozen=True)
class LayerRounding:
    """A ``weight`` float32 [O, K] to round, the statistics of its input, the settings ``how``."""

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
        """The diagonal blocks of the second moments, for a layer of one group."""
        assert self.layer.group == 1
        return next(self.groups())[1]

    @property
    def taps(self) -> int:
        """Columns of the weight per input channel."""
        return self.layer.reduction // input_channels(self.layer)

    def unrefined(self) -> Rounding:
        """Return the settings without refinement, for a branch's own weight."""
        return replace(self.how, refinements=0)


def importance_of(blocks: list[Array]) -> Array:
    """Return the mean square of each column of the input, [K]."""
    xp = names_of(blocks[0])
    return xp.concatenate([xp.diagonal(block) for block in blocks])
