"""How long the allocation takes and how near the optimum it ends: 1,000 layers x 8 schemes, made up and seeded.

    python benchmarks/allocate.py

Layers are as wide as those of real denoisers (10^3 to 10^7 weights), their sensitivities spread over five decades,
their bytes follow the same formulas as those of real layers, and three in ten share their input with the next two (so
their activation scale counts once). Beside the gap that HiGHS reports stands one that owes nothing to it: against
the Lagrangian bound max over m >= 0 of sum over layers of min over schemes of (loss + m bytes) - m budget, which the
best plan can touch but not pass. The second table is of the cross terms between layers: made-up projections of 1,280
entries per layer and scheme, a fifth of each common to all layers, whose plan is refined and checked on held-back
calls; "all parts" is the whole of it, with the plans of the four parts of the calls. Exit code 1 when a plan takes 5 s
or more (60 s with the cross terms), HiGHS proves a gap above 1e-4, or a plan that is kept is worse on held-back calls
than the MILP's.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
from table import Page, bench_parser, markdown, verdict

from mpq_deploy.allocate.cross_terms import allocate_with_cross_terms
from mpq_deploy.allocate.milp import Allocation, allocate
from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import AllocateSettings
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_projections

# Scheme -> relative squared error that it causes in a typical layer (the order of magnitude seen on real ones).
TYPICAL = {
    "fp16": 3e-8,
    "w8a16": 3e-5,
    "w8a8": 1e-4,
    "w4a16-b32": 4e-3,
    "w4a16-b64": 5e-3,
    "w4a16-b128": 6e-3,
    "w4a8-b64": 6e-3,
    "w4a8-b128": 7e-3,
}
SPREAD_DECADES = (
    1.25  # standard deviation of log10(sensitivity): 95 % of the layers within five decades
)
SHARED = 0.3
GAP, SECONDS = 1e-4, 5.0
# Cross terms: timesteps x probes x calls = 1,280 entries, and how much of every error all layers have in common.
STEPS, PROBES, CALLS = 10, 8, 16
COMMON = 0.2
CROSS_SECONDS = 60.0


def made_up(layers: int, seed: int) -> list[LayerChoice]:
    """Return the layers of a made-up denoiser."""
    rng = np.random.default_rng(seed)
    choices: list[LayerChoice] = []
    while len(choices) < layers:
        readers = 3 if rng.random() < SHARED / 3 else 1
        tensor = f"x{len(choices)}"
        for _ in range(min(readers, layers - len(choices))):
            # Channels are multiples of 32, the reduction is that of a 1x1 or a 3x3 convolution.
            outputs = int(32 * rng.integers(1, 41))
            reduction = int(32 * rng.integers(1, 41)) * int(rng.choice([1, 9]))
            sensitivity = 10 ** rng.normal(0, SPREAD_DECADES)
            loss = {
                s: float(e * sensitivity * 10 ** rng.normal(0, 0.3)) for s, e in TYPICAL.items()
            }
            sizes = {s: scheme_bytes(s, outputs, reduction) for s in TYPICAL}
            choices.append(LayerChoice(f"layer{len(choices)}", (tensor,), sizes, loss))
    return choices


def scheme_bytes(name: str, outputs: int, reduction: int) -> int:
    """Bytes of codes and FP16 scales."""
    scheme, weights = SCHEMES[name], outputs * reduction
    if not scheme.quantized:
        return 2 * weights
    if scheme.block_size is None:
        return weights + 2 * outputs
    return (
        weights // 2 + 2 * weights // scheme.block_size + (2 * outputs if scheme.activation else 0)
    )


def lagrangian_bound(problem: Problem) -> float:
    """Return the best Lagrangian lower bound of the loss (activation scales taken as free, which only lowers it)."""
    loss = np.array([[layer.loss[s] for s in TYPICAL] for layer in problem.layers])
    size = np.array([[layer.bytes[s] for s in TYPICAL] for layer in problem.layers], np.float64)
    room = problem.budget_bytes - problem.fixed_bytes

    def dual(multiplier: float) -> float:
        return float((loss + multiplier * size).min(axis=1).sum() - multiplier * room)

    # The dual is concave: narrow down log10(multiplier) by golden-section search.
    low, high, golden = -16.0, 2.0, (5**0.5 - 1) / 2
    for _ in range(120):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if dual(10**a) > dual(10**b) else (a, high)
    return dual(10 ** ((low + high) / 2))


def row(layers: int, seed: int, budget: float) -> tuple[list[str], float, float]:
    """Solve one instance; return its row, seconds and gap."""
    choices = made_up(layers, seed)
    fp16 = sum(layer.bytes["fp16"] for layer in choices)
    problem = Problem(choices, 0, int(budget * fp16))
    started = time.perf_counter()
    allocation = allocate(problem, AllocateSettings(gap=GAP))
    schemes, solver = allocation.schemes, allocation.report
    seconds = time.perf_counter() - started
    loss = sum(layer.loss[schemes[layer.name]] for layer in choices)
    bound = lagrangian_bound(problem)
    size = problem.plan_bytes(schemes)
    assert size <= problem.budget_bytes, "the plan exceeds the budget"
    figures = [
        f"{size / fp16:.6f}",
        f"{seconds:.2f}",
        f"{solver.gap:.1e}",
        f"{(loss - bound) / loss:.1e}",
    ]
    return [str(seed), f"{budget:g}", *figures, solver.status], seconds, solver.gap


def with_projections(
    choices: list[LayerChoice], seed: int
) -> tuple[list[LayerChoice], SensitivityTable]:
    """Return projections whose mean squares are about the layers' losses, and the layers with the losses of these."""
    rng = np.random.default_rng((seed, 1))
    shape = (STEPS, PROBES, CALLS)
    common = rng.standard_normal(shape, np.float32)
    hardness = np.exp(0.5 * rng.standard_normal(CALLS, np.float32))
    values: dict[str, dict[str, Array]] = {}
    for layer in choices:
        sign = rng.choice([-1.0, 1.0])
        values[layer.name] = {
            scheme: np.sqrt(loss)
            * hardness
            * (COMMON * sign * common + rng.standard_normal(shape, np.float32))
            for scheme, loss in layer.loss.items()
        }
    turns = np.tile(np.arange(CALLS), (STEPS, 1))
    table = table_from_projections(np.arange(STEPS, dtype=np.float32), values, (), turns)
    return [replace(layer, loss=table.losses[layer.name]) for layer in choices], table


