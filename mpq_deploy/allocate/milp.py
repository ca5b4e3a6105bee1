"""Choose one scheme per layer so that the predicted loss is least and the bytes fit: one MILP, solved by HiGHS.

In: what each (layer, scheme) costs in bytes and in loss, and where a limit on latency is set, in nanoseconds. Out: a
``PrecisionPlan``. Bytes are exact: the plan's total is what the quantized file holds, and it never exceeds the budget.
"""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.errors import InfeasibleBudgetError, InfeasibleLatencyError, MpqError, UsageError, nearest
from mpq_deploy.formats.scheme import BRANCH_KERNELS, SCHEMES
from mpq_deploy.formats.sizes import ACTIVATION_SCALE_BYTES

Array = np.ndarray[Any, Any]
# Lower and upper limit, columns, coefficients.
Row = tuple[float, float, Array, Array]

# A plan whose loss is a smaller share of the largest single loss is solved again at its own scale (our choice).
SMALL_OBJECTIVE = 1e-4


@dataclass(frozen=True)
class LayerChoice:
    """What the solver knows of one layer: its input tensors, and bytes and loss per scheme.

    ``input_bytes``: scheme -> bytes of what quantizes one input, where that is more than a scale. ``latency``: scheme
    -> nanoseconds of one call, without the quantizers of its inputs; empty where none is known.
    """

    name: str
    inputs: tuple[str, ...]
    bytes: Mapping[str, int]
    loss: Mapping[str, float]
    input_bytes: Mapping[str, int] = field(default_factory=dict)
    latency: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """An allocation: layers to decide, the bytes of all other constants, and the budget in bytes.

    ``foldable``: input tensors whose producer can take the factors of their channels -> the layers that read them.
    ``quantizer_latency``: name of an activation quantizer (``quantizers``) -> nanoseconds, once for all its readers;
    ``fixed_latency``: of what is no layer. ``max_latency``: the limit on the sum of all, in nanoseconds; None: none.
    """

    layers: Sequence[LayerChoice]
    fixed_bytes: int
    budget_bytes: int
    foldable: Mapping[str, frozenset[str]] = field(default_factory=dict)
    quantizer_latency: Mapping[str, int] = field(default_factory=dict)
    fixed_latency: int = 0
    max_latency: int | None = None


@dataclass(frozen=True)
class SolverReport:
    """How the solver ended. ``gap`` is relative to the loss of the plan; ``bound`` is the proven least loss."""

    status: str
    gap: float
    loss: float
    bound: float


@dataclass(frozen=True)
class PrecisionPlan:
    """One scheme per layer. Sizes in bytes.

    ``predicted_loss`` as in the sensitivity table; None where the metric ranks layers without predicting an error.
    ``bit_programme``, for metrics that weigh bits by importance: ``weighted_bits`` = sum of importance x bits of the
    plan, and ``linear_bound``, what the linear programme over continuous bits reaches within the same bytes.
    ``cross_terms``, for metrics with probes: the fields of ``refine.CrossTerms``. ``simulated``: some layers have
    schemes that no engine can hold, and bytes are nominal. ``latency``: the fields of ``latency.costs.PlanLatency``;
    None where nothing is known of the target's speed.
    """

    budget_bytes: int
    size_bytes: int
    fp16_size_bytes: int
    fixed_bytes: int
    predicted_loss: float | None
    schemes: dict[str, str]
    layers: list[dict[str, Any]]
    others: list[dict[str, Any]]
    solver: SolverReport
    notes: list[str] = field(default_factory=list)
    bit_programme: dict[str, float] | None = None
    cross_terms: dict[str, Any] | None = None
    simulated: bool = False
    latency: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write the plan as JSON with sorted keys."""
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> PrecisionPlan:
        """Read what ``save`` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["solver"] = SolverReport(**values["solver"])
        return cls(**values)


def quantizers(layer: LayerChoice, scheme: str) -> dict[str, int]:
    """Name the activation quantizers that ``layer`` reads under ``scheme``, with their bytes.

    Layers share those of equal names. Factors of channels are counted here even where a producer may take them.
    """
    form = SCHEMES[scheme]
    if form.activation is None:
        return {}
    size = layer.input_bytes.get(scheme, ACTIVATION_SCALE_BYTES)
    return {tensor + form.activation_form: size for tensor in layer.inputs}


