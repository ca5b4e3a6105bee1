"""Improve a plan with the cross terms between layers, which the linear objective ignores.

The probe projections a_{l,s} predict the error of a plan as ||sum_l a_{l,s_l}||^2: errors of layers
cancel or reinforce each other. The quadratic is linearized around the current plan, a MILP picks at
most a dozen changes within the budget, and they are kept if the exact quadratic decreases. Then
single changes and pairs of changes are searched exactly.

With few entries P, minimizing the quadratic would overfit its noise, so its off-diagonal terms are
shrunk: the objective is (1 - rho) sum_l ||a_{l,s_l}||^2 + rho ||sum_l a_{l,s_l}||^2, with rho from
the data (``shrinkage``). Our choice; CLADO (arXiv 2307.05657) solves a quadratic program over
measured pairs of layers instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from mpq_deploy.allocate.milp import Allocation, Nearby, solve
from mpq_deploy.allocate.problem import Objective, Problem
from mpq_deploy.evaluate.interval import error_interval
from mpq_deploy.formats.sizes import ACTIVATION_SCALE_BYTES
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.steadied import steadied_folds, steadied_halves
from mpq_deploy.sensitivity.table import SensitivityTable

MOST_MOVES = 12
MOST_ROUNDS = 12
# The gap of the small MILPs. It may be loose: the exact quadratic decides about their proposals.
GAP = 1e-2
# Limits of the exact search: rounds, changes that are paired, pairs whose exact bytes are counted.
MOST_PAIRS = 40
MOST_CANDIDATES = 800
MOST_TRIED = 64
# The shrinkage is estimated from the layers of largest error, at most so many.
MOST_SHRUNK = 256
# Folds of the measured calls, to evaluate a plan on calls that it was not chosen on.
FOLDS = 4
# Of the logarithm of what a plan loses on timesteps that it was not chosen on, where it was chosen on
# half of them: the share that one chosen on all of them loses elsewhere.
HALVES_SHARE = 2 / 3
# A relative gain below this is rounding.
SMALLEST_GAIN = 1e-9

Projections = Mapping[str, Mapping[str, Array]]


class Quadratic:
    """The shrunk quadratic over a problem's schemes, plus ``kernel_penalty`` per branch kernel.

    ``projections``: layer -> scheme -> float [P]; those of tied layers are added. A move is a
    (layer, scheme); moves are numbered in the problem's order.
    """

    def __init__(
        self,
        problem: Problem,
        projections: Projections,
        rho: float = 1.0,
        kernel_penalty: float = 0.0,
    ) -> None:
        self.problem = problem
        self.rho = rho
        self.moves = [(layer.name, scheme) for layer in problem.layers for scheme in layer.bytes]
        self._number = {move: i for i, move in enumerate(self.moves)}
        self.layer = np.array([i for i, layer in enumerate(problem.layers) for _ in layer.bytes])
        choices = [(layer, scheme) for layer in problem.layers for scheme in layer.bytes]
        parts = [[np.asarray(projections[n][s], np.float64) for n in c.layers] for c, s in choices]
        vectors = np.stack([sum(own) for own in parts])
        # Drop the entries of held-back calls, which are zeros.
        self.vectors = vectors[:, vectors.any(axis=0)]
        self._apart = np.array([sum(float(one @ one) for one in own) for own in parts])
        self.bytes = np.array([layer.bytes[s] for layer, s in choices], np.int64)
        self.latency = np.array([layer.latency_ns.get(s, 0) for layer, s in choices], np.int64)
        self._squares = np.einsum("mp,mp->m", self.vectors, self.vectors)
        self._starts = np.append(np.flatnonzero(np.diff(self.layer, prepend=-1)), len(self.moves))
        self._overlaps: dict[int, Array] = {}
        self._penalties = kernel_penalty * np.array([n.kernels(s) for n, s in choices], np.float64)

    def chosen(self, schemes: Mapping[str, str]) -> Array:
        """Return the numbers of the moves of a plan (layer -> scheme), int [layers]."""
        return np.array([self._number[n.name, schemes[n.name]] for n in self.problem.layers])

    def loss(self, schemes: Mapping[str, str]) -> float:
        """Return the objective of a plan: the shrunk quadratic and the kernel penalties."""
        chosen = self.chosen(schemes)
        total = self.vectors[chosen].sum(0)
        apart, penalty = self._apart[chosen].sum(), self._penalties[chosen].sum()
        return float((1 - self.rho) * apart + self.rho * (total @ total) + penalty)

    def changes(self, schemes: Mapping[str, str]) -> Array:
        """Return how each move alone changes a plan's objective, [moves]; 0 for its own moves."""
        chosen = self.chosen(schemes)
        instead_of = chosen[self.layer]
        along = self.vectors @ self.vectors[chosen].sum(0)
        overlap = np.concatenate(
            [self._overlap(layer, int(move)) for layer, move in enumerate(chosen)]
        )
        apart = self._apart - self._apart[instead_of]
        steps = self._squares + self._squares[instead_of] - 2 * overlap
        change = (1 - self.rho) * apart + self.rho * (2 * (along - along[instead_of]) + steps)
        change += self._penalties - self._penalties[instead_of]
        change[chosen] = 0.0
        return np.asarray(change)

    def _overlap(self, layer: int, move: int) -> Array:
        """Return the inner products of ``move`` with all moves of its layer."""
        if move not in self._overlaps:
            own = slice(self._starts[layer], self._starts[layer + 1])
            self._overlaps[move] = self.vectors[own] @ self.vectors[move]
        return self._overlaps[move]

    @cached_property
    def byte_price(self) -> float:
        """The loss per byte at which the layers' best schemes fill the budget.

        It is the Lagrange multiplier of the problem without cross terms and with free activation
        scales, found by bisection of its logarithm.
        """
        room = self.problem.budget_bytes - self.problem.fixed_bytes
        starts, sizes = self._starts[:-1], np.diff(self._starts)
        low, high = -40.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            paid = self._apart + 10.0**middle * self.bytes
            best = np.repeat(np.minimum.reduceat(paid, starts), sizes)
            smallest = np.where(paid <= best, self.bytes, np.iinfo(np.int64).max)
            if np.minimum.reduceat(smallest, starts).sum() > room:
                low = middle
            else:
                high = middle
        return float(10.0**high)


