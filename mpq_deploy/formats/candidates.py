"""The candidates of a layer: the schemes it may take on a target, why not the others, and their rounded weights.

In: a layer, the recipe's schemes, the target's rules, the input's second moments (Hessian). Out: for each weight
form the codes and scales that would be deployed, so that measuring, allocating and writing see the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpq_deploy.errors import ModelError
from mpq_deploy.formats.branch_matrices import (
    ColsMatrix,
    LowRankMatrix,
    RowsMatrix,
    ScaledMatrix,
    beside_body,
    by_column,
    columns_of,
    low_rank_factors,
    promote_rows,
    rescaled,
    row_kurtosis,
    without_columns,
)
from mpq_deploy.formats.scheme import BRANCH_BLOCK, FP16, INT4, INT8, SCHEMES, W8A8, W8A16, Scheme
from mpq_deploy.formats.simulated import (
    Rounding,
    RowForm,
    RowGrids,
    SimulatedMatrix,
    assemble,
    needed_forms,
    round_forms,
    row_errors,
    stacked,
)
from mpq_deploy.formats.sizes import block_size, input_channels, outlier_columns, promoted_rows
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.quantizers import (
    LARGEST_SCALE,
    Grid,
    QuantizedMatrix,
    choose_multiple_scale,
    choose_scale,
    gptq_codes,
    refine_rounding,
)

GRID_ARRAYS = ("low", "high", "scale", "residual")

Refusal = Callable[[Layer, Scheme], str]
DeployedMatrix = QuantizedMatrix | RowsMatrix | ColsMatrix | LowRankMatrix | ScaledMatrix | SimulatedMatrix


@dataclass(frozen=True)
class Choices:
    """The schemes that a layer may take, and the reason for each that it may not."""

    schemes: tuple[Scheme, ...]
    refused: dict[str, str]


def choices_for(layer: Layer, wanted: tuple[Scheme, ...], refusal: Refusal) -> Choices:
    """Sort the ``wanted`` schemes into those ``layer`` may take and those it may not, with the reason.

    FP16 is always possible. Two nominal block sizes that give the same real one are one candidate. Branches come after
    the bodies in ``wanted``; of a family's bodies only the one of blocks nearest to ``BRANCH_BLOCK`` has them.
    """
    allowed: list[Scheme] = [FP16]
    refused: dict[str, str] = {}
    seen: dict[tuple[str, int | None], str] = {}
    for scheme in wanted:
        if scheme.weight is None:
            continue
        if scheme.branch and scheme.body not in _branch_bodies(allowed):
            continue
        block = block_size(layer, scheme)
        reason = refusal(layer, scheme) or _branch_refusal(layer, scheme)
        if not reason and block is None:
            reason = f"no divisor of its reduction {layer.reduction} lies near {scheme.block_size}"
        twin = seen.get((scheme.series, block))
        if not reason and scheme.branch:
            allowed.append(scheme)
            continue
        if not reason and twin:
            reason = f"same blocks of {block} as {twin}"
        if reason:
            refused[scheme.name] = reason
            continue
        seen[scheme.series, block] = scheme.name
        allowed.append(scheme)
    return Choices(tuple(allowed), refused)


def _branch_bodies(allowed: list[Scheme]) -> list[Scheme]:
    bodies: dict[str, Scheme] = {}
    for scheme in sorted(allowed, key=lambda s: abs(np.log2((s.block_size or BRANCH_BLOCK) / BRANCH_BLOCK))):
        if scheme.weight is not None and not scheme.branch:
            bodies.setdefault(scheme.series, scheme)
    return list(bodies.values())


def _branch_refusal(layer: Layer, scheme: Scheme) -> str:
    """Say why ``layer`` cannot have the branch of ``scheme``; empty when it can, or when there is none."""
    branch = scheme.branch
    if branch is None:
        return ""
    if layer.group > 1:
        return "branches are written for convolutions of one group"
    if branch.kind == "rows" and not promoted_rows(layer, scheme):
        return f"a tenth of its {layer.out_channels} output channels is none"
    if branch.kind == "cols" and 2 * outlier_columns(layer, scheme) > input_channels(layer):
        return f"its {input_channels(layer)} input channels are too few to take some out"
    if branch.kind == "lowrank" and 2 * branch.amount > min(layer.out_channels, layer.reduction):
        return f"a rank of {branch.amount} is no small part of its {layer.out_channels} x {layer.reduction} weight"
    return ""


def weight_matrix(layer: Layer, weight: Array) -> Array:
    """Bring a weight from its shape in the file to float32 [out_channels, reduction]."""
    matrix = weight.reshape(layer.out_channels, -1) if layer.out_axis == 0 else weight.T
    return np.ascontiguousarray(matrix, np.float32)


def fold_matrix(layer: Layer, matrix: Array) -> Array:
    """Bring a matrix [out_channels, reduction] back to the weight's shape in the file."""
    return np.ascontiguousarray((matrix if layer.out_axis == 0 else matrix.T).reshape(layer.weight_shape))