def cross_row(layers: int, seed: int, budget: float) -> tuple[list[str], float, bool]:
    """Solve one instance with the cross terms; return its row, seconds, and whether held-back calls agree."""
    choices, table = with_projections(made_up(layers, seed), seed)
    fp16 = sum(layer.bytes["fp16"] for layer in choices)
    problem = Problem(choices, 0, int(budget * fp16))
    single: list[float] = []

    def solve(part: Problem, kernel_penalty: float = 0.0) -> Allocation:
        single.append(time.perf_counter())
        return allocate(part, AllocateSettings(gap=GAP), kernel_penalty)

    started = time.perf_counter()
    found, crossed = allocate_with_cross_terms(problem, table, solve)
    seconds = time.perf_counter() - started
    assert problem.plan_bytes(found.schemes) <= problem.budget_bytes, "the plan exceeds the budget"
    assert crossed.milp_held_back is not None and crossed.refined_held_back is not None
    change = crossed.refined_held_back / crossed.milp_held_back - 1
    figures = [
        f"{crossed.rho:.2f}",
        str(crossed.moves),
        f"{crossed.refined_seen / crossed.milp_seen - 1:+.1%}",
    ]
    times = [f"{single[1] - started:.1f}", f"{seconds:.1f}"]
    agrees = change < 0 or not crossed.kept
    return (
        [str(seed), f"{budget:g}", *figures, f"{change:+.1%}", str(crossed.kept), *times],
        seconds,
        agrees,
    )


def main() -> None:
    parser = bench_parser(__doc__, recipe=False)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.265, 0.28, 0.3, 0.35, 0.4, 0.5, 0.6]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cross-budgets", type=float, nargs="*", default=[0.28, 0.35, 0.5])
    chosen = parser.parse_args()
    found = [row(chosen.layers, seed, budget) for seed in chosen.seeds for budget in chosen.budgets]
    header = (
        "seed",
        "budget",
        "of FP16",
        "seconds",
        "gap, HiGHS",
        "gap, Lagrangian bound",
        "status",
    )
    page = Page(f"Allocation of {chosen.layers:,} layers x {len(TYPICAL)} schemes")
    page.say(markdown(header, [cells for cells, _, _ in found]))
    slowest, widest = max(seconds for _, seconds, _ in found), max(gap for _, _, gap in found)
    fast, tight = slowest < SECONDS, widest <= GAP
    checks = [
        verdict(fast, f"every plan takes less than {SECONDS:g} s", f"{slowest:.2f} s at most"),
        verdict(tight, f"every plan is within {GAP:g} of the optimum", f"{widest:.1e} at most"),
    ]
    crossed = [
        cross_row(chosen.layers, seed, budget)
        for seed in chosen.seeds
        for budget in chosen.cross_budgets
    ]
    if crossed:
        header = (
            "seed",
            "budget",
            "rho",
            "moves",
            "loss, seen",
            "loss, held back",
            "kept",
            "s, one plan",
            "s, all parts",
        )
        page.say(markdown(header, [cells for cells, _, _ in crossed]))
        longest = max(seconds for _, seconds, _ in crossed)
        quick, better = longest < CROSS_SECONDS, all(agrees for _, _, agrees in crossed)
        checks.append(
            verdict(
                quick, f"cross terms take less than {CROSS_SECONDS:g} s", f"{longest:.1f} s at most"
            )
        )
        checks.append(
            verdict(
                better, "no plan that is kept is worse on held-back calls", f"{len(crossed)} plans"
            )
        )
        fast, tight = fast and quick, tight and better
    page.say("\n".join(checks))
    page.save(chosen.page)
    sys.exit(0 if fast and tight else 1)


if __name__ == "__main__":
    main()
