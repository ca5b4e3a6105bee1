"""Solve a run's allocation for any budget. In: the stages' outputs. Out: a precision plan."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.allocate.cross_terms import CrossTerms, allocate_with_cross_terms, cross_share
from mpq_deploy.allocate.exponents import best_int8, one_exponent_each
from mpq_deploy.allocate.floor import floor_causes, floor_text
from mpq_deploy.allocate.front import front, undominated
from mpq_deploy.allocate.milp import (
    Allocation,
    allocate,
    limited,
    penalty_per_kernel,
)
from mpq_deploy.allocate.plan import BitProgram, LoraSlots, PlannedLayer, PrecisionPlan
from mpq_deploy.allocate.predicted_images import PredictedImages, predicted_images, psnr_of
from mpq_deploy.allocate.problem import LayerChoice, Problem, protected_schemes
from mpq_deploy.allocate.tail import allocate_tail, image_weights
from mpq_deploy.allocate.ties import tie, tied_layers
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.formats.candidates import Choices
from mpq_deploy.formats.fp8 import FP8_SCHEME
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.sizes import ACTIVATION_SCALE_BYTES, FP16_BYTES
from mpq_deploy.graph.attention import OPERANDS, projections, separate_operands
from mpq_deploy.graph.census import take_census
from mpq_deploy.graph.layers import Layer
from mpq_deploy.graph.writers.lora_slots import require_slots, slot_bytes
from mpq_deploy.graph.writers.prescale import foldable_inputs
from mpq_deploy.latency.costs import LatencyCosts, PlanLatency, int8_warning
from mpq_deploy.latency.plan_latency import latency_costs, plan_latency_info
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.candidate_store import choices_of
from mpq_deploy.sensitivity.steadied import steadied
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.quantities import Budget

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


# Notes on what the prediction of final images is based on.
IMAGES_APART = "The prediction is to first order, and that of plans chosen in the same way on other trajectories."
IMAGES_SEEN = "The prediction is to first order, on the trajectories that the plan was chosen on."
# A layer's importance, and its bits in the linear program.
LayerBits = tuple[float | None, float | None]


@dataclass(frozen=True)
class PredictedPlan:
    """A plan with its exact bytes, its predicted error and the milliseconds of one call.

    ``predicted_loss``: with cross terms, of the output, or of the final images as they count
    (``tail.image_weights``); None where the metric predicts none. ``psnr_db``: predicted mean over
    the images; None where they are not predicted. ``latency_ms``: None where the target's speed is
    unknown.
    """

    schemes: dict[str, str]
    size_bytes: int
    predicted_loss: float | None
    latency_ms: float | None = None
    psnr_db: float | None = None

    @property
    def error(self) -> float | None:
        """What plans are ordered by: of images the squared error of their mean PSNR, else the loss."""
        return self.predicted_loss if self.psnr_db is None else float(10 ** (-self.psnr_db / 10))

    @classmethod
    def of(cls, plan: PrecisionPlan) -> PredictedPlan:
        """Make it from a solved ``plan``."""
        time = plan.latency.ours_ms if plan.latency else None
        psnr = plan.predicted_images.psnr_db if plan.predicted_images else None
        return cls(plan.schemes, plan.size_bytes, plan.predicted_loss, time, psnr)


def layer_choices(
    layers: Sequence[Layer],
    allowed: Mapping[str, Sequence[str]],
    losses: Mapping[str, Mapping[str, float]],
    costs: LatencyCosts | None,
) -> list[LayerChoice]:
    """Return each layer's choices (``allowed``: layer -> schemes) with bytes, loss and time."""
    return [
        LayerChoice(
            layer.name,
            layer.inputs,
            {name: SCHEMES[name].weight_bytes(layer) for name in allowed[layer.name]},
            {name: losses[layer.name][name] for name in allowed[layer.name]},
            {name: SCHEMES[name].input_bytes(layer) for name in allowed[layer.name]},
            {name: costs.layer_ns(layer, SCHEMES[name]) for name in allowed[layer.name]}
            if costs
            else {},
            {name: SCHEMES[name].scale_bytes(layer) for name in allowed[layer.name]},
        )
        for layer in layers
    ]


