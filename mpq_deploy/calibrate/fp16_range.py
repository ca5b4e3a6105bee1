"""Find values of the float model that exceed FP16's range on recorded calls.

In: the float graph and some calls. Out: the nodes that would compute in FP16 but exceed its range.
Models that were trained in bfloat16 have such values inside the network, though not at its output.
The nodes that make and read them stay in FP32 (``graph.fp16_region``).
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
# Nodes stay in FP32 above this value: other calls may reach further than the observed ones (our
# choice).
WIDE_FROM = LARGEST_FP16 / 2
BEYOND = "beyond_fp16.json"
# How many nodes a message names.
NAMED = 3


@dataclass(frozen=True)
class LargeValue:
    """``most``: the largest value of the outputs of ``node``, whose operator is ``op``."""

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
    """Return the FP16 nodes whose values in the float ``model`` exceed ``above``, in graph order.

    ``beyond``: nodes already known to exceed the range, which stay in FP32. For layers the largest
    magnitude counts, for other nodes the largest value: attention masks have huge negative values,
    which may become minus infinity.
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
    if not seen:
        # All of it computes in FP32.
        return ()
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
    """Return nodes that compute the largest value, or magnitude, of ``value`` as a scalar."""
    sizes = [ir.node("Abs", [value])] if magnitude else []
    source = sizes[-1].outputs[0] if sizes else value
    last = ir.node("ReduceMax", [source], attributes={"keepdims": 0})
    last.outputs[0].shape, last.outputs[0].type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
    return [*sizes, last]


def named(large: Iterable[LargeValue]) -> str:
    """Return a text with the first ``NAMED`` nodes, their values, and the number of others."""
    large = tuple(large)
    nodes = ", ".join(f"{one.node} ({one.op}) {one.most:.3g}" for one in large[:NAMED])
    more = f" and {len(large) - NAMED} more" if len(large) > NAMED else ""
    return f"{nodes}{more}"


def save_beyond(large: Iterable[LargeValue], folder: Path) -> None:
    """Write node name -> largest value to ``BEYOND`` in ``folder``."""
    # JSON has no infinity or NaN.
    limit = float(np.finfo(np.float32).max)
    values = {one.node: float(np.nan_to_num(one.most, nan=limit, posinf=limit)) for one in large}
    (folder / BEYOND).write_text(canonical_json(values), encoding="utf-8")


def read_beyond(folder: Path) -> tuple[str, ...]:
    """Return the node names that ``save_beyond`` wrote. Raises InputError for an invalid file."""
    path = folder / BEYOND
    values: dict[str, float] = model_of(dict[str, FiniteFloat], read_json_object(path), str(path))
    return tuple(values)