def shrinkage(vectors: Array, calls: Array, steps: int) -> float:
    """Return rho in [0, 1]: the share of inner products of ``vectors`` [L, P] that is not noise.

    With G_lm = <a_l, a_m>, rho = 1 - sum Var(G_lm) / sum G_lm^2 over l != m. This is the shrinkage
    of Ledoit and Wolf (2004) towards the diagonal, estimated as by Schaefer and Strimmer (2005) but
    on inner products in place of correlations, because large errors matter most. Our reading. The
    independent units are the calls (``calls`` int [P], -1 for none): one call may appear at several
    of the ``steps`` timesteps (the entries' first axis). Timesteps are strata.
    """
    by_step = calls.reshape(steps, -1)
    sizes = np.array([len(np.unique(row[row >= 0])) for row in by_step])
    if len(vectors) < 2 or sizes.min() < 2:
        return 0.0
    largest = np.argsort(-np.einsum("lp,lp->l", vectors, vectors), kind="stable")[:MOST_SHRUNK]
    rows = vectors[np.sort(largest)].reshape(min(len(vectors), MOST_SHRUNK), steps, -1)
    # The mean product over each timestep's calls, and Bessel's correction as a root, n / (n - 1).
    means = np.einsum("lkp,mkp->klm", rows, rows, optimize=True) / sizes[:, None, None]
    roots = np.sqrt(sizes / (sizes - 1))
    variance = np.zeros(means.shape[1:])
    for call in np.unique(calls[calls >= 0]):
        rest = np.zeros_like(variance)
        for step in np.flatnonzero((by_step == call).any(axis=1)):
            block = rows[:, step, by_step[step] == call]
            rest += roots[step] * (block @ block.T - means[step])
        variance += np.square(rest)
    gram = np.einsum("klm,k->lm", means, sizes.astype(np.float64))
    off = ~np.eye(len(gram), dtype=bool)
    signal = float(np.square(gram[off]).sum())
    return float(np.clip(1 - variance[off].sum() / signal, 0.0, 1.0)) if signal > 0 else 0.0