@dataclass(frozen=True)
class LayerCandidates:
    """All weights that a layer may be deployed with: ``forms`` by weight form, and the float one."""

    layer: Layer
    schemes: tuple[Scheme, ...]
    refused: dict[str, str]
    weight: Array
    forms: Mapping[str, DeployedMatrix]

    def weight_matrix(self, form: str) -> Array:
        """Return the deployed weight of a form, dequantized, float32 [out_channels, reduction]."""
        if form == FP16.weight_form:
            # Clipped as the file's are.
            return np.asarray(np.clip(self.weight, -LARGEST_SCALE, LARGEST_SCALE).astype(np.float16), np.float32)
        return self.forms[form].dequantize()

    def promoted(self, form: str) -> Array:
        """Return the output channels that ``form``, of a scheme with a ``rows`` branch, takes from INT8: int32 [m]."""
        matrix = self.forms[form]
        assert isinstance(matrix, RowsMatrix)
        return matrix.rows


def round_candidates(
    layer: Layer,
    choices: Choices,
    weight: Array,
    moments: Array,
    *,
    widths: tuple[int, ...],
    gptq: bool,
    damping: float,
    refinements: int = 0,
    also: tuple[Scheme, ...] = (),
    outliers: Array | None = None,
    factors: Array | None = None,
    input_amax: Array | None = None,
) -> LayerCandidates:
    """Round ``weight`` float32 [O, K] for every weight form that ``choices`` need, and for the schemes ``also``.

    ``moments`` is float [group * B, w, w]: for each group the B diagonal blocks of the mean of x x^T over the layer's
    inputs, of which block b covers ``widths[b]`` columns (their sum is K). With ``gptq`` False only the diagonal is
    used, as weights of the rounding error. ``refinements``: rounds of ``refine_rounding`` after GPTQ. ``outliers``: the
    input channels int32 [C], those to take out of INT8 first, where a scheme does that. ``factors`` float16 [C]: by
    what the input's channels are multiplied, where a scheme does that. ``input_amax`` [K]: the input's absolute maximum
    per column, for schemes that share out bits by the channels' kurtosis.
    """
    if not np.all(np.isfinite(weight)):
        raise ModelError(f"The weight '{layer.weight}' holds NaN or Inf.", "Mend the model before quantizing it.")
    simulated = [scheme for scheme in (*choices.schemes, *also) if scheme.simulated]
    forms = _rounded_forms(tuple(s for s in (*choices.schemes, *also) if not s.simulated))
    rows = layer.out_channels // layer.group
    per_group = len(moments) // layer.group
    parts: dict[str, list[QuantizedMatrix]] = {form: [] for form in forms}
    for group in range(layer.group):
        part = weight[group * rows : (group + 1) * rows]
        padded = moments[group * per_group : (group + 1) * per_group]
        blocks = [block[:width, :width] for block, width in zip(padded, widths, strict=True)]
        importance = np.concatenate([np.diagonal(block) for block in blocks])
        scaled = {form: _scaled(layer, scheme, part, importance) for form, scheme in forms.items()}
        codes = _rounded(part, scaled, forms, blocks if gptq else None, damping)
        # INT8 has little to gain, and w4a8's scales are tied to their channel's.
        free = [f for f, scheme in forms.items() if gptq and scheme.weight is INT4 and not scheme.requantized]
        refined = refine_rounding(part, [(codes[f], scaled[f][0]) for f in free], blocks, damping, refinements)
        rounded = {f: (codes[f], scaled[f][0]) for f in forms} | dict(zip(free, refined))
        for form in forms:
            parts[form].append(QuantizedMatrix(*rounded[form], scaled[form][1]))
    joined: dict[str, DeployedMatrix] = {form: _joined(pieces) for form, pieces in parts.items()}
    if simulated:
        kurtosis = None if input_amax is None else row_kurtosis(weight, input_amax)
        how = Rounding(gptq, damping, refinements)
        joined.update(_simulated_forms(layer, weight, simulated, moments, widths, how, kurtosis))
    for scheme in choices.schemes:
        # Branches are for one group, so ``blocks`` are those of the whole layer.
        if scheme.branch and scheme.branch.kind == "lowrank":
            joined[scheme.weight_form] = _with_low_rank(weight, joined, scheme, blocks, damping)
        if scheme.branch and scheme.branch.kind == "cols":
            assert outliers is not None, "schemes that take outlier channels out need to know them"
            channels = np.sort(outliers[: outlier_columns(layer, scheme)])
            joined[scheme.weight_form] = _with_columns(layer, weight, scheme, channels, blocks, gptq, damping)
        if scheme.branch and scheme.branch.kind == "scale":
            assert factors is not None, "schemes that rescale the input's channels need the factors"
            joined[scheme.weight_form] = _with_factors(layer, weight, scheme, factors, blocks, gptq, damping)
    return LayerCandidates(layer, choices.schemes, choices.refused, weight, joined)


