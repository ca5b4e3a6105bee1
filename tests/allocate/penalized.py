"""The plan as the stage allocate solves it: every kernel of a branch charged its penalty."""

from __future__ import annotations

from mpq_deploy.allocate.milp import Problem, SolverReport, allocate_with_fee, kernel_charge


def allocate_charged(problem: Problem, charge: float, gap: float = 1e-4) -> tuple[dict[str, str], SolverReport]:
    return allocate_with_fee(problem, kernel_charge(problem, charge, gap), gap)
