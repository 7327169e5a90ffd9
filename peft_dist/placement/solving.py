"""Solves programs with HiGHS. scipy is imported by the first call, in the process that solves."""

from __future__ import annotations

from peft_dist.placement.program import Program

# What scipy.optimize.milp says: 0 proved optimal, 1 out of time (with or without a solution), the others have none.
OPTIMAL, OUT_OF_TIME = 0, 1


def solve(program: Program, time_limit: float, gap: float) -> tuple[list[float] | None, str]:
    """Values of the program's columns, or None, and how the solver ended.

    Args:
        program: What to solve.
        time_limit: Seconds, above 0.
        gap: Relative distance from the proved bound at which to stop.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    rows, columns, values = zip(*program.entries, strict=True)
    matrix = csr_array((values, (rows, columns)), shape=(len(program.row_lower), len(program.cost)))
    result = milp(
        program.cost,
        integrality=program.integral,
        bounds=Bounds(program.lower, program.upper),
        constraints=LinearConstraint(matrix, program.row_lower, program.row_upper),
        options={"time_limit": time_limit, "mip_rel_gap": gap, "presolve": True},
    )
    if result.x is None or result.status not in (OPTIMAL, OUT_OF_TIME):
        return None, f"no solution (status {result.status}): {result.message}"
    ended = "optimal" if result.status == OPTIMAL else "out of time with a solution"
    return [float(value) for value in result.x], f"{ended}, gap {result.mip_gap or 0.0:.4f}"