def _rounded_forms(schemes: tuple[Scheme, ...]) -> dict[str, Scheme]:
    """Return the schemes to round by weight form: bodies of branches, and the INT8 that promoted rows come from."""
    needed = [s.body for s in schemes if s.weight is not None]
    needed += [W8A16 for s in schemes if s.branch and s.branch.kind == "rows"]
    return {s.weight_form: s for s in needed}


def _with_low_rank(
    weight: Array, forms: Mapping[str, DeployedMatrix], scheme: Scheme, blocks: list[Array], damping: float
) -> LowRankMatrix:
    body = forms[scheme.body.weight_form]
    assert isinstance(body, QuantizedMatrix) and scheme.branch is not None
    down, up = low_rank_factors(weight - body.dequantize(), blocks, damping, scheme.branch.amount)
    return LowRankMatrix(body, down, up)


def _with_columns(
    layer: Layer, weight: Array, scheme: Scheme, channels: Array, blocks: list[Array], gptq: bool, damping: float
) -> ColsMatrix:
    """Round the body without the outlier ``channels``: their errors and their sizes are none of its concern."""
    taps = layer.reduction // input_channels(layer)
    rest, moments = without_columns(weight, blocks, columns_of(channels, taps))
    return beside_body(_rounded_alone(layer, rest, scheme.body, moments, gptq, damping), weight, channels, taps)


def _with_factors(
    layer: Layer, weight: Array, scheme: Scheme, factors: Array, blocks: list[Array], gptq: bool, damping: float
) -> ScaledMatrix:
    """Round the weight that the rescaled input sees."""
    taps = layer.reduction // input_channels(layer)
    divided, moments = rescaled(weight, blocks, by_column(factors, taps))
    return ScaledMatrix(_rounded_alone(layer, divided, scheme.body, moments, gptq, damping), factors)


def _rounded_alone(
    layer: Layer, weight: Array, body: Scheme, moments: list[Array], gptq: bool, damping: float
) -> QuantizedMatrix:
    """Round a weight of its own, which shares nothing with the other forms."""
    importance = np.concatenate([np.diagonal(block) for block in moments])
    form = body.weight_form
    scaled = {form: _scaled(layer, body, weight, importance)}
    codes = _rounded(weight, scaled, {form: body}, moments if gptq else None, damping)
    return QuantizedMatrix(codes[form], *scaled[form])