def timed_problem(
    layers: Sequence[Layer],
    costs: LatencyCosts | None,
    problem: Problem,
    choices: Sequence[LayerChoice] | None = None,
) -> Problem:
    """Add the latencies of quantizers and of nodes that are not layers, where ``costs`` are known.

    ``choices``: one per layer, where the problem has tied layers as one.
    """
    if costs is None:
        return problem
    shared: dict[str, int] = {}
    for layer, choice in zip(layers, choices or problem.layers, strict=True):
        for scheme in choice.bytes:
            shared.update(costs.quantizers_ns(layer, SCHEMES[scheme]))
    return replace(problem, quantizer_ns=shared, fixed_ns=costs.others_ns)


ONE_CALL = (
    "The prediction has no interval: it takes two measured calls at each timestep. From one it may be off by a factor "
    "of two: measure more (measure.calls, --effort)."
)


class PlanSolver:
    """Reads bytes, losses and times of every allowed (layer, scheme) once, and solves any budget.

    ``control`` (one of ``ORM_CONTROLS``) or ``table`` replaces the run's own measurements.
    """

    def __init__(self, run: Run, control: str = "", table: SensitivityTable | None = None) -> None:
        self.recipe = run.recipe
        self.section = run.recipe.allocate
        self.orm = run.recipe.measure.orm
        self.exported = run.exported
        self.layers = self.exported.graph.layers
        whole = steadied(table or SensitivityTable.load(run.stage("measure") / control))
        trim, inverse = self.section.trim, self.section.images_count == "inverse"
        equal = self.section.tail is not None
        self.counted = None if equal else image_weights(whole, trim, inverse)
        self.table = whole if self.counted is None else whole.weighing(self.counted)
        candidates = choices_of(run, self.exported.graph)
        self.refused = {
            name: {**c.refused, **self._ruled_out(name, c)} for name, c in candidates.items()
        }
        self.target = run.target
        by_target = [
            (pattern, ("fp16",))
            for pattern in run.target.protected
            if any(fnmatch.fnmatchcase(name, pattern) for name in candidates)
        ]
        by_recipe = [(rule.layers, rule.schemes) for rule in self.section.protect]
        self.rules = by_target, by_recipe
        measured = [
            (name, tuple(s.name for s in choices.schemes if s.name in self.table.losses[name]))
            for name, choices in candidates.items()
        ]
        allowed = one_exponent_each(
            self.layers,
            protected_schemes(measured, [*by_target, *by_recipe]),
            self.table.losses,
        )
        self.costs, self.no_latency = latency_costs(run, self.exported)
        self.choices = layer_choices(self.layers, allowed, self.table.losses, self.costs)
        self.fp16_size = int(self.exported.facts["fp16_size_bytes"])
        self.weights = sum(layer.weights for layer in self.layers)
        self.foldable = foldable_inputs(self.exported.graph)
        # Without an engine nothing joins the products of tied layers.
        tied = self.section.tie_qkv and self.target.builder != "none"
        self.groups = projections(self.exported.graph) if tied else []
        self.attentions = self._attentions()
        self.slots = self._slots(run.recipe.lora_slots)

    def _slots(self, rank: int) -> LoraSlots | None:
        """Return the cost of LoRA slots of ``rank``; None for rank 0."""
        if not rank:
            return None
        layers = require_slots(self.exported.graph)
        time = self.costs.slots_ns(layers, rank) if self.costs else None
        milliseconds = None if time is None else time / 1e6
        return LoraSlots(rank, len(layers), slot_bytes(layers, rank), milliseconds)

    def _attentions(self) -> list[LayerChoice]:
        """Return the choices FP16 or FP8 of the attentions that the table has measured."""
        found = []
        for one in separate_operands(self.exported.graph.model):
            losses = self.table.losses.get(one.name)
            if losses is not None:
                sizes = {"fp16": 0, FP8_SCHEME: OPERANDS * ACTIVATION_SCALE_BYTES}
                times = self.costs.attention_ns(one) if self.costs else {}
                found.append(LayerChoice(one.name, (), sizes, losses, latency_ns=times))
        return found

    def _ties(self) -> tuple[tuple[tuple[str, ...], ...], str]:
        groups = [[layer.name for layer in group] for group in self.groups]
        return tied_layers(groups, {choice.name: tuple(choice.bytes) for choice in self.choices})

    def _joined(self, choice: LayerChoice) -> LayerChoice:
        """Subtract the time that tied layers save as one product; not with LoRA slots."""
        if self.costs is None or self.slots:
            return choice
        layers = [layer for layer in self.layers if layer.name in choice.layers]
        times = {
            s: max(ns - self.costs.joined_ns(layers, SCHEMES[s]), 0)
            for s, ns in choice.latency_ns.items()
        }
        return replace(choice, latency_ns=times)

    def _timed(self, problem: Problem) -> Problem:
        """Add the latencies of quantizers and of nodes that are not layers, where known."""
        timed = timed_problem(self.layers, self.costs, problem, self.choices)
        # The FP16 time of the attentions is in ``fixed_ns``, too: here it is part of their choice.
        taken = sum(one.latency_ns.get("fp16", 0) for one in self.attentions)
        if self.slots and self.slots.latency_ms and self.costs:
            taken -= round(self.slots.latency_ms * 1e6)
        return replace(timed, fixed_ns=timed.fixed_ns - taken)

    def _limited(self, timed: Problem) -> Problem:
        """Add the latency limit: the recipe's, or a lower one that the objective asks for."""
        if self.costs is None:
            return timed
        limit = self.section.max_latency
        timed = replace(timed, max_latency_ns=limit.nanoseconds if limit else None)
        return timed if self._slack_is_unknown else limited(timed, self.section, self._allocated)

    @property
    def objective(self) -> str:
        """The objective in effect: quality where balanced lacks latencies or predicted errors."""
        balanced = self.section.objective == "balanced"
        lacking = balanced and (self.costs is None or self._slack_is_unknown)
        return "quality" if lacking else self.section.objective

    @property
    def _slack_is_unknown(self) -> bool:
        """Whether the objective is balanced but the metric predicts no errors to compare."""
        return self.section.objective == "balanced" and not self.table.predicts

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the constants that are not layers."""
        return self.fp16_size - FP16_BYTES * self.weights

    def _problem(self, budget_bytes: int) -> Problem:
        choices = [self._joined(choice) for choice in tie(self.choices, self._ties()[0])]
        return Problem([*choices, *self.attentions], self.fixed_bytes, budget_bytes, self.foldable)

    def timed_problem(self) -> Problem:
        """Return the problem with a budget of 0, no latency limit, and the latencies if known."""
        return self._timed(self._problem(0))

    def front(self, most: int) -> list[PredictedPlan]:
        """Return at most ``most`` plans of the Pareto front of size, error, time, smallest first.

        It takes about a second, by Lagrangian relaxation (``allocate.front``). ``solve`` with a
        plan's size and time as limits finds a plan whose summed loss is at most as large. The
        recipe's limits are ignored.
        """
        problem = self.timed_problem()
        points = []
        for plan in front(problem, most):
            schemes = problem.spread(plan.schemes)
            time = plan.latency_ns / 1e6 if self.costs else None
            predicted = self._plan_loss(schemes) if self.table.predicts else None
            found = PredictedPlan(schemes, plan.size_bytes, predicted, time, self._psnr(schemes))
            points.append(found)
        if not self.table.predicts:
            return points
        # With cross terms the predicted errors change, and some plans leave the front.
        values = [(p.size_bytes, p.error or 0.0, p.latency_ms or 0.0) for p in points]
        order = sorted(range(len(values)), key=values.__getitem__)
        return [points[order[i]] for i in undominated([values[number] for number in order])]

    def solve(self, budget: Budget | str) -> PrecisionPlan:
        """Return the plan for ``budget``. Raises InfeasibleBudgetError, InfeasibleLatencyError."""
        problem = self._problem(Budget.parse(budget).bytes(self.fp16_size, self.weights))
        try:
            problem = self._limited(self._timed(problem))
            allocation, cross_terms = self._refined(problem)
        except InfeasibleBudgetError as error:
            ratio = math.ceil(error.smallest / self.fp16_size * 1e4) / 1e4
            raise InfeasibleBudgetError(
                f"No plan fits the budget {budget} ({problem.budget_bytes:,} bytes).",
                f"The smallest feasible budget is {ratio:.4f} ({error.smallest:,} bytes). "
                f"{self._floor(error.smallest)}{self._activations_hint()}",
                error.smallest,
            ) from error
        schemes = problem.spread(allocation.schemes)
        ties, untied = self._ties()
        program, weighted = self._bit_program(schemes, problem.budget_bytes - problem.fixed_bytes)
        latency = self._latency(problem, schemes)
        return PrecisionPlan(
            budget_bytes=problem.budget_bytes,
            size_bytes=problem.plan_bytes(schemes),
            fp16_size_bytes=self.fp16_size,
            fixed_bytes=problem.fixed_bytes,
            predicted_loss=self._predicted(schemes, cross_terms),
            schemes=schemes,
            layers=tuple(
                self._planned(layer, choice, schemes[layer.name], *row)
                for layer, choice, row in zip(self.layers, self.choices, weighted)
            ),
            others=self.exported.graph.others,
            solver=allocation.report,
            notes=(
                *self.table.notes,
                *self._latency_notes(latency),
                *filter(None, [untied, self._attention_note(schemes), self._tail_note()]),
                *([self.slots.text(latency.ours_ms if latency else None)] if self.slots else []),
            ),
            bit_program=program,
            cross_terms=cross_terms,
            simulated=any(SCHEMES[name].simulated for name in schemes.values()),
            latency=latency,
            tied=ties,
            predicted_interval=cross_terms.interval
            if cross_terms and self.table.predicts_nmse
            else None,
            prediction_note=self._prediction_note(cross_terms),
            lora_slots=self.slots,
            predicted_images=self._images(cross_terms),
        )

    def timed_again(self, plan: PrecisionPlan) -> PrecisionPlan:
        """Return ``plan`` with its latency estimated again, now that its engine is known."""
        before, problem = plan.latency, self._timed(self._problem(plan.budget_bytes))
        latency = self._latency(problem, plan.schemes)
        if before is None or latency is None:
            return plan
        chosen = f"when the plan was chosen, its time was estimated as {before.ours_ms:.4g} ms"
        said = "; ".join(filter(None, (latency.fusion, chosen)))
        return replace(plan, latency=replace(latency, fusion=said))

    def _images(self, cross_terms: CrossTerms | None) -> PredictedImages | None:
        """Predict the final images of the plan, and of everything in INT8 where it was measured."""
        table = self.table
        if cross_terms is None or not cross_terms.by_call or table.mean_square is None:
            return None
        int8 = best_int8(self.layers, self.target, table.losses, True)
        schemes = {name: scheme.name for name, scheme in int8.items()}
        known = all(scheme in table.losses[name] for name, scheme in schemes.items())
        controls = self._image_errors(schemes) if known else None
        errors = np.array(cross_terms.by_call)
        return predicted_images(errors, self._probes(len(errors)), table.mean_square, controls)

    def _psnr(self, schemes: dict[str, str]) -> float | None:
        """Predict the mean PSNR of the images of any plan; None where images are not predicted."""
        square = self.table.mean_square
        if not self.table.of_images or self.table.calls is None or square is None:
            return None
        errors = self._image_errors(schemes)
        return float(psnr_of(errors, self._probes(len(errors)), square).mean())

    def _image_errors(self, schemes: dict[str, str]) -> Array:
        """Return the squared error of a plan on each measured image, whether it counts or not, float64 [N]."""
        errors = self.table.image_errors(self.table.plan_entries(schemes))
        return errors if self.counted is None else errors / self.counted

    def _probes(self, images: int) -> int:
        """Return the probes of each of the measured ``images``."""
        assert self.table.calls is not None
        return self.table.image_probes or len(self.table.calls) // images

    def _prediction_note(self, cross_terms: CrossTerms | None) -> str:
        if not self.table.predicts:
            return ""
        if self.table.of_images and cross_terms is not None:
            return IMAGES_APART if cross_terms.folds else IMAGES_SEEN
        if cross_terms is None:
            return f"The prediction has no interval: {self.table.metric} keeps no errors by call."
        if cross_terms.interval is None:
            return ONE_CALL
        if cross_terms.folds:
            return (
                "The prediction and its 95 % interval are those of plans chosen in the same way on other calls, "
                "so they are free of selection bias; the interval is over the measured calls alone."
            )
        return (
            "The prediction's 95 % interval is over the measured calls, on which the plan was chosen: "
            "the solver prefers schemes that noise flatters, which neither accounts for."
        )

    def _latency(self, problem: Problem, schemes: dict[str, str]) -> PlanLatency | None:
        if self.costs is None:
            return None
        ours = problem.plan_ns(schemes)
        int8 = best_int8(self.layers, self.target, self.table.losses, self.table.predicts)
        info = plan_latency_info(self.costs, self.exported, schemes, int8, ours, self.recipe)
        return self._with_faster(info, problem) if info.ours_ms > info.fp16_ms else info

    def _with_faster(self, info: PlanLatency, problem: Problem) -> PlanLatency:
        """Return ``info`` of a plan slower than FP16 with faster plans of the front."""
        plans = front(problem)
        within = [plan for plan in plans if plan.size_bytes <= problem.budget_bytes]
        fastest = min(within, key=lambda plan: (plan.latency_ns, plan.loss), default=None)
        least, as_fast = math.inf, None
        for plan in plans:
            least = min(least, plan.loss)
            in_time = plan.latency_ns <= 1e6 * info.fp16_ms
            if in_time and plan.loss <= self.section.slack * least:
                as_fast = plan.size_bytes / self.fp16_size
                break
        known = fastest is not None and fastest.latency_ns < 1e6 * info.ours_ms
        return replace(
            info,
            fastest_ms=fastest.latency_ns / 1e6 if fastest and known else None,
            fastest_loss=fastest.loss if fastest and known and self.table.predicts_nmse else None,
            as_fast_at=as_fast,
        )

    def _latency_notes(self, latency: PlanLatency | None) -> list[str]:
        notes = [self.no_latency, int8_warning(latency, len(self.layers)) if latency else ""]
        if self.section.objective == "balanced" and not self.target.simulated:
            if latency is None:
                notes.append(
                    f"The speed of {self.target.name} is unknown: the plan is the one of the minimum "
                    "predicted error (objective quality)."
                )
            elif self._slack_is_unknown:
                notes.append(
                    f"The metric {self.table.metric} does not predict errors: the plan is the best by its "
                    "ranking, regardless of "
                    "speed (objective quality)."
                )
        return [note for note in notes if note]

    def _tail_note(self) -> str:
        share = self.section.tail
        if share is None:
            return self._trim_note()
        if not self.table.of_images:
            return f"allocate.tail is {share:g}, but no final images could be measured: the plan is that of the mean"
        return f"the plan is that of the minimum error of the worst {share:.0%} of the images (allocate.tail)"

    def _trim_note(self) -> str:
        left_out = 0 if self.counted is None else round(self.section.trim * len(self.counted))
        if self.counted is None or not left_out:
            return ""
        return (
            f"{left_out} of {len(self.counted)} measured images, those with the largest errors, do not count in the "
            "plan's objective, but in what is predicted (allocate.trim)"
        )

    def _attention_note(self, schemes: dict[str, str]) -> str:
        if self.section.attention == "fp16":
            return ""
        taken = sum(schemes[one.name] == FP8_SCHEME for one in self.attentions)
        return f"{taken} of {len(self.attentions)} attentions that may compute in FP8 do so (allocate.attention)"

    def _refined(self, problem: Problem) -> tuple[Allocation, CrossTerms | None]:
        """Solve, and refine by cross terms where the metric has projections."""
        if self.table.projections is None:
            return self._allocated(problem), None

        def solve(part: Problem, table: SensitivityTable) -> tuple[Allocation, CrossTerms]:
            return allocate_with_cross_terms(part, table, self._allocated, self.section.cross_terms)

        if self.section.tail is None or not self.table.of_images:
            allocation, crossed = solve(problem, self.table)
            return allocation, crossed if self.counted is None else crossed.unweighted(self.counted)
        return allocate_tail(problem, self.table, self.section.tail, solve)

    def _allocated(self, problem: Problem, kernel_penalty: float | None = None) -> Allocation:
        """Solve without cross terms; ``kernel_penalty`` None: compute the penalty."""
        if kernel_penalty is None:
            kernel_penalty = penalty_per_kernel(problem, self.section)
        return allocate(problem, self.section, kernel_penalty)

    def _predicted(self, schemes: dict[str, str], cross_terms: CrossTerms | None) -> float | None:
        if cross_terms is not None and self.table.predicts_nmse:
            return cross_terms.predicted_loss
        return self._plan_loss(schemes) if self.table.predicts_nmse else None

    def _plan_loss(self, schemes: dict[str, str]) -> float:
        return self.table.plan_loss(schemes, cross_share(self.table, schemes))

    def _floor(self, smallest: int) -> str:
        """Return why no plan is smaller than ``smallest`` bytes."""
        causes = floor_causes(self.layers, self.choices, self.refused, self.rules, self.target)
        census = take_census(self.exported.graph)
        return floor_text(causes, smallest, self.fixed_bytes, self.fp16_size, census)

    def _activations_hint(self) -> str:
        importance = self.table.importance
        if importance is None or not importance.activation_bits.any():
            return ""
        return f" Note that measure.orm.activation_bits is {self.orm.activation_bits}: it rules out schemes."

    def _ruled_out(self, layer: str, choices: Choices) -> dict[str, str]:
        """Return scheme -> why the table lacks it, for schemes that the layer could take."""
        importance = self.table.importance
        reason = f"the metric {self.table.metric} has not measured it"
        if importance is not None:
            bits = int(importance.activation_bits[importance.layers.index(layer)])
            reason = (
                f"the metric {self.table.metric} fixes the activations of this layer at {bits} bits"
            )
        return {s.name: reason for s in choices.schemes if s.name not in self.table.losses[layer]}

    def _bit_program(
        self, schemes: dict[str, str], weight_bytes: int
    ) -> tuple[BitProgram | None, list[LayerBits]]:
        """Return the plan's weighted bits with their bound; per layer importance and linear bits.

        None for a metric without importances. ``weight_bytes``: the budget minus all constants that
        are not layers.
        """
        if self.table.importance is None:
            return None, [(None, None)] * len(self.layers)
        from mpq_deploy.sensitivity.bit_losses import scheme_bits
        from mpq_deploy.sensitivity.bit_program import linear_bits

        bits = [
            {name: scheme_bits(layer, SCHEMES[name], self.orm.bits) for name in choice.bytes}
            for layer, choice in zip(self.layers, self.choices)
        ]
        importance = self.table.importance.total
        sizes = np.array([layer.weights for layer in self.layers], np.float64)
        low, high = (np.array([f(row.values()) for row in bits], np.float64) for f in (min, max))
        bound = linear_bits(importance, sizes, low, high, 8.0 * weight_bytes)
        taken = np.array([row[schemes[layer.name]] for row, layer in zip(bits, self.layers)])
        rows: list[LayerBits] = [(float(c), float(b)) for c, b in zip(importance, bound.bits)]
        return BitProgram(
            weighted_bits=float(importance @ taken), linear_bound=bound.objective
        ), rows

    def _planned(
        self,
        layer: Layer,
        choice: LayerChoice,
        scheme: str,
        importance: float | None,
        linear_bits: float | None,
    ) -> PlannedLayer:
        return PlannedLayer(
            name=layer.name,
            op=layer.op,
            scheme=scheme,
            bytes=choice.bytes[scheme],
            fp16_bytes=FP16_BYTES * layer.weights,
            weights=layer.weights,
            weight_shape=layer.weight_shape,
            predicted_loss=choice.loss[scheme] if self.table.predicts else None,
            latency_ms=choice.latency_ns[scheme] / 1e6 if choice.latency_ns else None,
            refused=self.refused[layer.name],
            importance=importance,
            linear_bits=linear_bits,
        )
