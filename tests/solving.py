"""How the tests of the inner solve name a method and its numbers."""

from __future__ import annotations

from llqr.geometry.inner_solve import InnerSolver, SolverOptions, find_solver

Method = tuple[InnerSolver, SolverOptions]


def method(
    solver: str, steps: int, lr: float, momentum: float = 0.9, clip: float | None = None
) -> Method:
    return find_solver(solver), SolverOptions(steps, lr, momentum, clip)
