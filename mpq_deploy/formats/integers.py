"""Weights of integer codes and FP16 scales: the common base of INT8 and INT4, and rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from mpq_deploy.formats.interfaces import Precision, Rounder, Scheme, WeightFormat
from mpq_deploy.formats.layer_rounding import LayerRounding, importance_of
from mpq_deploy.rounding.arrays import cast, fetched, names_of, placed
from mpq_deploy.rounding.quantizers import (
    BlockDiagonal,
    Factored,
    Grid,
    QuantizedMatrix,
    Rounded,
    Rounding,
    choose_scale,
    gptq_codes,
    position_first,
    refine_rounding,
    row_parts,
)

if TYPE_CHECKING:
    from mpq_deploy.formats.interfaces import DeployedMatrix
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.models.spec import Array
    from mpq_deploy.recover.trained_weights import LayerTwin, StartingWeight, TwinKit


Result = TypeVar("Result")


@dataclass(frozen=True)
class IntegerWeight(WeightFormat):
    """Codes of a ``precision`` in a ``QuantizedMatrix``; subclasses choose scales, write nodes."""

    precision: ClassVar[Precision]
    # Whether refinement after GPTQ may change the scales.
    refined: ClassVar[bool] = False

    def taps(self, layer: Layer) -> int:
        """Return ``QuantizedMatrix.taps``, the order in which blocks run, for ``layer``."""
        return 1

    @property
    def form(self) -> str:
        return self.precision.name + (f"-b{self.block_size}" if self.block_size else "")

    def scales(self, weight: Array, importance: Array, best: Array) -> tuple[Array, Array | None]:
        """Return the scales of ``weight`` [O, K]: float16 [O, B], and channel scales [O] or None.

        ``importance`` [K]: the mean square of the input's columns; ``best`` float16 [O, B]: the
        scales by ``choose_scale``.
        """
        return best, None

    @property
    def rounder(self) -> Rounder:
        return round_integers

    def read(self, arrays: Mapping[str, Array]) -> QuantizedMatrix:
        return QuantizedMatrix.of(arrays)

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        return kit.of(kit.grid(start.matrix, start.weight, self.precision))


def integer_format(scheme: Scheme) -> IntegerWeight:
    """Return the weight format of a scheme with integer codes."""
    assert isinstance(scheme.weight, IntegerWeight)
    return scheme.weight


def round_integers(schemes: Sequence[Scheme], layer: LayerRounding) -> dict[str, DeployedMatrix]:
    """Round the bodies of all ``schemes`` for ``layer`` at once: weight form -> matrix."""
    formats = {scheme.weight_form: integer_format(scheme) for scheme in schemes}
    columns = {}
    for scheme in schemes:
        factors = scheme.branch.rescaling(layer)
        if factors is not None:
            columns[scheme.weight_form] = np.repeat(factors.astype(np.float32), layer.taps)
    parts: dict[str, list[QuantizedMatrix]] = {form: [] for form in formats}
    for weight, blocks in layer.groups():
        rounded = _round_group(layer.layer, weight, blocks, formats, layer.how, columns)
        for form, matrix in rounded.items():
            parts[form].append(matrix)
    return {s.weight_form: s.branch.around(_joined(parts[s.weight_form]), layer) for s in schemes}


def round_alone(
    body: Scheme, layer: LayerRounding, weight: Array, moments: list[Array]
) -> QuantizedMatrix:
    """Round a branch's own ``weight`` [O, K] in the format of ``body``, without refinement.

    ``moments``: the diagonal blocks of the second moments of its input.
    """
    formats = {body.weight_form: integer_format(body)}
    how = layer.unrefined()
    return _round_group(layer.layer, weight, moments, formats, how, {})[body.weight_form]


def _with_scales(
    layer: Layer,
    weight: Array,
    importance: Array,
    formats: Mapping[str, IntegerWeight],
    by: Mapping[str, Array],
) -> dict[str, QuantizedMatrix]:
    """Return weight form -> matrix of ``weight`` [O, K] with scales and zero codes.

    ``by``: form -> factors [K], as ``columns`` of ``_round_group``. Formats that only postprocess
    the block scales differently share the search for them.
    """
    xp, matrices = names_of(weight), {}
    best: dict[Any, Array] = {}
    for form, own in formats.items():
        seen, scaled, taps = cast(importance, np.float32), weight, own.taps(layer)
        if form in by:
            seen, scaled = cast(importance * xp.square(by[form]), np.float32), weight / by[form]
        scaled, seen = (position_first(one, taps) for one in (scaled, seen[None]))
        block = own.block(layer)
        assert block is not None, "choices_for admits only schemes with a block size"
        alike = own.precision, block, taps, form if form in by else ""
        if alike not in best:
            best[alike] = choose_scale(scaled, seen[0], layer.reduction // block, own.precision)
        scale, channel = own.scales(scaled, seen[0], best[alike])
        matrices[form] = QuantizedMatrix(xp.zeros(weight.shape, np.int8), scale, channel, taps)
    return matrices


def _round_group(
    layer: Layer,
    weight: Array,
    blocks: list[Array],
    formats: Mapping[str, IntegerWeight],
    how: Rounding,
    columns: Mapping[str, Array],
) -> dict[str, QuantizedMatrix]:
    """Round ``weight`` [O, K] to all ``formats``: weight form -> matrix.

    ``columns``: form -> factors [K] that multiply the input's columns, for some forms.
    """
    weight, blocks = placed(weight), [placed(block) for block in blocks]
    by = {form: placed(factors) for form, factors in columns.items()}
    importance = importance_of(blocks)

    def scaled(part: slice) -> dict[str, QuantizedMatrix]:
        return _with_scales(layer, weight[part], importance, formats, by)

    pieces = _in_parts(scaled, weight, how)
    matrices = {form: _joined([piece[form] for piece in pieces]) for form in formats}
    xp, taps = names_of(weight), {form: matrix.taps for form, matrix in matrices.items()}
    grids = {}
    for form, matrix in matrices.items():
        limits = formats[form].precision
        step, places = matrix.effective_scale(), xp.asarray(matrix.columns())
        grids[form] = Grid(step, places, limits.quant_min, limits.quant_max, by.get(form))
    codes = _codes(weight, grids, blocks if how.gptq else None, how)
    rounded = {form: (codes[form], matrices[form].scale) for form in formats}
    # INT8 would gain little, and the block scales of w4a8 are tied to their channel scale.
    free = [form for form, own in formats.items() if own.refined]
    if how.gptq and how.refinements and free:
        together = len(free) if xp is np else max(1, how.rows // len(weight))
        hessian = BlockDiagonal.damped(blocks, how.damping)
        for first in range(0, len(free), together):
            some = free[first : first + together]
            started = [rounded[form] for form in some]
            rounded.update(zip(some, _refined(weight, started, hessian, how, taps[some[0]])))
    return {
        form: QuantizedMatrix(
            fetched(rounded[form][0]),
            fetched(rounded[form][1]),
            None if matrix.channel_scale is None else fetched(matrix.channel_scale),
            matrix.taps,
        )
        for form, matrix in matrices.items()
    }


def _codes(
    weight: Array, grids: Mapping[str, Grid], blocks: list[Array] | None, how: Rounding
) -> dict[str, Array]:
    """Round ``weight`` [O, K] for all forms, which share the input and therefore GPTQ's factor.

    Where the input is multiplied by factors, the divided weight is not made: the grid's steps are
    multiplied by the factors instead. ``blocks`` None: round to nearest.
    """
    if blocks is None:
        return {form: grid.nearest(weight) for form, grid in grids.items()}
    pieces: dict[str, list[Array]] = {form: [] for form in grids}
    start = 0
    for block in blocks:
        span = slice(start, start + len(block))
        start += len(block)
        cut = {form: grid.cut(span) for form, grid in grids.items()}
        for factors, forms in _orders(cut):
            known = Factored.of(block, how.damping, factors)
            codes = _gptq(weight, span, [cut[form] for form in forms], known, how)
            for form, part in zip(forms, codes, strict=True):
                pieces[form].append(part)
    return {form: names_of(weight).concatenate(codes, axis=1) for form, codes in pieces.items()}


def _orders(grids: Mapping[str, Grid]) -> Iterator[tuple[Array | None, list[str]]]:
    """Yield (factors [K], forms) for each group of forms whose columns GPTQ visits in one order.

    Each order needs its own factor of the Hessian, so there are two: one for the unscaled input
    (None) and one for the geometric mean of all forms' factors. Each form takes the nearer one.
    With orders of their own the errors would be a few percent lower; with the unscaled order alone
    up to 25 % higher (seen once on the bundled emoji model; our choice).
    """
    factors = {form: grid.factors for form, grid in grids.items() if grid.factors is not None}
    scaled = {form: np.log(fetched(own)) for form, own in factors.items()}
    mean = np.mean(list(scaled.values()), axis=0) if scaled else None
    near = [f for f, logs in scaled.items() if np.sum((logs - mean) ** 2) < np.sum(logs**2)]
    if len(near) < len(grids):
        yield None, [form for form in grids if form not in near]
    if near and mean is not None:
        yield np.exp(mean), near


def _gptq(
    weight: Array, span: slice, grids: Sequence[Grid], known: Factored, how: Rounding
) -> list[Array]:
    """Round the columns ``span`` of ``weight`` [O, K] by GPTQ to each of ``grids``, part by part."""

    def rounded(part: slice) -> list[Array]:
        own = [grid.of_rows(part) for grid in grids]
        return gptq_codes(weight[part, span], own, known, how.damping, rows=how.rows)

    return [_stacked_rows(codes) for codes in zip(*_in_parts(rounded, weight, how), strict=True)]


def _refined(
    weight: Array, started: Sequence[Rounded], hessian: BlockDiagonal, how: Rounding, taps: int
) -> list[Rounded]:
    """Refine the forms ``started`` of ``weight`` [O, K], part by part."""

    def refined(part: slice) -> list[Rounded]:
        own = [(codes[part], scale[part]) for codes, scale in started]
        return refine_rounding(weight[part], own, hessian, how.damping, how.refinements, taps)

    return [_joined_rows(one) for one in zip(*_in_parts(refined, weight, how), strict=True)]


def _in_parts(work: Callable[[slice], Result], weight: Array, how: Rounding) -> list[Result]:
    """Return ``work`` of each part of the rows of ``weight``, ``how.lanes`` of them at once."""
    from mpq_deploy.system.lanes import in_lanes

    return list(in_lanes(work, row_parts(weight), how.lanes))


def _stacked_rows(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _joined_rows(parts: Sequence[Rounded]) -> Rounded:
    """Join the codes and the scales of the parts of a weight."""
    codes, scales = zip(*parts, strict=True)
    return _stacked_rows(codes), _stacked_rows(scales)


def _joined(pieces: list[QuantizedMatrix]) -> QuantizedMatrix:
    if len(pieces) == 1:
        return pieces[0]
    channels = [p.channel_scale for p in pieces if p.channel_scale is not None]
    return QuantizedMatrix(
        np.concatenate([p.codes for p in pieces]),
        np.concatenate([p.scale for p in pieces]),
        np.concatenate(channels) if channels else None,
        pieces[0].taps,
    )