def refine(
    quadratic: Quadratic, schemes: Mapping[str, str], time_limit: float = 10.0
) -> dict[str, str]:
    """Return a plan within the problem's limits whose objective is at most that of ``schemes``.

    Deterministic. ``time_limit``: seconds for each small MILP.
    """
    current = dict(schemes)
    loss = quadratic.loss(current)
    moves = min(MOST_MOVES, len(current))
    for _ in range(MOST_ROUNDS):
        if not moves:
            break
        candidate = _best_moves(quadratic, current, moves, time_limit)
        candidate_loss = quadratic.loss(candidate)
        if candidate_loss < loss * (1 - SMALLEST_GAIN):
            current, loss = candidate, candidate_loss
        else:
            # The changes are good one by one, but not together: try fewer.
            moves //= 2
    for _ in range(MOST_PAIRS):
        better = _best_pair(quadratic, current, loss)
        if better is None or (better_loss := quadratic.loss(better)) >= loss:
            break
        current, loss = better, better_loss
    return current


def _best_moves(
    quadratic: Quadratic, current: Mapping[str, str], moves: int, time_limit: float
) -> dict[str, str]:
    """Return the plan after at most ``moves`` changes, by a MILP whose costs are ``changes``."""
    problem, chosen, changes = (
        quadratic.problem,
        quadratic.chosen(current),
        quadratic.changes(current),
    )
    added = quadratic.bytes - quadratic.bytes[chosen[quadratic.layer]]
    costs: dict[str, dict[str, float]] = {layer.name: {} for layer in problem.layers}
    for move in np.sort(np.concatenate([chosen, _promising(quadratic, changes, added, chosen)])):
        name, scheme = quadratic.moves[move]
        costs[name][scheme] = float(changes[move])
    narrowed = replace(problem, layers=[layer.only(costs[layer.name]) for layer in problem.layers])
    return solve(narrowed, Objective(costs), GAP, time_limit, Nearby(current, moves)).schemes


def _best_pair(
    quadratic: Quadratic, current: Mapping[str, str], loss: float
) -> dict[str, str] | None:
    """Return the plan after the best change or pair of changes within the limits; None for none."""
    problem, chosen = quadratic.problem, quadratic.chosen(current)
    instead_of = chosen[quadratic.layer]
    alone = quadratic.changes(current)
    added = quadratic.bytes - quadratic.bytes[instead_of]
    moves = _promising(quadratic, alone, added, chosen)
    if not len(moves):
        return None
    steps = quadratic.vectors[moves] - quadratic.vectors[instead_of[moves]]
    gain = alone[moves][:, None] + alone[moves][None] + 2 * quadratic.rho * (steps @ steps.T)
    layer = quadratic.layer[moves]
    gain[layer[:, None] == layer[None]] = np.inf
    # The diagonal holds the single changes.
    np.fill_diagonal(gain, alone[moves])
    room = added[moves][:, None] + added[moves][None]
    np.fill_diagonal(room, added[moves])
    # Shared activation scales may free a few bytes more; ``problem.fits`` decides below.
    spare = problem.budget_bytes - problem.plan_bytes(current) + 4 * ACTIVATION_SCALE_BYTES
    gain[(room > spare) | (gain >= -SMALLEST_GAIN * abs(loss))] = np.inf
    _rule_out_slow(quadratic, current, moves, gain)
    flat = gain.reshape(-1)
    best = np.argpartition(flat, min(MOST_TRIED, len(flat) - 1))[:MOST_TRIED]
    for place in best[np.argsort(flat[best], kind="stable")]:
        if not np.isfinite(flat[place]):
            return None
        pair = [quadratic.moves[moves[i]] for i in np.unravel_index(place, gain.shape)]
        plan = {**current, **dict(pair)}
        if problem.fits(plan):
            return plan
    return None


def _rule_out_slow(
    quadratic: Quadratic, current: Mapping[str, str], moves: Array, gain: Array
) -> None:
    """Set ``gain`` [moves, moves] to infinity, in place, for pairs over the latency limit."""
    problem = quadratic.problem
    if problem.max_latency_ns is None:
        return
    instead_of = quadratic.chosen(current)[quadratic.layer]
    slower = (quadratic.latency - quadratic.latency[instead_of])[moves]
    added = slower[:, None] + slower[None]
    np.fill_diagonal(added, slower)
    # Quantizers that no layer reads any more free their time; ``problem.fits`` decides.
    shared = 4 * max(problem.quantizer_ns.values(), default=0)
    gain[added > problem.max_latency_ns - problem.plan_ns(current) + shared] = np.inf