def plan_bytes(problem: Problem, schemes: Mapping[str, str]) -> int:
    """Bytes of all constants when each layer takes its scheme in ``schemes``: shared scales count once."""
    total = problem.fixed_bytes
    quantized: dict[str, int] = {}
    for layer in problem.layers:
        scheme = schemes[layer.name]
        total += layer.bytes[scheme]
        quantized.update(quantizers(layer, scheme))
    for tensor, readers in problem.foldable.items():
        forms = {SCHEMES[schemes[name]].activation_form for name in readers}
        if len(forms) == 1 and (form := forms.pop()).startswith("+scale"):
            quantized[tensor + form] = ACTIVATION_SCALE_BYTES
    return total + sum(quantized.values())


def plan_latency(problem: Problem, schemes: Mapping[str, str]) -> int:
    """Nanoseconds of one call when each layer takes its scheme in ``schemes``: shared quantizers count once."""
    total = problem.fixed_latency
    shared: set[str] = set()
    for layer in problem.layers:
        total += layer.latency.get(schemes[layer.name], 0)
        shared.update(quantizers(layer, schemes[layer.name]))
    return total + sum(problem.quantizer_latency.get(name, 0) for name in shared)


def fits(problem: Problem, schemes: Mapping[str, str]) -> bool:
    """Tell whether a plan holds the budget and the limit on latency."""
    in_time = problem.max_latency is None or plan_latency(problem, schemes) <= problem.max_latency
    return in_time and plan_bytes(problem, schemes) <= problem.budget_bytes


def smallest_plan(problem: Problem) -> dict[str, str]:
    """The plan of fewest bytes (the smallest feasible budget is its ``plan_bytes``)."""
    smallest = {}
    for layer in problem.layers:
        # A scheme with INT8 activations counts its input's scale here; at equal bytes the smaller loss wins.
        def cost(scheme: str, layer: LayerChoice = layer) -> tuple[int, float]:
            return layer.bytes[scheme] + sum(quantizers(layer, scheme).values()), layer.loss[scheme]

        smallest[layer.name] = min(layer.bytes, key=cost)
    return smallest


def allocate(problem: Problem, gap: float = 1e-4, time_limit: float = 60.0) -> tuple[dict[str, str], SolverReport]:
    """Solve the allocation to a relative ``gap``; return the scheme of each layer and how the solver ended.

    Minimise sum loss[l, s] x[l, s] over binaries x, with sum_s x[l, s] = 1, bytes <= budget, and one extra binary
    per activation tensor that is 1 when any reader is INT8 (its scale costs bytes once). Ties are broken towards
    fewer bytes by a term of at most 1e-9 of the largest loss over all layers together, so equal inputs give
    equal plans; HiGHS runs with one thread and a fixed seed.

    With ``max_latency``, latency is a row like the bytes, its shared quantizers included.

    Raises InfeasibleBudgetError, which names the smallest feasible budget, when nothing fits, and
    InfeasibleLatencyError, which names the least latency within the budget.
    """
    least = plan_bytes(problem, smallest_plan(problem))
    if least > problem.budget_bytes:
        # Sharing activation scales may save a few bytes more than choosing layer by layer.
        frugal = [replace(layer, loss={s: float(b) for s, b in layer.bytes.items()}) for layer in problem.layers]
        unlimited = replace(problem, layers=frugal, budget_bytes=least, max_latency=None)
        least = plan_bytes(problem, _Model(unlimited, scale_cost=True).solve(0.0, time_limit, Allowance())[0])
    if least > problem.budget_bytes:
        raise InfeasibleBudgetError(
            f"No plan fits {problem.budget_bytes:,} bytes: the smallest takes {least:,} bytes.",
            "Raise the budget, allow smaller schemes in the recipe, or protect fewer layers.",
            least,
        )
    _check_latency(problem, time_limit)
    schemes, report = solve_exactly(problem, gap, time_limit)
    largest = max(loss for layer in problem.layers for loss in layer.loss.values())
    if 0 < report.loss < SMALL_OBJECTIVE * largest:
        # The solver's tolerances are absolute, and set by the largest loss. No choice that alone costs more than a
        # known plan can be part of a better one: without those the numbers are of one size.
        affordable = [_affordable(layer, schemes[layer.name], report.loss) for layer in problem.layers]
        finer, fine_report = solve_exactly(replace(problem, layers=affordable), gap, time_limit)
        if fine_report.loss <= report.loss:
            return finer, fine_report
    return schemes, report


