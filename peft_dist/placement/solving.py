"""Solves programs with HiGHS. scipy is imported by the first call, in the process that solves."""

from __future__ import annotations

from peft_dist.placement.program import Program

# What scipy.optimize.milp says: 0 proved optimal, 1 out of time, 4 (which is for all that it does not know of HiGHS)
# out of nodes, both with or without a solution; the others have none.
OPTIMAL, OUT_OF_TIME, OUT_OF_NODES = 0, 1, 4


def solve(
    program: Program, time_limit: float | None, gap: float, max_nodes: int | None = None
) -> tuple[list[float] | None, str]:
    """Values of the program's columns, or None, and how the solver ended.

    Args:
        program: What to solve.
        time_limit: Seconds, above 0; None for no limit.
        gap: Relative distance from the proved bound at which to stop.
        max_nodes: Of branch and bound; None for no limit. With it alone the answer is the same on every machine.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    rows, columns, values = zip(*program.entries, strict=True)
    matrix = csr_array((values, (rows, columns)), shape=(len(program.row_lower), len(program.cost)))
    limits = {"time_limit": time_limit, "node_limit": max_nodes}
    result = milp(
        program.cost,
        integrality=program.integral,
        bounds=Bounds(program.lower, program.upper),
        constraints=LinearConstraint(matrix, program.row_lower, program.row_upper),
        options={"mip_rel_gap": gap, "presolve": True, **{k: v for k, v in limits.items() if v is not None}},
    )
    limited = OUT_OF_TIME if max_nodes is None else OUT_OF_NODES
    if result.x is None or result.status not in (OPTIMAL, limited):
        return None, f"no solution (status {result.status}): {result.message}"
    what = "time" if max_nodes is None else "nodes"
    ended = "optimal" if result.status == OPTIMAL else f"out of {what} with a solution"
    return [float(value) for value in result.x], f"{ended}, gap {result.mip_gap or 0.0:.4f}"
