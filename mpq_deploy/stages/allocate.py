"""The stage allocate: a scheme per layer within the budget."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.allocate.cross_terms import CrossTerms, Solved, allocate_with_cross_terms
from mpq_deploy.allocate.milp import (
    LayerChoice,
    PrecisionPlan,
    Problem,
    allocate_with_fee,
    budget_in_bytes,
    fastest_plan,
    kernel_charge,
    plan_bytes,
    plan_latency,
    protected_schemes,
    quantizers,
    smallest_plan,
)
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.formats.candidates import Choices
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.sizes import FP16_BYTES, activation_bytes, weight_bytes
from mpq_deploy.graph.layers import Layer
from mpq_deploy.graph.writers.prescale import foldable_inputs
from mpq_deploy.latency.costs import PlanLatency, int8_warning
from mpq_deploy.latency.latency_table import parse_latency
from mpq_deploy.latency.plan_latency import latency_costs, latency_inputs, plan_latency_info
from mpq_deploy.run.common import settings, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.stages.candidates import choices_of
from mpq_deploy.system.files import Fields

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


def allocate_inputs(run: Run) -> Fields:
    """Return what the stage allocate reads: digests and settings."""
    return {
        **{name: run.digest(name) for name in ("export", "candidates", "measure")},
        "recipe.budget": run.recipe.budget,
        "target.protected": list(run.target.protected),
        **settings(run.recipe.allocate, "allocate"),
        **latency_inputs(run.recipe),
        **version_of("highspy", "numpy"),
    }


class PlanSolver:
    """Bytes and losses of every allowed (layer, scheme), gathered once and solved for any budget.

    ``control``: one of ``ORM_CONTROLS`` in place of the run's own measurements; or a ``table`` in place of either.
    """

    def __init__(self, run: Run, control: str = "", table: SensitivityTable | None = None) -> None:
        self.run = run
        self.recipe = run.recipe
        self.section = run.recipe.allocate
        self.orm = run.recipe.measure.orm
        self.exported = run.exported
        self.layers = self.exported.graph.layers
        self.table = table or SensitivityTable.load(run.stage("measure") / control)
        read = choices_of(run, self.exported.graph)
        self.refused = {name: {**c.refused, **self._ruled_out(name, c)} for name, c in read.items()}
        target = run.target
        rules: list[tuple[str, tuple[str, ...]]]
        rules = [(pattern, ("fp16",)) for pattern in target.protected if any_match(pattern, read)]
        rules += [(rule.layers, rule.schemes) for rule in self.section.protect]
        measured = self.table.losses
        names = [
            (layer.name, tuple(s.name for s in read[layer.name].schemes if s.name in measured[layer.name]))
            for layer in self.layers
        ]
        allowed = protected_schemes(names, rules)
        self.costs, self.no_latency = latency_costs(run, self.exported)
        self.choices = [self._choice(layer, allowed[layer.name]) for layer in self.layers]
        self.fp16_size = int(self.exported.facts["fp16_size_bytes"])
        self.weights = sum(layer.weights for layer in self.layers)
        self.foldable = foldable_inputs(self.exported.graph)

    def _choice(self, layer: Layer, names: tuple[str, ...]) -> LayerChoice:
        return LayerChoice(
            layer.name,
            layer.inputs,
            {name: weight_bytes(layer, SCHEMES[name]) for name in names},
            {name: self.table.losses[layer.name][name] for name in names},
            {name: activation_bytes(layer, SCHEMES[name]) for name in names},
            {name: self.costs.layer_ns(layer, SCHEMES[name]) for name in names} if self.costs else {},
        )

    def _with_latency(self, problem: Problem) -> Problem:
        """Add what is known of latency and the limit on it; with latency as the objective, that is the least."""
        if self.costs is None:
            return problem
        section = self.section
        shared = {
            name: self.costs.quantizer_ns(tensor, SCHEMES[scheme])
            for choice in problem.layers
            for scheme in choice.bytes
            for tensor in choice.inputs
            for name in quantizers(choice, scheme)
            if name == tensor + SCHEMES[scheme].activation_form
        }
        limit = None if section.max_latency is None else parse_latency(section.max_latency)
        timed = replace(problem, quantizer_latency=shared, fixed_latency=self.costs.others_ns, max_latency=limit)
        if section.objective == "loss":
            return timed
        smallest = plan_bytes(problem, smallest_plan(problem))
        if smallest > problem.budget_bytes:
            return timed  # the solver says what the smallest feasible budget is
        least = plan_latency(timed, fastest_plan(timed, section.time_limit, section.max_loss))
        return timed if limit is not None and limit < least else replace(timed, max_latency=least)

    @property
    def smallest(self) -> int:
        """Bytes of the plan of each layer's smallest scheme: the smallest feasible budget, or a few bytes more."""
        problem = Problem(self.choices, self.fixed_bytes, 0, self.foldable)
        return plan_bytes(problem, smallest_plan(problem))

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the constants that are no layers."""
        return self.fp16_size - FP16_BYTES * self.weights

    def unrefined(self, budget_bytes: int, gap: float) -> tuple[dict[str, str], int, float | None] | None:
        """Solve for ``budget_bytes`` by the integer programme alone: schemes, bytes and predicted loss.

        Quicker than ``solve``, which refines the plan with the cross terms; the prediction has them all the same. None
        where the solver's time was up before it came within ``gap``.
        """
        problem = self._with_latency(Problem(self.choices, self.fixed_bytes, budget_bytes, self.foldable))
        fee = kernel_charge(problem, self.section.branch_charge, gap, self.section.time_limit)
        schemes, report = allocate_with_fee(problem, fee, gap, self.section.time_limit)
        if report.status != "Optimal":
            return None
        return schemes, plan_bytes(problem, schemes), self._predicted(schemes, None)

    def solve(self, budget: str) -> PrecisionPlan:
        """Solve the allocation for ``budget`` (as the user writes it) and describe the plan."""
        fixed = self.fixed_bytes
        limit = budget_in_bytes(budget, self.fp16_size, self.weights)
        problem = Problem(self.choices, fixed, limit, self.foldable)
        try:
            problem = self._with_latency(problem)
            solved, cross_terms = self._solved(problem)
        except InfeasibleBudgetError as error:
            ratio = math.ceil(error.smallest / self.fp16_size * 1e4) / 1e4
            raise InfeasibleBudgetError(
                f"No plan fits the budget {budget} ({problem.budget_bytes:,} bytes).",
                f"The smallest feasible budget is {ratio:.4f} ({error.smallest:,} bytes); or allow smaller schemes."
                + self._activations_hint(),
                error.smallest,
            ) from error
        schemes = solved.schemes
        programme, weighed = self._weighed(schemes, problem.budget_bytes - fixed)
        latency = self._latency(problem, schemes)
        return PrecisionPlan(
            budget_bytes=problem.budget_bytes,
            size_bytes=plan_bytes(problem, schemes),
            fp16_size_bytes=self.fp16_size,
            fixed_bytes=problem.fixed_bytes,
            predicted_loss=self._predicted(schemes, cross_terms),
            schemes=schemes,
            layers=[{**self._row(i, schemes[n.name]), **weighed[i]} for i, n in enumerate(self.layers)],
            others=[vars(other) for other in self.exported.graph.others],
            solver=solved.report,
            notes=[*self.table.notes, *self._latency_notes(latency)],
            bit_programme=programme,
            cross_terms=None if cross_terms is None else asdict(cross_terms),
            simulated=any(SCHEMES[name].simulated for name in schemes.values()),
            latency=None if latency is None else asdict(latency),
        )

    def _latency(self, problem: Problem, schemes: dict[str, str]) -> PlanLatency | None:
        if self.costs is None:
            return None
        limit = None if self.section.max_latency is None else parse_latency(self.section.max_latency)
        ours = plan_latency(problem, schemes)
        return plan_latency_info(self.costs, self.exported, schemes, ours, limit, self.recipe)

    def _latency_notes(self, latency: PlanLatency | None) -> list[str]:
        said = [self.no_latency, int8_warning(latency, len(self.layers)) if latency else ""]
        return [note for note in said if note]

    def _solved(self, problem: Problem) -> tuple[Solved, CrossTerms | None]:
        """Solve without cross terms, then with them where the metric knows them and the recipe wants them."""
        if self.table.projections is None:
            return self._solved_apart(problem), None
        return allocate_with_cross_terms(problem, self.table, self._solved_apart, self.section.cross_terms)

    def _solved_apart(self, part: Problem) -> Solved:
        """Solve without cross terms."""
        section = self.section
        fee = kernel_charge(part, section.branch_charge, section.gap, section.time_limit)
        return Solved(*allocate_with_fee(part, fee, section.gap, section.time_limit), fee)

    def _predicted(self, schemes: dict[str, str], cross_terms: CrossTerms | None) -> float | None:
        if cross_terms is not None:
            return cross_terms.predicted_loss
        return self.table.plan_loss(schemes) if self.table.predicts_nmse else None

    def _activations_hint(self) -> str:
        importance = self.table.importance
        if importance is None or not importance.activation_bits.any():
            return ""
        return f" Mind that measure.orm.activation_bits is {self.orm.activation_bits}: it rules out schemes."

    def _ruled_out(self, layer: str, choices: Choices) -> dict[str, str]:
        """Say why the table has no loss for schemes that the layer could take: orm fixes its activations' bits."""
        importance = self.table.importance
        reason = f"the metric {self.table.metric} has not measured it"
        if importance is not None:
            bits = int(importance.activation_bits[importance.layers.index(layer)])
            reason = f"the metric {self.table.metric} fixes the activations of this layer at {bits} bits"
        return {s.name: reason for s in choices.schemes if s.name not in self.table.losses[layer]}

    def _weighed(
        self, schemes: dict[str, str], weight_bytes: int
    ) -> tuple[dict[str, float] | None, list[dict[str, float]]]:
        """Return the plan's weighted bits beside the linear programme's bound, and per layer importance and its bits.

        None and empty entries for a metric without importances. ``weight_bytes``: the budget less all other constants.
        """
        if self.table.importance is None:
            return None, [{} for _ in self.layers]
        from mpq_deploy.sensitivity.bit_programme import linear_bits
        from mpq_deploy.sensitivity.orm import scheme_bits

        bits = [
            {name: scheme_bits(layer, SCHEMES[name], self.orm.bits) for name in choice.bytes}
            for layer, choice in zip(self.layers, self.choices)
        ]
        importance = self.table.importance.total
        sizes = np.array([layer.weights for layer in self.layers], np.float64)
        low, high = (np.array([f(row.values()) for row in bits], np.float64) for f in (min, max))
        bound = linear_bits(importance, sizes, low, high, 8.0 * weight_bytes)
        taken = np.array([row[schemes[layer.name]] for row, layer in zip(bits, self.layers)])
        rows = [{"importance": float(c), "linear_bits": float(b)} for c, b in zip(importance, bound.bits)]
        return {"weighted_bits": float(importance @ taken), "linear_bound": bound.objective}, rows

    def _row(self, number: int, scheme: str) -> dict[str, Any]:
        layer, choice = self.layers[number], self.choices[number]
        return {
            "name": layer.name,
            "op": layer.op,
            "scheme": scheme,
            "bytes": choice.bytes[scheme],
            "fp16_bytes": FP16_BYTES * layer.weights,
            "weights": layer.weights,
            "weight_shape": list(layer.weight_shape),
            "predicted_loss": choice.loss[scheme] if self.table.predicts_nmse else None,
            "latency_ms": choice.latency[scheme] / 1e6 if choice.latency else None,
            "refused": self.refused[layer.name],
        }


def any_match(pattern: str, names: Mapping[str, Any]) -> bool:
    """Whether a target's pattern concerns this model: targets protect by name, models name as they like."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def make_allocate(run: Run, folder: Path) -> str:
    """Make the stage allocate in ``folder``; return a few words for the log."""
    check_memory(run, "allocate")
    plan = PlanSolver(run).solve(run.recipe.budget)
    plan.save(folder / "plan.json")
    ratio = plan.size_bytes / plan.fp16_size_bytes
    predicted = "not predicted" if plan.predicted_loss is None else f"predicted NMSE {plan.predicted_loss:.2e}"
    kind = "nominal bytes, simulated" if plan.simulated else "bytes"
    warned = int8_warning(PlanLatency(**plan.latency), len(plan.layers)) if plan.latency else ""
    if warned:
        run.talk.warn(warned)
    return f"{plan.size_bytes:,} {kind} ({ratio:.4f} of FP16), {predicted}{_speed(plan)}"


def _speed(plan: PrecisionPlan) -> str:
    if plan.latency is None:
        return ""
    return f", {plan.latency['ours_ms']:.3g} ms of layers and other kernels ({plan.latency['source']})"