def _check_latency(problem: Problem, time_limit: float) -> None:
    """Raise InfeasibleLatencyError when no plan within the budget holds the limit on latency."""
    if problem.max_latency is None or fits(problem, smallest_plan(problem)):
        return
    least = plan_latency(problem, fastest_plan(problem, time_limit))
    if least > problem.max_latency:
        raise InfeasibleLatencyError(
            f"No plan within the budget takes at most {problem.max_latency / 1e6:,.6g} ms: "
            f"the fastest takes {ceil_ms(least)} ms.",
            "Raise the limit on latency or the budget, or allow more schemes in the recipe.",
            least,
        )


def ceil_ms(nanoseconds: int) -> str:
    """Return milliseconds with three decimals, rounded up, so that the figure holds as a limit: ``1.235``."""
    return f"{-(-nanoseconds // 1000) / 1000:,.3f}"


def fastest_plan(problem: Problem, time_limit: float = 60.0, max_loss: float | None = None) -> dict[str, str]:
    """Return the plan of least latency within the budget, whatever its ``max_latency``; the budget must be feasible.

    ``max_loss``: limit on the sum of the layers' losses. Raises UsageError, which names the least, where nothing holds
    it. To a gap of 0 within ``time_limit`` seconds.
    """
    free = replace(problem, max_latency=None)
    if max_loss is not None:
        least = allocate(free, time_limit=time_limit)[1].loss
        if least > max_loss:
            raise UsageError(
                f"No plan within the budget has a predicted loss of at most {max_loss:.3g}.",
                f"The least is {least:.3g} (allocate.max_loss).",
            )
    timed = [replace(layer, loss={s: float(layer.latency.get(s, 0)) for s in layer.bytes}) for layer in free.layers]
    ceiling = None if max_loss is None else LossCeiling({n.name: n.loss for n in problem.layers}, max_loss)
    model = _Model(replace(free, layers=timed), ceiling=ceiling, tensor_cost=problem.quantizer_latency)
    return _within_budget(model, 0.0, time_limit)[0]


def allocate_with_fee(
    problem: Problem, fee: float, gap: float = 1e-4, time_limit: float = 60.0
) -> tuple[dict[str, str], SolverReport]:
    """Allocate with every kernel of a branch charged the loss ``fee`` (``kernel_charge``).

    The report's loss and bound are without the fees.
    """
    if not fee:
        return allocate(problem, gap, time_limit)
    charged = replace(problem, layers=[_charged(layer, fee) for layer in problem.layers])
    schemes, solved = allocate(charged, gap, time_limit)
    fees = sum(kernels(scheme) for scheme in schemes.values()) * fee
    loss = sum(layer.loss[schemes[layer.name]] for layer in problem.layers)
    return schemes, SolverReport(solved.status, solved.gap, loss, min(loss, solved.bound - fees))


def kernel_charge(problem: Problem, charge: float, gap: float = 1e-4, time_limit: float = 60.0) -> float:
    """Return what one kernel of a branch is charged, as a loss: a share ``charge`` of the plan's.

    The share is of the loss of the best plan without branches (with free ones, where no such plan fits), so the charge
    needs no unit and holds for every budget. Our choice. 0 where no layer may take a branch.
    """
    if not charge or not any(SCHEMES[s].branch for layer in problem.layers for s in layer.bytes):
        return 0.0
    try:
        report = allocate(_without_branches(problem), gap, time_limit)[1]
    except (InfeasibleBudgetError, InfeasibleLatencyError):
        report = allocate(problem, gap, time_limit)[1]
    return charge * report.loss


def kernels(scheme: str) -> int:
    """Return how many kernels the branch of ``scheme`` adds; 0 without one."""
    branch = SCHEMES[scheme].branch
    return BRANCH_KERNELS[branch.kind] if branch else 0


def _charged(layer: LayerChoice, per_kernel: float) -> LayerChoice:
    return replace(layer, loss={s: loss + per_kernel * kernels(s) for s, loss in layer.loss.items()})


def _without_branches(problem: Problem) -> Problem:
    kept = [[s for s in layer.bytes if not SCHEMES[s].branch] or list(layer.bytes) for layer in problem.layers]
    return replace(
        problem,
        layers=[
            replace(layer, bytes={s: layer.bytes[s] for s in names}, loss={s: layer.loss[s] for s in names})
            for layer, names in zip(problem.layers, kept)
        ],
    )