def _promising(quadratic: Quadratic, alone: Array, added: Array, chosen: Array) -> Array:
    """Return the ``MOST_CANDIDATES`` moves of smallest change plus price of the added bytes."""
    others = np.ones(len(alone), bool)
    others[chosen] = False
    moves = np.flatnonzero(others)
    if len(moves) <= MOST_CANDIDATES:
        return moves
    paid = alone[moves] + quadratic.byte_price * added[moves]
    return moves[np.sort(np.argsort(paid, kind="stable")[:MOST_CANDIDATES])]


@dataclass(frozen=True)
class CrossTerms:
    """What the cross terms changed: ``moves`` schemes, and whether the refined plan is ``kept``.

    ``milp_...``: the plan without cross terms; ``refined_...``: with them. Losses are quadratics, of
    steadied tables shrunk (``cross_share``). ``..._seen``: of the plan, on the calls that it was
    chosen on. ``..._held_back``: cross-validated, mean over ``folds`` of the loss on the fold of a
    plan that was chosen in the same way without the fold; None where the calls cannot be split.
    ``growth``: where the calls cannot be split, by how much the plan's loss is expected to be larger
    than on what it was chosen on (``_growth``); the prediction is this times ``..._seen``.
    ``interval``: the 95 % interval of ``predicted_loss``; None where unknown. ``by_call``: the
    prediction for each trajectory, for metrics of final images.
    """

    rho: float
    moves: int
    kept: bool
    folds: int
    milp_seen: float
    milp_held_back: float | None
    refined_seen: float
    refined_held_back: float | None
    interval: tuple[float, float] | None = None
    by_call: tuple[float, ...] = ()
    growth: float = 1.0

    @property
    def predicted_loss(self) -> float:
        """The predicted loss of the resulting plan: cross-validated where possible."""
        if self.kept and self.refined_held_back is not None:
            return self.refined_held_back
        return self.milp_seen * self.growth if self.milp_held_back is None else self.milp_held_back

    def unweighted(self, weights: Array) -> CrossTerms:
        """Return what is predicted of trajectories that all count alike, not ``weights`` [N] times."""
        own = np.array(self.by_call) / weights
        plan = "refined" if self.kept else "milp"
        changes: dict[str, Any] = {
            "by_call": tuple(own.tolist()),
            "interval": error_interval(own[None], np.arange(len(own))[None]),
            f"{plan}_{'held_back' if self.folds else 'seen'}": float(own.mean()),
        }
        return replace(self, **changes)


def allocate_with_cross_terms(
    problem: Problem,
    table: SensitivityTable,
    allocate: Callable[..., Allocation],
    improve: bool = True,
) -> tuple[Allocation, CrossTerms]:
    """Solve ``problem``, refine the plan by cross terms; keep the better one on held-back calls.

    ``allocate(problem, kernel_penalty=...)`` finds a plan without cross terms. ``table`` has
    projections. ``improve`` False: keep the plan and only predict its loss from held-back calls.
    Where the calls cannot be split nothing is refined, because an overfitted plan could not be told
    from a better one.
    """
    parts = steadied_folds(table, FOLDS)
    milp = allocate(problem)
    refined, rho = _refined(problem, table, milp, improve and bool(parts))
    old, new = problem.spread(milp.schemes), problem.spread(refined)
    moves = sum(new[name] != scheme for name, scheme in old.items())
    chosen_again = partial(allocate, kernel_penalty=milp.kernel_penalty)
    before, after = _entries_apart(problem, parts, chosen_again, moves > 0)
    held_back = [
        sum(float(e.sum()) for e in rows) / len(parts) for rows in (before, after) if parts
    ]
    kept = moves > 0 and bool(parts) and held_back[1] < held_back[0]
    share = cross_share(table, old)
    growth = 1.0 if parts else _growth(problem, table, chosen_again)
    entries = [table.plan_entries(old, share) * growth]
    if parts:
        entries = after if kept else before
    result = CrossTerms(
        rho=rho,
        moves=moves,
        kept=kept,
        folds=len(parts),
        milp_seen=table.plan_loss(old, share),
        milp_held_back=held_back[0] if parts else None,
        refined_seen=table.plan_loss(new, share),
        refined_held_back=held_back[1] if parts else None,
        interval=_interval(entries, table),
        by_call=_by_call(entries, table),
        growth=growth,
    )
    return (replace(milp, schemes=refined) if kept else milp), result


