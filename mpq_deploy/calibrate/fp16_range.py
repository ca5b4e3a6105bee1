"""Which values of the float model pass FP16's range, by recorded calls.

In: the float graph and some calls. Out: the largest value of each node that computes in FP16.
Models that were trained in bfloat16 have such values in the middle and none at the end: the nodes
that make and read them stay in FP32 (``graph.fp16_region``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from pydantic import FiniteFloat

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.graph.fp16_region import fp16_region
from mpq_deploy.graph.layers import LAYER_OPS
from mpq_deploy.graph.load import load_model
from mpq_deploy.system.files import canonical_json
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.lanes import in_lanes, lanes_for
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import constants_of, open_session
from mpq_deploy.system.validated import model_of

LARGEST_FP16 = 65504.0
# Nodes keep FP32 from this on: other calls reach further than the watched ones (our choice).
WIDE_FROM = LARGEST_FP16 / 2
BEYOND = "beyond_fp16.json"
# Nodes named in a message.
NAMED = 3


@dataclass(frozen=True)
class LargeValue:
    """``most``: the largest value that ``node``, of type ``op``, gave."""

    node: str
    op: str
    most: float


def large_values(
    model: Path,
    calls: RecordedCalls,
    talk: Talk,
    beyond: Iterable[str] = (),
    above: float = LARGEST_FP16,
) -> tuple[LargeValue, ...]:
    """Return the FP16 nodes whose values in the float ``model`` pass ``above``, in graph order.

    ``beyond``: nodes known before, which are no FP16 nodes. Of layers the largest magnitude counts,
    of others only values above zero: masks are as far below it as can be, and do no harm as minus
    infinity.
    """
    watched = load_model(model)
    region = fp16_region(
        watched, calls.spec.timestep_name, calls.spec.sample.name, frozenset(beyond)
    )
    seen: list[ir.Node] = []
    outputs = []
    for node in list(watched.graph):
        if node.name in region.nodes32 or node.name in region.wide:
            continue
        for value in node.outputs:
            if value.name and value.dtype == ir.DataType.FLOAT:
                added = _largest(value, node.op_type in LAYER_OPS)
                watched.graph.insert_after(node, added)
                outputs.append(added[-1].outputs[0])
                outputs[-1].name = f"largest.{len(seen)}"
                seen.append(node)
    watched.graph.outputs.clear()
    watched.graph.outputs.extend(outputs)
    largest = np.full(len(seen), -np.inf)
    lanes = lanes_for(sum(tensor.nbytes for tensor in constants_of(watched)))
    with open_session(watched, talk, threads=lanes.threads) as session:
        inputs = {entry.name for entry in session.get_inputs()}
        feeds = ({n: v for n, v in b.feed.items() if n in inputs} for b in calls.batches(1))
        for values in in_lanes(partial(session.run, None), feeds, lanes.count):
            np.maximum(largest, np.array(values, np.float64), out=largest)
    return tuple(
        LargeValue(node.name or "", node.op_type, float(most))
        for node, most in zip(seen, largest, strict=True)
        if not most <= above
    )


def _largest(value: ir.Value, magnitude: bool) -> list[ir.Node]:
    """Return nodes that give the largest value, or magnitude, as a scalar."""
    sizes = [ir.node("Abs", [value])] if magnitude else []
    source = sizes[-1].outputs[0] if sizes else value
    last = ir.node("ReduceMax", [source], attributes={"keepdims": 0})
    last.outputs[0].shape, last.outputs[0].type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
    return [*sizes, last]


def named(large: Iterable[LargeValue]) -> str:
    """Name the nodes, the first ``NAMED`` of them with their values."""
    large = tuple(large)
    nodes = ", ".join(f"{one.node} ({one.op}) {one.most:.3g}" for one in large[:NAMED])
    more = f" and {len(large) - NAMED} more" if len(large) > NAMED else ""
    return f"{nodes}{more}"


def save_beyond(large: Iterable[LargeValue], folder: Path) -> None:
    """Write the largest value by node."""
    # JSON has no infinity: masks may hold one.
    limit = float(np.finfo(np.float32).max)
    values = {one.node: float(np.nan_to_num(one.most, nan=limit, posinf=limit)) for one in large}
    (folder / BEYOND).write_text(canonical_json(values), encoding="utf-8")


def read_beyond(folder: Path) -> tuple[str, ...]:
    """Return the nodes that ``save_beyond`` wrote. Raises InputError for another file."""
    path = folder / BEYOND
    values: dict[str, float] = model_of(dict[str, FiniteFloat], read_json_object(path), str(path))
    return tuple(values)