def _affordable(layer: LayerChoice, chosen: str, limit: float) -> LayerChoice:
    kept = [s for s in layer.bytes if s == chosen or layer.loss[s] <= limit]
    return replace(layer, bytes={s: layer.bytes[s] for s in kept}, loss={s: layer.loss[s] for s in kept})


@dataclass(frozen=True)
class MostMoves:
    """A limit on how far a plan may be from ``current``: at most ``moves`` layers change their scheme."""

    current: Mapping[str, str]
    moves: int


@dataclass(frozen=True)
class LossCeiling:
    """A limit on the sum of ``losses`` (layer -> scheme -> loss) where something else is minimised."""

    losses: Mapping[str, Mapping[str, float]]
    limit: float


def solve_exactly(
    problem: Problem, gap: float, time_limit: float, limit: MostMoves | None = None
) -> tuple[dict[str, str], SolverReport]:
    """Solve a problem that has a solution; losses may be negative (changes of a loss).

    HiGHS holds constraints only to a tolerance, so exact integer bytes and nanoseconds are checked and enforced here.
    """
    return _within_budget(_Model(problem, limit=limit), gap, time_limit)


def _within_budget(model: _Model, gap: float, time_limit: float) -> tuple[dict[str, str], SolverReport]:
    problem = model.problem
    allowance = Allowance()
    for _ in range(4):
        schemes, report = model.solve(gap, time_limit, allowance)
        if fits(problem, schemes):
            return schemes, report
        excess = max(plan_bytes(problem, schemes) - problem.budget_bytes, 0)
        late = 0 if problem.max_latency is None else max(plan_latency(problem, schemes) - problem.max_latency, 0)
        allowance = Allowance(allowance.bytes + excess, allowance.nanoseconds + late)
    raise MpqError(
        f"The solver exceeds its limits by {excess} bytes and {late} ns.", "This is a defect: please report the plan."
    )


@dataclass(frozen=True)
class Allowance:
    """By how much the solver's limits are tightened, to undo its tolerances."""

    bytes: int = 0
    nanoseconds: int = 0


def undominated(layer: LayerChoice, also: Mapping[str, float] | None = None) -> list[str]:
    """Leave out every scheme that another beats or equals in bytes and in loss without needing another input.

    ``also``: scheme -> what else it costs, where that is limited. This never removes all optimal plans, and shrinks the
    MILP by half.
    """
    further = also or {}
    kept: list[str] = []
    for scheme in sorted(layer.bytes, key=lambda s: (layer.bytes[s], layer.loss[s], s)):
        readable: tuple[dict[str, int], ...] = ({}, quantizers(layer, scheme))
        beaten = any(
            layer.loss[k] <= layer.loss[scheme]
            and further.get(k, 0.0) <= further.get(scheme, 0.0)
            and quantizers(layer, k) in readable
            for k in kept
        )
        if not beaten:
            kept.append(scheme)
    return kept


