"""The network as a picture: layers in graph order, a row per block, colour for scheme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpq_deploy.allocate.front import least_so_far
from mpq_deploy.formats.scheme import FAMILIES, SCHEMES
from mpq_deploy.report.data import LayerOption, LayerRow, ReportData
from mpq_deploy.report.words import NOT_PREDICTED, error, percent, size

# More rows than this and blocks are joined by the first part of their name alone.
MOST_ROWS = 40


@dataclass(frozen=True)
class Block:
    """One layer in the picture. ``width`` in percent of the widest row."""

    index: int
    family: str
    scheme: str
    width: float
    text: str
    branch: str


@dataclass(frozen=True)
class Row:
    """Neighbouring layers whose names begin alike."""

    name: str
    bytes: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class LegendEntry:
    """A family of schemes and how much of the model took it."""

    family: str
    meaning: str
    layers: int
    bytes: int
    share: str


def network_rows(layers: Sequence[LayerRow]) -> list[Row]:
    """Group ``layers`` into rows; the row of most bytes is 100 % wide."""
    groups = _grouped(layers, 2)
    if len(groups) > MOST_ROWS:
        groups = _grouped(layers, 1)
    widest = max((sum(layer.bytes for _, layer in group) for _, group in groups), default=0) or 1
    return [
        Row(
            name,
            sum(layer.bytes for _, layer in group),
            tuple(
                Block(
                    i,
                    family(layer.scheme),
                    layer.scheme,
                    100 * layer.bytes / widest,
                    layer_label(layer),
                    branch(layer.scheme),
                )
                for i, layer in group
            ),
        )
        for name, group in groups
    ]


def legend(data: ReportData) -> list[LegendEntry]:
    """Return the families in use, the widest format first."""
    total = sum(layer.bytes for layer in data.layers) or 1
    used: dict[str, list[LayerRow]] = {}
    for layer in data.layers:
        used.setdefault(family(layer.scheme), []).append(layer)
    names = in_order(used)
    return [
        LegendEntry(
            name,
            SCHEMES[used[name][0].scheme].meaning if used[name][0].scheme in SCHEMES else "",
            len(used[name]),
            sum(layer.bytes for layer in used[name]),
            percent(sum(layer.bytes for layer in used[name]) / total),
        )
        for name in names
    ]


def in_order(names: Iterable[str]) -> list[str]:
    """Return families, the widest format first, simulated ones last."""
    return sorted(
        names, key=lambda name: (FAMILIES.index(name) if name in FAMILIES else len(FAMILIES), name)
    )


def layer_details(data: ReportData) -> list[dict[str, object]]:
    """Return what the page shows when a layer is pointed at, in graph order.

    ``steps``: its predicted error at each of ``loss_timesteps``; empty where none is predicted.
    """
    total = sum(layer.predicted_loss or 0.0 for layer in data.layers)
    price = byte_price(data)
    return [
        {
            "name": layer.name,
            "facts": [
                ["Operator", layer.op],
                [
                    "Weight",
                    " × ".join(map(str, layer.weight_shape)) or f"{layer.weights:,} elements",
                ],
                ["Scheme", f"{layer.scheme} ({meaning(layer.scheme)})"],
                ["Size", f"{size(layer.bytes)}, {_of_fp16(layer)}"],
                ["Predicted error", _loss(layer, total)],
                *_kurtosis(layer),
                *_importance(layer),
            ],
            "why": why(layer, data, price),
            "steps": [float(f"{loss:.2e}") for loss in layer.loss_by_timestep],
            "refused": [[scheme, reason] for scheme, reason in sorted(layer.refused.items())],
        }
        for layer in data.layers
    ]


def byte_price(data: ReportData) -> float | None:
    """Return the predicted error that a byte saves at this run's size: the slope of the minimum error over size.

    Taken between the nearest plans on both sides; None where one is missing or it does not fall.
    """
    if data.budgets is None:
        return None
    plans = data.budgets.plans
    line = [plans[number] for number in least_so_far([p.predicted_nmse for p in plans])]
    known = [(p.size_bytes, p.predicted_nmse) for p in line if p.predicted_nmse is not None]
    below = max((p for p in known if p[0] < data.size_bytes), default=None)
    above = min((p for p in known if p[0] > data.size_bytes), default=None)
    if below is None or above is None or above[1] >= below[1]:
        return None
    return (below[1] - above[1]) / (above[0] - below[0])


def why(layer: LayerRow, data: ReportData, price: float | None) -> list[str]:
    """Explain a layer's scheme by what a smaller and a larger one would change."""
    if data.budgets is None:
        return []
    smaller, larger = data.budgets.smaller.get(layer.name), data.budgets.larger.get(layer.name)
    parts = []
    if smaller is not None:
        saved = size(layer.bytes - smaller.bytes)
        parts.append(f"{smaller.scheme} would save {saved}{_change(layer, smaller, 'add')}.")
    if larger is not None:
        parts.append(
            f"{larger.scheme} would cost {size(larger.bytes - layer.bytes)}{_change(layer, larger, 'take off')}."
        )
    if smaller is None and larger is None:
        return ["It is the only scheme that this layer may take, or the only useful one."]
    if smaller is None:
        parts.append("It may take no smaller scheme.")
    if larger is None and layer.predicted_loss is not None:
        parts.append("No larger scheme would lower its predicted error.")
    if price is not None and layer.predicted_loss is not None:
        parts.append(
            f"At this size 1 kB is worth about {error(1000 * price)} of predicted error anywhere in the network."
        )
    return parts


