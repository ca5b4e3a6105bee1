"""Linear and integer programs, solved by HiGHS: silent, on one thread, with one seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from mpq_deploy.errors import MpqError

Array = np.ndarray[Any, Any]


class QuietHighs(highspy.Highs):  # type: ignore[misc]
    """HiGHS that prints nothing, not even its banner."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for option, value in {
            "output_flag": False,
            "threads": 1,
            "random_seed": 1,
            **options,
        }.items():
            self.setOptionValue(option, value)

    def enableCallbacks(self) -> None:  # noqa: N802
        """Since 1.16 the constructor enables callbacks, which prints the banner."""
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


@dataclass(frozen=True)
class Row:
    """``lower`` <= sum of ``coefficients`` x[``columns``] <= ``upper``, which may be infinite."""

    lower: float
    upper: float
    columns: Sequence[int] | Array
    coefficients: Sequence[float] | Array


@dataclass(frozen=True)
class LinearProgram:
    """Minimize or ``maximize`` ``cost`` x over ``low`` <= x <= ``high``, all [N], within ``rows``.

    ``integer``: x takes whole values alone.
    """

    cost: Array
    low: Array
    high: Array
    rows: Sequence[Row]
    integer: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class Outcome:
    """How HiGHS ended: its status, x float64 [N] (empty: none), the objective's bound."""

    status: str
    values: Array
    bound: float


def solve_program(program: LinearProgram, start: Array | None = None, **options: Any) -> Outcome:
    """Solve ``program`` with HiGHS' ``options``, from a feasible ``start`` [N] where one is known.

    HiGHS' presolve errs on a few small programs in a thousand: 1.15.1 calls a program infeasible
    that has a solution, 1.16.0 claims another objective than its solution has, from a start that is
    not the optimum. Both are seen here, and solved again without presolve.
    """
    outcome, claimed = _run(program, start, options)
    if outcome.status == "Infeasible" or not _consistent(program, outcome, claimed):
        outcome, claimed = _run(program, start, {**options, "presolve": "off"})
    if not _consistent(program, outcome, claimed):
        raise MpqError(
            f"HiGHS claims an objective of {claimed:.6g} for a solution of "
            f"{float(program.cost @ outcome.values):.6g}.",
            "This is a bug in the solver: please report it with the run folder.",
        )
    return outcome


def _consistent(program: LinearProgram, outcome: Outcome, claimed: float) -> bool:
    """Return whether the solution, if there is one, has the objective that HiGHS ``claimed``."""
    if not len(outcome.values):
        return True
    return math.isclose(program.cost @ outcome.values, claimed, rel_tol=1e-6, abs_tol=1e-6)


def _run(
    program: LinearProgram, start: Array | None, options: dict[str, Any]
) -> tuple[Outcome, float]:
    """Return how one run of HiGHS ended, and the objective that it claims."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(program.cost), len(program.rows)
    lp.sense_ = highspy.ObjSense.kMaximize if program.maximize else highspy.ObjSense.kMinimize
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.cost, program.low, program.high
    if program.integer:
        lp.integrality_ = [highspy.HighsVarType.kInteger] * len(program.cost)
    lp.row_lower_ = np.array([row.lower for row in program.rows])
    lp.row_upper_ = np.array([row.upper for row in program.rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0] + [len(row.columns) for row in program.rows])
    lp.a_matrix_.index_ = np.concatenate([row.columns for row in program.rows])
    lp.a_matrix_.value_ = np.concatenate([row.coefficients for row in program.rows])
    highs = QuietHighs(**options)
    highs.passModel(lp)
    if start is not None:
        known = highspy.HighsSolution()
        known.col_value = list(start)
        highs.setSolution(known)
    highs.run()
    # Out of time before any solution, HiGHS gives zeros.
    found = highs.getInfo().primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = np.asarray(highs.getSolution().col_value if found else (), np.float64)
    status = highs.modelStatusToString(highs.getModelStatus())
    info = highs.getInfo()
    return Outcome(status, values, info.mip_dual_bound), info.objective_function_value