class _Model:
    """The MILP in arrays: one column per (layer, scheme), then one per activation tensor."""

    def __init__(
        self,
        problem: Problem,
        scale_cost: bool = False,
        limit: MostMoves | None = None,
        ceiling: LossCeiling | None = None,
        tensor_cost: Mapping[str, int] | None = None,
    ) -> None:
        self.problem = problem
        self.limit = limit
        self.ceiling = ceiling
        # The current scheme of a layer must stay a choice even where another beats it: moves are limited.
        held = limit.current if limit else {}
        self.pairs = [
            (i, s)
            for i, layer in enumerate(problem.layers)
            for s in dict.fromkeys([*undominated(layer, self._also(layer)), *([held[layer.name]] if held else [])])
        ]
        read = {n: size for i, s in self.pairs for n, size in quantizers(problem.layers[i], s).items()}
        self.tensors = sorted(read)
        self.tensor_bytes = np.array([read[name] for name in self.tensors], np.float64)
        self.tensor_latency = np.array([problem.quantizer_latency.get(n, 0) for n in self.tensors], np.float64)
        self.tensor_cost = self.tensor_bytes if scale_cost else np.zeros(len(read))
        if tensor_cost is not None:
            self.tensor_cost = np.array([tensor_cost.get(name, 0) for name in self.tensors], np.float64)
        self.loss = np.array([problem.layers[i].loss[s] for i, s in self.pairs], np.float64)
        if not np.all(np.isfinite(self.loss)):
            bad = self.pairs[int(np.flatnonzero(~np.isfinite(self.loss))[0])]
            name = problem.layers[bad[0]].name
            raise MpqError(f"The measured loss of {name} under {bad[1]} is not finite.", "Measure again.")
        self.bytes = np.array([problem.layers[i].bytes[s] for i, s in self.pairs], np.float64)
        self.latency = np.array([problem.layers[i].latency.get(s, 0) for i, s in self.pairs], np.float64)

    def _also(self, layer: LayerChoice) -> Mapping[str, float] | None:
        """What a scheme costs that is limited, beside bytes: at most one of latency and loss is."""
        if self.ceiling is not None:
            return self.ceiling.losses[layer.name]
        return None if self.problem.max_latency is None else layer.latency

    def solve(self, gap: float, time_limit: float, allowance: Allowance) -> tuple[dict[str, str], SolverReport]:
        """Build the rows, run HiGHS and read the chosen columns."""
        started = time.monotonic()
        highs = self._run(gap, time_limit, allowance, "choose")
        if highs.modelStatusToString(highs.getModelStatus()) == "Infeasible":
            # Presolve of HiGHS 1.15.1 says so of problems that have a solution.
            highs = self._run(gap, time_limit, allowance, "off")
        status = highs.modelStatusToString(highs.getModelStatus())
        info = highs.getInfo()
        values = np.asarray(highs.getSolution().col_value)
        if not len(values) or status not in ("Optimal", "Time limit reached"):
            seconds = time.monotonic() - started
            raise MpqError(
                f"HiGHS ended with '{status}' after {seconds:.1f} s.",
                "Loosen the recipe's allocate.time_limit."
                if "limit" in status
                else "This is a defect: please report it.",
            )
        schemes: dict[str, str] = {}
        best: dict[str, float] = {}
        for (i, scheme), value in zip(self.pairs, values):
            name = self.problem.layers[i].name
            if value > best.get(name, -1.0):
                best[name], schemes[name] = float(value), scheme
        loss = sum(layer.loss[schemes[layer.name]] for layer in self.problem.layers)
        bound = min(loss, float(info.mip_dual_bound) * self.scale)
        return schemes, SolverReport(status, (loss - bound) / abs(loss) if loss else 0.0, loss, bound)

    def _run(self, gap: float, time_limit: float, allowance: Allowance, presolve: str) -> Any:
        from mpq_deploy.system.highs import QuietHighs

        highs = QuietHighs(mip_rel_gap=gap, time_limit=time_limit, mip_feasibility_tolerance=1e-9, presolve=presolve)
        self._load(highs, allowance)
        highs.run()
        return highs

    def _load(self, highs: Any, allowance: Allowance) -> None:
        """Hand the columns and rows to HiGHS as one sparse matrix by rows."""
        import highspy

        count = len(self.pairs)
        columns = count + len(self.tensors)
        self.scale = float(np.abs(self.loss).max()) or 1.0
        # HiGHS compares costs with absolute tolerances: the largest budgeted saving is brought to about 1e3.
        self.scale /= 1e3
        lp = highspy.HighsLp()
        tie_break = 1e-9 * 1e3 / max(float(self.bytes.sum()), 1.0)
        cost = np.zeros(columns)
        cost[:count] = self.loss / self.scale + tie_break * self.bytes
        cost[count:] = self.tensor_cost / self.scale
        rows = self._rows(allowance)
        lp.num_col_, lp.num_row_ = columns, len(rows)
        lp.col_cost_ = cost
        lp.col_lower_, lp.col_upper_ = np.zeros(columns), np.ones(columns)
        lp.integrality_ = [highspy.HighsVarType.kInteger] * columns
        lp.row_lower_ = np.array([low for low, _, _, _ in rows])
        lp.row_upper_ = np.array([high for _, high, _, _ in rows])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0] + [len(index) for _, _, index, _ in rows])
        lp.a_matrix_.index_ = np.concatenate([index for _, _, index, _ in rows])
        lp.a_matrix_.value_ = np.concatenate([value for _, _, _, value in rows])
        highs.passModel(lp)

    def _rows(self, allowance: Allowance) -> list[Row]:
        """Rows (lower, upper, columns, coefficients): one choice per layer, the bytes, the shared scales."""
        import highspy

        infinity = highspy.kHighsInf
        count = len(self.pairs)
        by_layer: dict[int, list[int]] = {}
        by_reader: dict[str, dict[int, list[int]]] = {tensor: {} for tensor in self.tensors}
        for column, (i, scheme) in enumerate(self.pairs):
            by_layer.setdefault(i, []).append(column)
            for name in quantizers(self.problem.layers[i], scheme):
                by_reader[name].setdefault(i, []).append(column)
        rows = [(1.0, 1.0, np.array(columns), np.ones(len(columns))) for columns in by_layer.values()]
        room = self.problem.budget_bytes - self.problem.fixed_bytes - allowance.bytes
        rows.append(self._at_most(room, np.concatenate([self.bytes, self.tensor_bytes])))
        if self.problem.max_latency is not None:
            left = self.problem.max_latency - self.problem.fixed_latency - allowance.nanoseconds
            rows.append(self._at_most(left, np.concatenate([self.latency, self.tensor_latency])))
        if self.ceiling is not None:
            names = [self.problem.layers[i].name for i, _ in self.pairs]
            losses = [self.ceiling.losses[name][s] for name, (_, s) in zip(names, self.pairs)]
            rows.append(self._at_most(self.ceiling.limit, np.array([*losses, *np.zeros(len(self.tensors))])))
        if self.limit is not None:
            names = [layer.name for layer in self.problem.layers]
            kept = [c for c, (i, scheme) in enumerate(self.pairs) if self.limit.current[names[i]] == scheme]
            low = float(len(names) - self.limit.moves)
            rows.append((low, infinity, np.array(kept), np.ones(len(kept))))
        for number, tensor in enumerate(self.tensors):
            for columns in by_reader[tensor].values():
                index = np.array([*columns, count + number])
                rows.append((-infinity, 0.0, index, np.array([1.0] * len(columns) + [-1.0])))
        return rows

    def _at_most(self, limit: float, coefficients: Array) -> Row:
        """A row over all columns, of the size of one: HiGHS' tolerances are absolute."""
        import highspy

        unit = float(coefficients.max(initial=0.0)) or 1.0
        return -highspy.kHighsInf, limit / unit, np.arange(len(coefficients)), coefficients / unit


