"""The candidates of a layer: the schemes that it may take, their weights, why others are refused.

In: a layer, the recipe's schemes, the target's rules, the second moments of the input. Out: the
codes and scales of each weight form, exactly as they would be deployed: measuring, allocating and
writing use the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.errors import InputError, ModelError
from mpq_deploy.formats.branches.rows import RowsMatrix
from mpq_deploy.formats.interfaces import DeployedMatrix, Rounder, StoredMatrix
from mpq_deploy.formats.layer_rounding import InputMoments, LayerRounding
from mpq_deploy.formats.scheme import FP16, SCHEMES, Scheme
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.quantizers import LARGEST_SCALE, Rounding
from mpq_deploy.system.inputs import open_input, parse_json, whole

Refusal = Callable[[Layer, Scheme], str]
# Of a layer's bodies that differ in block size only, the one nearest to this gets branches: the
# candidates would otherwise be block sizes times branches.
BRANCH_BLOCK = 128


@dataclass(frozen=True)
class Choices:
    """The schemes that a layer may take, and ``refused``: scheme -> why it may not.

    ``also``: schemes that are rounded whether the layer may take them or not (for controls).
    """

    schemes: tuple[Scheme, ...]
    refused: dict[str, str]
    also: tuple[Scheme, ...] = ()

    @property
    def forms(self) -> frozenset[str]:
        """The weight forms that are rounded and stored."""
        quantized = [s for s in (*self.schemes, *self.also) if s.quantized]
        first = (one for s in quantized for one in s.branch.rounds_first(s))
        made = (s for s in quantized if not s.branch.promotes)
        return frozenset(scheme.weight_form for scheme in (*first, *made))


def choices_for(layer: Layer, wanted: tuple[Scheme, ...], refusal: Refusal) -> Choices:
    """Sort the ``wanted`` schemes into those ``layer`` may take and those refused, with reasons.

    FP16 is always allowed. Nominal block sizes that give the same real block size are one
    candidate. In ``wanted`` branches follow the bodies. Of bodies of one family and range only the
    one whose block size is nearest to ``BRANCH_BLOCK`` gets branches.
    """
    allowed: list[Scheme] = [FP16]
    bodies: list[Scheme] | None = None
    refused: dict[str, str] = {}
    seen: dict[tuple[str, str, int | None], str] = {}
    for scheme in wanted:
        if scheme.branch and bodies is None:
            bodies = _branch_bodies(allowed)
        if not scheme.quantized or (scheme.branch and scheme.body not in (bodies or ())):
            continue
        reason = refusal(layer, scheme) or scheme.refusal(layer)
        blocks = scheme.series, scheme.range.kind, scheme.weight.block(layer)
        if not reason and not scheme.branch:
            if blocks in seen:
                reason = f"same blocks of {blocks[2]} as {seen[blocks]}"
            else:
                seen[blocks] = scheme.name
        if reason:
            refused[scheme.name] = reason
        else:
            allowed.append(scheme)
            bodies = bodies if scheme.branch else None
    return Choices(tuple(allowed), refused)


def _branch_bodies(allowed: list[Scheme]) -> list[Scheme]:
    bodies: dict[tuple[str, str], Scheme] = {}
    for scheme in sorted(
        allowed, key=lambda s: abs(log2((s.block_size or BRANCH_BLOCK) / BRANCH_BLOCK))
    ):
        if scheme.quantized and not scheme.branch:
            bodies.setdefault((scheme.series, scheme.range.kind), scheme)
    return list(bodies.values())


def weight_matrix(layer: Layer, weight: Array) -> Array:
    """Return ``weight``, in its shape in the file, as float32 [out_channels, reduction]."""
    matrix = weight.reshape(layer.out_channels, -1) if layer.out_axis == 0 else weight.T
    return np.ascontiguousarray(matrix, np.float32)


def fold_matrix(layer: Layer, matrix: Array) -> Array:
    """Return ``matrix`` [out_channels, reduction] in the weight's shape in the file."""
    return np.ascontiguousarray(
        (matrix if layer.out_axis == 0 else matrix.T).reshape(layer.weight_shape)
    )


@dataclass(frozen=True)
class LayerCandidates:
    """All weights that a layer may be deployed with.

    ``weight``: the float weight [O, K]; ``forms``: weight form -> codes and scales.
    """

    layer: Layer
    schemes: tuple[Scheme, ...]
    refused: dict[str, str]
    weight: Array
    forms: Mapping[str, DeployedMatrix]

    def weight_matrix(self, form: str) -> Array:
        """Return the dequantized weight of a form, float32 [out_channels, reduction]."""
        if form == FP16.weight_form:
            # Clipped as when the file is written.
            return np.asarray(
                np.clip(self.weight, -LARGEST_SCALE, LARGEST_SCALE).astype(np.float16), np.float32
            )
        return self.forms[form].dequantize()

    def promoted(self, form: str) -> Array:
        """Return the output channels that a ``form`` that promotes has in INT8, int32 [m]."""
        matrix = self.forms[form]
        assert isinstance(matrix, RowsMatrix)
        return matrix.rows


