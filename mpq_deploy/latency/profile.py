"""Make a latency table: build an engine per layer shape and scheme, and time it here.

In: a run (its export and calibration), a target. Out: a ``LatencyTable``. Where nothing can be
timed, one line says why and what would be. Building on TensorRT-RTX was tested here; timing is
unproven: no GPU was available.
"""

from __future__ import annotations

import datetime
import importlib.util
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.device.cuda import why_no_gpu
from mpq_deploy.device.manifest import Reference
from mpq_deploy.device.run import Run, run_engine
from mpq_deploy.engine.builder import ENGINE, BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.engine.target import Target
from mpq_deploy.engine.trtexec import find_trtexec
from mpq_deploy.errors import EngineError, UsageError
from mpq_deploy.formats.candidates import choices_for
from mpq_deploy.formats.scheme import FP16, SCHEMES, Scheme
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.layers import Layer
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED
from mpq_deploy.latency.costs import LatencyCosts
from mpq_deploy.latency.latency_table import LatencyTable, LayerShape
from mpq_deploy.latency.one_layer import INPUT, OUTPUT, OneLayer, write_one_layer
from mpq_deploy.latency.plan_latency import call_shapes
from mpq_deploy.latency.roofline import Rates
from mpq_deploy.rounding.candidate_store import wanted_schemes
from mpq_deploy.rounding.control_schemes import INT8_RULE, control_scheme
from mpq_deploy.system.locks import scratch_folder
from mpq_deploy.system.progress import Talk

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run as RunView

REFERENCE, CASE = "inputs.npz", "timed"


class Profile:
    """The layers of a run on a target: which engines a table needs, as ``jobs``, in a fixed order."""

    def __init__(self, run: RunView, target: Target) -> None:
        self.target, self.talk = target, run.talk
        self.batch = run.recipe.engine.batch_opt
        exported = run.exported
        costs = LatencyCosts(exported.graph, call_shapes(run, exported), target, self.batch)
        wanted = wanted_schemes(run.recipe)
        nodes = {node.name: node for node in exported.graph.model.graph}
        self.costs = costs
        self.jobs: dict[tuple[LayerShape, str], OneLayer] = {}
        for layer in exported.graph.layers:
            for use in layer.uses:
                shape = costs.shape(layer, use)
                for scheme in _schemes(layer, wanted, target):
                    self.jobs.setdefault(
                        (shape, scheme.name), OneLayer(layer, nodes[use.node], shape, scheme)
                    )

    def refuse_without_hardware(self) -> None:
        """Raise UsageError, which says what would be measured, unless engines can be built and timed here."""
        why = why_not_here(self.target)
        if why:
            shapes = len({shape for shape, _ in self.jobs})
            raise UsageError(
                f"Nothing can be timed here: {why}. A table takes {len(self.jobs)} engines, of {shapes} distinct layer "
                f"shapes under up to {len({name for _, name in self.jobs})} schemes at batch {self.batch}.",
                f"Run profile on a machine with {self.target.name} and copy the table here; or write estimates "
                "(--estimate).",
            )

    def estimate(self) -> LatencyTable:
        """Return the table as the roofline has it, marked so. Raises UsageError without figures of the target."""
        rates = Rates.of(self.target)
        if rates is None:
            raise UsageError(
                f"The target {self.target.name} has no figures to estimate from.",
                "Give bandwidth_bytes_per_s, int8_ops_per_s and fp16_ops_per_s in a YAML that extends it.",
            )
        # Each row is of a layer with one use, its quantizer included.
        found = {key: self._estimated_ns(one) / 1e6 for key, one in self.jobs.items()}
        return LatencyTable(self.target.name, rates.device, "", "estimated", self.batch, found)

    def measure(self, out: Path) -> LatencyTable:
        """Build and time every engine; the table in ``out`` grows, so an interrupted run continues.

        An engine that cannot be built, or does not compute as its scheme says, is left out with a
        warning (estimated later).
        """
        table = self._begun(out)
        with self.talk.bar("profile layers", len(self.jobs)) as advance:
            for key, one in self.jobs.items():
                if key not in table.entries:
                    table = self._timed(table, key, one)
                    table.save(out)
                advance(1)
        return table

    def _begun(self, out: Path) -> LatencyTable:
        date = datetime.date.today().isoformat()
        if not out.exists():
            return LatencyTable(self.target.name, "", "", "measured", self.batch, {}, date)
        table = LatencyTable.load(out)
        table.require(self.target.name, self.batch)
        if table.source != "measured":
            raise UsageError(
                f"{out} holds estimates.", "Give another file for what is measured (--out)."
            )
        return replace(table, date=date)

    def _timed(
        self, table: LatencyTable, key: tuple[LayerShape, str], one: OneLayer
    ) -> LatencyTable:
        try:
            record, run = time_one_layer(one, self.target)
        except EngineError as error:
            self.talk.warn(f"{one.layer.name} as {one.scheme.name} is left out: {error.message}")
            return table
        if not record.verified or not run.milliseconds:
            why = (
                "; ".join(str(problem) for problem in record.problems[:1])
                or run.why
                or "no times were returned"
            )
            self.talk.warn(f"{one.layer.name} as {one.scheme.name} is left out: {why}")
            return table
        builder = f"{record.backend} {record.version}"
        if table.device and (table.device, table.builder) != (run.gpu, builder):
            raise UsageError(
                f"The table was started on {table.device} with {table.builder}; this is {run.gpu} with {builder}.",
                "Give another file (--out).",
            )
        entries = {**table.entries, key: statistics.median(run.milliseconds)}
        return replace(table, device=run.gpu, builder=builder, entries=entries)

    def _estimated_ns(self, one: OneLayer) -> int:
        use = next(u for u in one.layer.uses if self.costs.shape(one.layer, u) == one.shape)
        return self.costs.alone_ns(replace(one.layer, uses=(use,)), one.scheme)


