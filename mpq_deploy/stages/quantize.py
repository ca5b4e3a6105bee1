"""The stages quantize and controls: the graphs of the plan, and of what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.calibrate.scales import ActivationGrid
from mpq_deploy.errors import MpqError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.dialect_check import check_dialect
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, write_quantized
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite
from mpq_deploy.run.common import ORM_CONTROLS, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.stages.allocate import PlanSolver, allocate_inputs
from mpq_deploy.stages.candidates import CONTROLS, control_scheme, iterate_candidates
from mpq_deploy.system.files import Fields, canonical_json

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


def quantize_inputs(run: Run) -> Fields:
    """Return what the stage quantize reads: digests and settings."""
    return {
        **{name: run.digest(name) for name in ("export", "calibrate", "candidates", "allocate")},
        "dialect": run.target.dialect,
        **version_of("onnx", "onnx-ir", "numpy"),
    }


def write_plan(run: Run, schemes: dict[str, str], folder: Path) -> int:
    """Write the graphs of a plan (layer -> scheme) into ``folder``; return the bytes counted from the file."""
    exported = run.exported
    check_memory(run, "quantize")
    stats = run.calibration.stats
    rewrites = []
    for candidates in iterate_candidates(run.stage("candidates"), exported.graph):
        scheme = SCHEMES[schemes[candidates.layer.name]]
        rewrites.append(LayerRewrite(candidates.layer, scheme, candidates.forms.get(scheme.weight_form)))
    forms = {SCHEMES[scheme].activation_form for scheme in schemes.values()} | {""}
    wanted = {t + SCHEMES[schemes[n.name]].activation_form for n in exported.graph.layers for t in n.inputs}
    scales: dict[str, float | ActivationGrid] = {
        name + form: a.grid_for(form) if form.startswith("+a") else a.scale_for(form)
        for name, a in stats.activations.items()
        for form in forms
        if name + form in wanted
    }
    spec = exported.spec
    dialect = dialect_named(run.target.dialect)
    return write_quantized(exported.path, spec.timestep_name, spec.sample.name, rewrites, scales, folder, dialect)


def make_quantize(run: Run, folder: Path) -> str:
    """Make the stage quantize in ``folder``; return a few words for the log."""
    plan = run.plan
    written = write_plan(run, plan.schemes, folder)
    if written != plan.size_bytes:
        raise MpqError(
            f"The quantized file holds {written:,} bytes of constants, the plan says {plan.size_bytes:,}.",
            "This is a defect: please report it with the model's structure.",
        )
    check_dialect(run, folder / DEPLOYED)
    (folder / "size.json").write_text(canonical_json({"size_bytes": written}), encoding="utf-8")
    return f"{written:,} bytes of constants, as planned"


def controls_inputs(run: Run) -> Fields:
    """Return what the stage controls reads: digests and settings."""
    # Not the plan: another budget keeps the controls. Those of orm are plans of the same budget.
    like_the_plan = allocate_inputs(run) if run.recipe.measure.method == "orm" else {}
    return {
        **like_the_plan,
        **{name: run.digest(name) for name in ("export", "calibrate", "candidates")},
        "dialect": run.target.dialect,
        "recipe.evaluate.controls": run.recipe.evaluate.controls,
        **version_of("onnx", "onnx-ir", "numpy"),
    }


def make_controls(run: Run, folder: Path) -> str:
    """Make the stage controls in ``folder``; return a few words for the log."""
    sizes = {}
    if run.recipe.evaluate.controls:
        layers = run.exported.graph.layers
        target = run.target
        for name, preferred in CONTROLS.items():
            schemes = {layer.name: control_scheme(layer, preferred, target).name for layer in layers}
            (folder / name).mkdir()
            sizes[name] = write_plan(run, schemes, folder / name)
        for name in ORM_CONTROLS if run.recipe.measure.method == "orm" else ():
            (folder / name).mkdir()
            plan = PlanSolver(run, name).solve(run.recipe.budget)
            sizes[name] = write_plan(run, plan.schemes, folder / name)
    (folder / "sizes.json").write_text(canonical_json(sizes), encoding="utf-8")
    return ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()) or "none wanted"