def round_candidates(
    layer: Layer,
    choices: Choices,
    weight: Array,
    inputs: InputMoments,
    how: Rounding,
    known: Mapping[str, DeployedMatrix] | None = None,
) -> LayerCandidates:
    """Round ``weight`` float32 [O, K] for the weight forms of ``choices``.

    ``known``: forms that are reused. Raises ModelError when the weight holds NaN or Inf.
    """
    if not np.all(np.isfinite(weight)):
        raise ModelError(
            f"The weight '{layer.weight}' holds NaN or Inf.",
            "Repair the model before quantizing it.",
        )
    work = LayerRounding(layer, weight, inputs, how)
    forms = dict(known or {})
    for rounder, schemes in _by_rounder((*choices.schemes, *choices.also)).items():
        missing = [scheme for scheme in schemes if scheme.weight_form not in forms]
        if missing:
            forms.update(rounder(missing, work))
    for scheme in choices.schemes:
        # Schemes that differ in the input's range share a weight form.
        matrix = None if scheme.weight_form in forms else scheme.branch.round(scheme, work, forms)
        if matrix is not None:
            forms[scheme.weight_form] = matrix
    return LayerCandidates(layer, choices.schemes, choices.refused, weight, forms)


def _by_rounder(schemes: Iterable[Scheme]) -> dict[Rounder, list[Scheme]]:
    """Group the schemes that are rounded first (usually the bodies) by their rounder."""
    needed = [s.branch.rounds_first(s) for s in schemes if s.quantized]
    groups: dict[Rounder, list[Scheme]] = {}
    for first in (*(each[0] for each in needed), *(one for each in needed for one in each[1:])):
        groups.setdefault(first.weight.rounder, []).append(first)
    return groups


def with_promoted_rows(candidates: LayerCandidates, order: Array) -> LayerCandidates:
    """Return ``candidates`` with the forms that promote the first channels of ``order`` int [O]."""
    forms = dict(candidates.forms)
    for scheme in candidates.schemes:
        if scheme.branch.promotes:
            forms[scheme.weight_form] = scheme.branch.assemble(
                scheme, candidates.layer, forms, order
            )
    return replace(candidates, forms=forms)


def save_candidates(candidates: LayerCandidates, path: Path) -> None:
    """Write one layer's codes and scales as safetensors, without the float weight."""
    from safetensors.numpy import save

    arrays = {
        f"{form}.{name}": array
        for form, matrix in candidates.forms.items()
        for name, array in matrix.arrays().items()
    }
    choices = {"schemes": [s.name for s in candidates.schemes], "refused": candidates.refused}
    # One metadata entry: safetensors writes several in random order, and equal candidates must give
    # equal bytes. ``write_bytes`` raises OSError on a full disk, safetensors an error of its own.
    path.write_bytes(save(arrays, metadata={"choices": json.dumps(choices, sort_keys=True)}))


def load_choices(path: Path) -> Choices:
    """Read only the schemes that a layer may take, and why others are refused."""
    with _opened(path) as file:
        return _choices(file.metadata())


def form_names(path: Path) -> frozenset[str]:
    """Read only the names of the weight forms in a file."""
    with _opened(path) as file:
        return frozenset(name.partition(".")[0] for name in sorted(file.keys()))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises InputError, which names the file, for an invalid one."""
    from safetensors import SafetensorError, safe_open

    open_input(path).close()
    try:
        with whole(path), safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a safetensors file: {error}.", "Create it again."
        ) from error


def _choices(metadata: dict[str, str]) -> Choices:
    choices = parse_json(metadata["choices"], "choices")
    return Choices(tuple(SCHEMES[name] for name in choices["schemes"]), choices["refused"])


def load_candidates(layer: Layer, weight: Array, path: Path) -> LayerCandidates:
    """Read what ``save_candidates`` wrote; ``weight``: float [out_channels, reduction]."""
    stored: dict[str, dict[str, Array]] = {}
    with _opened(path) as file:
        choices = _choices(file.metadata())
        for name in sorted(file.keys()):
            form, _, part = name.partition(".")
            stored.setdefault(form, {})[part] = file.get_tensor(name)
    with whole(path):
        forms = _forms(stored, layer, weight)
    return LayerCandidates(layer, choices.schemes, choices.refused, weight, forms)


def _check_sizes(form: str, arrays: Mapping[str, Array], rows: int, columns: int) -> None:
    """Raise ValueError where arrays do not fit a weight [rows, columns]: another layer's file."""
    for part, array in arrays.items():
        name = part.rpartition(".")[2]
        fits = {
            **dict.fromkeys(("codes", "levels"), array.shape == (rows, columns)),
            **dict.fromkeys(
                ("scale", "channel_scale", "low", "high", "up"), array.shape[:1] == (rows,)
            ),
            "down": array.shape[1:] == (columns,),
        }.get(name, True)
        if name == "scale" and array.ndim == 2:
            fits = fits and array.shape[1] > 0 and columns % array.shape[1] == 0
        if not fits:
            shape = list(array.shape)
            raise ValueError(f"{form}.{part} has the shape {shape} for a weight {[rows, columns]}")


def _forms(
    stored: dict[str, dict[str, Array]], layer: Layer, weight: Array
) -> dict[str, DeployedMatrix]:
    schemes = {scheme.weight_form: scheme for scheme in SCHEMES.values()}
    forms: dict[str, DeployedMatrix] = {}
    # Bodies first, because branches may use them.
    for form, arrays in sorted(stored.items(), key=lambda item: bool(schemes[item[0]].branch)):
        _check_sizes(form, arrays, *weight.shape)
        scheme = schemes[form]
        body = forms.get(scheme.body.weight_form)
        forms[form] = scheme.branch.read(scheme, StoredMatrix(arrays, layer, weight, body))
    return forms