def _change(layer: LayerRow, option: LayerOption, verb: str) -> str:
    """Say what an option does to the predicted error, in all and per kB."""
    if layer.predicted_loss is None or option.predicted_loss is None:
        return ""
    change = option.predicted_loss - layer.predicted_loss
    apart = abs(option.bytes - layer.bytes)
    if change <= 0 and verb == "add":
        return (
            " without adding predicted error of its own; against it stands a quantizer or branch that it needs, "
            "or how its error adds up with those of other layers"
        )
    return f" and {verb} {error(abs(change))} ({error(1000 * abs(change) / apart)} per kB)"


def _kurtosis(layer: LayerRow) -> list[list[str]]:
    return (
        []
        if layer.kurtosis is None
        else [["Kurtosis", f"{layer.kurtosis:.3g} (normal: 3; more means outliers)"]]
    )


def layer_label(layer: LayerRow) -> str:
    """Return a layer in one line, for screen readers and tooltips."""
    return f"{layer.name}, {layer.op}, {layer.scheme}, {size(layer.bytes)}"


def family(scheme: str) -> str:
    """Return a scheme's name without block size and branch; an unknown one as it is."""
    return SCHEMES[scheme].series if scheme in SCHEMES else scheme


def branch(scheme: str) -> str:
    """Return the kind of a scheme's branch, such as rows; empty without one."""
    return SCHEMES[scheme].branch.kind if scheme in SCHEMES else ""


def meaning(scheme: str) -> str:
    """Say in words what a scheme is."""
    if scheme not in SCHEMES:
        return "custom"
    body, beside = SCHEMES[scheme].meaning, SCHEMES[scheme].branch.meaning
    return f"{body}; {beside}" if beside else body


def branched(data: ReportData) -> tuple[int, int]:
    """Return how many layers have a branch, and their bytes, body and branch."""
    branched = [layer for layer in data.layers if branch(layer.scheme)]
    return len(branched), sum(layer.bytes for layer in branched)


def _of_fp16(layer: LayerRow) -> str:
    return (
        f"{percent(layer.bytes / layer.fp16_bytes)} of FP16"
        if layer.fp16_bytes
        else "nothing in FP16"
    )


def _loss(layer: LayerRow, total: float) -> str:
    if layer.predicted_loss is None:
        return NOT_PREDICTED
    share = f", {percent(layer.predicted_loss / total)} of all layers' sum" if total else ""
    return f"{error(layer.predicted_loss)}{share}"


def _importance(layer: LayerRow) -> list[list[str]]:
    if layer.importance is None or layer.linear_bits is None:
        return []
    bits = f"{layer.importance:.3f}; the linear program gives it {layer.linear_bits:.3g} bits"
    return [["Importance", bits]]


def _grouped(
    layers: Sequence[LayerRow], parts: int
) -> list[tuple[str, list[tuple[int, LayerRow]]]]:
    groups: list[tuple[str, list[tuple[int, LayerRow]]]] = []
    for index, layer in enumerate(layers):
        name = _block_name(layer.name, parts)
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        groups[-1][1].append((index, layer))
    return groups


def _block_name(name: str, parts: int) -> str:
    """Return the block of a layer: ``down_blocks.0`` of ``down_blocks.0.resnets.1.conv1``."""
    pieces = name.split(".")
    taken = pieces[:1]
    if parts > 1 and len(pieces) > 2 and pieces[1].isdigit():
        taken = pieces[:2]
    return ".".join(taken)