def _simulated_forms(
    layer: Layer,
    weight: Array,
    schemes: list[Scheme],
    moments: Array,
    widths: tuple[int, ...],
    how: Rounding,
    kurtosis: Array | None,
) -> dict[str, DeployedMatrix]:
    """Round ``weight`` for the simulated ``schemes``; the arguments are those of ``round_candidates``."""
    distinct = {scheme.weight_form: scheme for scheme in schemes}
    wanted = needed_forms(list(distinct.values()))
    rows, per_group = layer.out_channels // layer.group, len(moments) // layer.group
    parts: dict[RowForm, list[SimulatedMatrix]] = {form: [] for form in wanted}
    errors: dict[RowForm, list[Array]] = {form: [] for form in wanted}
    for group in range(layer.group):
        part = weight[group * rows : (group + 1) * rows]
        padded = moments[group * per_group : (group + 1) * per_group]
        blocks = [block[:width, :width] for block, width in zip(padded, widths, strict=True)]
        for form, matrix in round_forms(part, wanted, blocks, how).items():
            parts[form].append(matrix)
            errors[form].append(row_errors(part, matrix, blocks))
    rounded = {form: stacked(found) for form, found in parts.items()}
    lost = {form: np.concatenate(found) for form, found in errors.items()}
    return {name: assemble(scheme, rounded, lost, kurtosis) for name, scheme in distinct.items()}


def with_promoted_rows(candidates: LayerCandidates, order: Array) -> LayerCandidates:
    """Return ``candidates`` with the forms of its ``rows`` schemes: INT8 for the first channels of ``order`` [O]."""
    forms = dict(candidates.forms)
    for scheme in candidates.schemes:
        if scheme.branch and scheme.branch.kind == "rows":
            body, int8 = forms[scheme.body.weight_form], forms[W8A8.weight_form]
            assert isinstance(body, QuantizedMatrix) and isinstance(int8, QuantizedMatrix)
            forms[scheme.weight_form] = promote_rows(body, int8, order[: promoted_rows(candidates.layer, scheme)])
    return replace(candidates, forms=forms)


