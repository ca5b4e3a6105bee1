"""Write the graphs of a plan from a run's candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.formats.fp8 import FP8_SCHEME, operand_grids
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.attention import separate_operands
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    write_quantized,
)
from mpq_deploy.graph.writers.lora_slots import (
    SLOTTED,
    SLOTTED_SIMULATED,
    norms_of,
    require_slots,
    write_slotted,
)
from mpq_deploy.graph.writers.prescale import foldable_inputs
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite
from mpq_deploy.rounding.candidate_store import iterate_candidates

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array
    from mpq_deploy.run.view import Run


def write_plan(run: Run, schemes: dict[str, str], folder: Path) -> int:
    """Write the graphs of a plan (layer or attention -> scheme) into ``folder``; return their bytes as counted."""
    exported = run.exported
    stats, beyond = run.calibration.stats, run.calibration.beyond_fp16
    rewrites = []
    for candidates in iterate_candidates(run.stage("candidates"), exported.graph):
        scheme = SCHEMES[schemes[candidates.layer.name]]
        rewrites.append(
            LayerRewrite(candidates.layer, scheme, candidates.forms.get(scheme.weight_form))
        )
    scales = {
        tensor + rewrite.scheme.activation_form: rewrite.scheme.input_grid(
            stats.activations[tensor]
        )
        for rewrite in rewrites
        if rewrite.scheme.activation
        for tensor in rewrite.layer.inputs
    }
    spec = exported.spec
    dialect = dialect_named(run.target.dialect)
    names = spec.timestep_name, spec.sample.name
    operands: dict[str, ActivationGrid] = {}
    for one in separate_operands(exported.graph.model):
        if schemes.get(one.name) == FP8_SCHEME:
            operands.update(operand_grids(one, stats))
    source = FloatGraph(exported.path, *names, beyond_fp16=beyond, fp8_operands=operands)
    return write_quantized(source, rewrites, scales, folder, dialect)


def write_plan_slots(run: Run, folder: Path) -> Path:
    """Write the plan's graphs in ``folder`` with slots for LoRAs, too; return the deployed one."""
    graph, rank = run.exported.graph, run.recipe.lora_slots
    layers = require_slots(graph)
    folded: dict[str, Array] = {}
    schemes = {name: SCHEMES[scheme] for name, scheme in run.plan.schemes.items()}
    for tensor, readers in foldable_inputs(graph).items():
        taken = {schemes[name] for name in readers}
        if (
            all(one.branch.rescales for one in taken)
            and len({o.activation_form for o in taken}) == 1
        ):
            stats = run.calibration.stats.activations[tensor]
            factors = taken.pop().branch.factors(stats)
            assert factors is not None
            folded[tensor] = factors
    clips = any(scheme.activation for scheme in schemes.values())
    norms = norms_of(graph, layers) if clips else None
    write_slotted(folder / SIMULATED, SLOTTED_SIMULATED, layers, rank, folded, norms)
    return write_slotted(folder / DEPLOYED, SLOTTED, layers, rank, folded, norms)