def time_one_layer(one: OneLayer, target: Target) -> tuple[EngineRecord, Run]:
    """Build the engine of one layer and time it. Raises EngineError where either fails."""
    with scratch_folder("profile") as folder:
        record = build_one_layer(one, target, folder)
        rng = np.random.default_rng(0)
        x = rng.standard_normal(one.shape.input_shape).astype(np.float16)
        y = np.zeros(one.shape.output_shape, np.float16)
        arrays = {f"{CASE}/{INPUT}": x, f"{CASE}/{OUTPUT}": y}
        np.savez(folder / REFERENCE, **arrays)  # type: ignore[arg-type]
        reference = Reference(REFERENCE, (CASE,), (INPUT,), OUTPUT, "", None, 0.0)
        return record, run_engine(target.builder, folder / "engine" / ENGINE, folder, reference)


def build_one_layer(one: OneLayer, target: Target, folder: Path) -> EngineRecord:
    """Write and build one layer into ``folder``, silently. Needs no GPU for TensorRT-RTX."""
    size = write_one_layer(one, folder, dialect_named(target.dialect))
    expected = ExpectedLayers.of([one.alone], {one.layer.name: one.scheme}, size)
    request = BuildRequest(folder / DEPLOYED, target.build_target, BatchProfile(1, 1, 1, {}))
    return build_engine(request, folder / "engine", expected, Talk())


def why_not_here(target: Target) -> str:
    """Say why no engine of ``target`` can be built and timed on this machine; empty when one can."""
    if target.builder == "none":
        return f"the target {target.name} has no engine"
    if target.builder == "trtexec":
        return "" if find_trtexec() else "trtexec is not on this machine"
    if importlib.util.find_spec(target.builder) is None:
        return f"{target.builder} is not installed"
    gpu = why_no_gpu()
    return gpu[:1].lower() + gpu[1:]


def _schemes(layer: Layer, wanted: Iterable[Scheme], target: Target) -> list[Scheme]:
    """What the solver may choose for ``layer``, and what plans are compared with.

    A range by timestep has the kernels of a static one.
    """
    chosen = choices_for(layer, tuple(wanted), target.refusal).schemes
    compared = (control_scheme(layer, INT8_RULE[:1], target), FP16)
    names = {scheme.timeless.name for scheme in (*chosen, *compared) if not scheme.simulated}
    return [scheme for scheme in SCHEMES.values() if scheme.name in names]