def _scaled(layer: Layer, scheme: Scheme, weight: Array, importance: Array) -> tuple[Array, Array | None]:
    """Choose the scales of one form: ([O, B] float16, channel scales [O] float16 or None)."""
    if scheme.weight is INT8:
        return choose_scale(weight, importance, 1, INT8.bits), None
    block = block_size(layer, scheme)
    assert block is not None, "choices_for admits only schemes with a block size"
    scale = choose_scale(weight, importance, layer.reduction // block, INT4.bits)
    return choose_multiple_scale(weight, importance, scale) if scheme.requantized else (scale, None)


def _rounded(
    weight: Array,
    scaled: dict[str, tuple[Array, Array | None]],
    forms: dict[str, Scheme],
    blocks: list[Array] | None,
    damping: float,
) -> dict[str, Array]:
    """Round ``weight`` [O, K] for all forms at once: they share the input, so they share GPTQ's factor."""
    grids = {}
    for form, (scale, channel) in scaled.items():
        precision = forms[form].weight or INT8
        step = QuantizedMatrix(np.zeros_like(weight, np.int8), scale, channel).effective_scale()
        columns = np.repeat(np.arange(step.shape[1]), weight.shape[1] // step.shape[1])
        grids[form] = Grid(step, columns, precision.quant_min, precision.quant_max)
    if blocks is None:
        return {form: grid.nearest(weight) for form, grid in grids.items()}
    pieces: dict[str, list[Array]] = {form: [] for form in grids}
    start = 0
    for block in blocks:
        span = slice(start, start + len(block))
        start += len(block)
        cut = [grid.cut(span) for grid in grids.values()]
        for form, codes in zip(grids, gptq_codes(weight[:, span], cut, block, damping) if cut else []):
            pieces[form].append(codes)
    return {form: np.concatenate(codes, axis=1) for form, codes in pieces.items()}


def _joined(pieces: list[QuantizedMatrix]) -> QuantizedMatrix:
    channels = [p.channel_scale for p in pieces if p.channel_scale is not None]
    return QuantizedMatrix(
        np.concatenate([p.codes for p in pieces]),
        np.concatenate([p.scale for p in pieces]),
        np.concatenate(channels) if channels else None,
    )


def save_candidates(candidates: LayerCandidates, path: Path) -> None:
    """Write the codes and scales of one layer as safetensors (the float weight stays in the model)."""
    from safetensors.numpy import save

    arrays: dict[str, Array] = {}
    for form, matrix in candidates.forms.items():
        if isinstance(matrix, RowsMatrix):
            continue  # two other forms and an order of the channels make it
        if isinstance(matrix, SimulatedMatrix):
            parts = {**vars(matrix.grids), "levels": matrix.codes, "signs": matrix.signs}
            # Channels were picked from several forms; safetensors writes an array's memory as it lies.
            arrays.update({f"{form}.simulated.{name}": np.ascontiguousarray(a) for name, a in parts.items()})
            continue
        if isinstance(matrix, ColsMatrix):
            arrays[f"{form}.columns"] = matrix.columns
            matrix = matrix.body
        if isinstance(matrix, ScaledMatrix):
            arrays[f"{form}.factors"] = matrix.factors
            matrix = matrix.body
        if isinstance(matrix, LowRankMatrix):
            arrays[f"{form}.down"], arrays[f"{form}.up"] = matrix.down, matrix.up
            continue
        arrays[f"{form}.codes"] = matrix.codes
        arrays[f"{form}.scale"] = matrix.scale
        if matrix.channel_scale is not None:
            arrays[f"{form}.channel_scale"] = matrix.channel_scale
    # A layer that may only be FP16 has no arrays; safetensors wants at least a header, which it writes.
    choices = {"schemes": [s.name for s in candidates.schemes], "refused": candidates.refused}
    # One entry: safetensors writes several in random order, and equal candidates must give equal bytes.
    # Written by us: a full disk is then an OSError like any other, not one of safetensors' own.
    path.write_bytes(save(arrays, metadata={"choices": json.dumps(choices, sort_keys=True)}))


def load_choices(path: Path) -> Choices:
    """Read only which schemes a layer may take, and why not the others."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return _choices(file.metadata())


def _choices(metadata: dict[str, str]) -> Choices:
    choices = json.loads(metadata["choices"])
    return Choices(tuple(SCHEMES[name] for name in choices["schemes"]), choices["refused"])


def load_candidates(layer: Layer, weight: Array, path: Path) -> LayerCandidates:
    """Read what ``save_candidates`` wrote; ``weight`` is the float matrix [out_channels, reduction]."""
    from safetensors import safe_open

    forms: dict[str, DeployedMatrix] = {}
    with safe_open(path, framework="numpy") as file:
        names = set(file.keys())
        choices = _choices(file.metadata())
        for form in sorted({name.rsplit(".", 1)[0] for name in names if name.endswith(".codes")}):
            channel = f"{form}.channel_scale"
            body = QuantizedMatrix(
                file.get_tensor(f"{form}.codes"),
                file.get_tensor(f"{form}.scale"),
                file.get_tensor(channel) if channel in names else None,
            )
            forms[form] = body
            if f"{form}.columns" in names:
                taps = layer.reduction // input_channels(layer)
                forms[form] = beside_body(body, weight, file.get_tensor(f"{form}.columns"), taps)
            if f"{form}.factors" in names:
                forms[form] = ScaledMatrix(body, file.get_tensor(f"{form}.factors"))
        for form in sorted({name.split(".")[0] for name in names if ".simulated." in name}):
            parts = {key: file.get_tensor(f"{form}.simulated.{key}") for key in (*GRID_ARRAYS, "levels", "signs")}
            grids = RowGrids(*(parts[key] for key in GRID_ARRAYS))
            forms[form] = SimulatedMatrix(grids, parts["levels"], parts["signs"])
        for form in sorted({name.rsplit(".", 1)[0] for name in names if name.endswith(".down")}):
            beside = forms[form.split("+")[0]]
            assert isinstance(beside, QuantizedMatrix)
            forms[form] = LowRankMatrix(beside, file.get_tensor(f"{form}.down"), file.get_tensor(f"{form}.up"))
    return LayerCandidates(layer, choices.schemes, choices.refused, weight, forms)