def _entries_apart(
    problem: Problem,
    parts: list[tuple[SensitivityTable, SensitivityTable]],
    allocate: Callable[[Problem], Allocation],
    refining: bool,
) -> tuple[list[Array], list[Array]]:
    """Return each fold's entries of the plan that was chosen without it, before and after refining."""
    before: list[Array] = []
    after: list[Array] = []
    for seen, apart in parts:
        part = problem.with_losses(seen.losses)
        plan = allocate(part)
        better, _ = _refined(part, seen, plan, refining)
        share = cross_share(seen, problem.spread(plan.schemes))
        before.append(apart.plan_entries(problem.spread(plan.schemes), share))
        after.append(apart.plan_entries(problem.spread(better), share))
    return before, after


def _growth(
    problem: Problem, table: SensitivityTable, allocate: Callable[[Problem], Allocation]
) -> float:
    """Return ``CrossTerms.growth``: at least 1, and 1 where losses are not steadied.

    The solver prefers schemes whose errors the few measured calls happen not to show. A plan is
    chosen on every other timestep and its loss on the timesteps between compared with that on its
    own, both ways, so that the timesteps' own levels cancel. All timesteps together show more than a
    half does: two thirds of the excess, by its logarithm, are the plan's (our choice, from draws of
    schemes whose loss is known and from docs/results/few-entries.md).
    """
    if table.measured is None:
        return 1.0
    own = other = 0.0
    for seen, apart in steadied_halves(table):
        part = problem.with_losses(seen.losses)
        chosen = problem.spread(allocate(part).schemes)
        own += sum(seen.losses[name][scheme] for name, scheme in chosen.items())
        other += sum(apart.losses[name][scheme] for name, scheme in chosen.items())
    return max(other / own, 1.0) ** HALVES_SHARE if own > 0 else 1.0


def cross_share(table: SensitivityTable, schemes: Mapping[str, str]) -> float:
    """Return the share of a plan's cross terms that counts in what is predicted of it.

    Of a table as it was measured all of them; of a steadied one, whose own terms hardly vary, what
    ``shrinkage`` says is not noise: from one call none.
    """
    if table.measured is None or table.projections is None or table.calls is None:
        return 1.0
    rows = [table.projections[name][s].astype(np.float64) for name, s in schemes.items()]
    return shrinkage(np.stack(rows), table.calls, len(table.timesteps))


def _by_call(entries: list[Array], table: SensitivityTable) -> tuple[float, ...]:
    if not table.of_images:
        return ()
    rows = np.sum(entries, axis=0) / len(entries)
    return tuple(float(error) for error in table.image_errors(rows))


def _interval(entries: list[Array], table: SensitivityTable) -> tuple[float, float] | None:
    """Return the 95 % interval of the sum of the mean ``entries`` [P] over folds; None if unknown.

    The entries of a fold are 0 for calls of other folds.
    """
    if table.calls is None or table.calls.min() < 0:
        return None
    rows, steps = np.sum(entries, axis=0) / len(entries), len(table.timesteps)
    # The interval is of a mean, and the loss is the entries' sum.
    values = rows.reshape(steps, -1) * rows.size
    return error_interval(values, table.calls.reshape(steps, -1))


def _refined(
    problem: Problem, table: SensitivityTable, plan: Allocation, improve: bool
) -> tuple[dict[str, str], float]:
    """Return the refined plan and rho; the plan itself and 0 where cross terms are only noise."""
    if not improve or table.projections is None or table.calls is None:
        return plan.schemes, 0.0
    chosen = [table.projections[name][s] for name, s in problem.spread(plan.schemes).items()]
    vectors = np.stack([vector.astype(np.float64) for vector in chosen])
    rho = shrinkage(vectors, table.calls, len(table.timesteps))
    if not rho:
        return plan.schemes, 0.0
    return refine(
        Quadratic(problem, table.projections, rho, plan.kernel_penalty), plan.schemes
    ), rho