def budget_in_bytes(budget: str | float, fp16_size_bytes: int, weights: int) -> int:
    """Turn a budget into bytes: a fraction of the FP16 size (0.35, "35%"), a size ("600MB"), or "4.5bits".

    ``weights`` is the number of quantizable weights (for effective bits, the mean bits of all constants per
    weight). Raises UsageError for anything else.
    """
    text = str(budget).strip()
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "b": 1.0}
    lowered = text.lower().replace(" ", "")
    suffix = next((u for u in ("bits", "kib", "mib", "gib", "kb", "mb", "gb", "%", "b") if lowered.endswith(u)), "")
    try:
        number = float(lowered.removesuffix(suffix))
    except ValueError:
        number = float("nan")
    if not np.isfinite(number) or number <= 0 or (suffix == "" and number > 1):
        raise UsageError(
            f"The budget '{text}' is no size.",
            'Give a fraction of the FP16 size up to 1 (0.35), a size ("600MB"), or bits per weight ("4.5bits").',
        )
    if suffix in ("", "%"):
        fraction = number / 100 if suffix else number
        if fraction > 1:
            raise UsageError(f"The budget '{text}' is more than the FP16 size.", "Give at most 100%.")
        return int(fraction * fp16_size_bytes)
    if suffix == "bits":
        return int(number * weights / 8)
    return int(number * units[suffix])


def protected_schemes(
    layers: Sequence[tuple[str, tuple[str, ...]]], rules: Sequence[tuple[str, tuple[str, ...]]]
) -> dict[str, tuple[str, ...]]:
    """Apply the recipe's protection rules: (layer pattern, allowed schemes or families), later rules win.

    ``layers``: (name, candidate schemes). Raises UsageError when a pattern matches no layer, or leaves none of a
    layer's schemes.
    """
    kept = dict(layers)
    for pattern, allowed in rules:
        hit = [name for name in kept if fnmatch.fnmatchcase(name, pattern)]
        if not hit:
            hint = nearest(pattern, kept) or f"Layers are named like '{next(iter(kept), '')}'."
            raise UsageError(f"The protection rule '{pattern}' matches no layer.", hint)
        for name in hit:
            left = tuple(s for s in dict(layers)[name] if s in allowed or SCHEMES[s].family in allowed)
            if not left:
                raise UsageError(
                    f"The protection rule '{pattern}' leaves no scheme for {name}.",
                    f"It may take {', '.join(dict(layers)[name])}.",
                )
            kept[name] = left
    return kept
