"""Linear and integer programs, solved by HiGHS: silent, on one thread, with one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

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
    """Solve ``program`` with HiGHS' ``options``, from a feasible ``start`` [N] where one is known."""
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
    return Outcome(
        highs.modelStatusToString(highs.getModelStatus()),
        values,
        float(highs.getInfo().mip_dual_bound),
    )
