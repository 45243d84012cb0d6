"""One refresh of LLQR: renew bases, solve, project, average, judge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..structures import BlockDiagonal, Bounds, States
from ._flat_model import FlatModel
from ._objective import Objective
from ._solve import solve_inner_problem
from ._solvers import InnerSolver, SolverOptions

__all__ = ["Constraint", "Learner", "Outcome"]

Constraint = Literal["positive", "square", "none"]
NAN = float("nan")


@dataclass(frozen=True)
class Outcome:
    """What a refresh came to.

    Attributes:
        states: the new states, or None if they are refused.
        J_before: J at the old U.
        J_after: J at the new U.
        reason: why it is refused, else None.
    """

    states: States | None
    J_before: float
    J_after: float
    reason: str | None


@dataclass(frozen=True)
class Learner:
    """How U is learned from one quadratic model (algorithm 2 of the paper).

    Attributes:
        solver: the method of the inner solve.
        options: its numbers, at this step.
        damping: lambda, added to C.
        tolerance: relative error allowed in g + C u when a product is answered from earlier ones.
        constraint: how U is kept positive definite.
        bounds: the eigenvalues of U under "positive".
        ema: beta, at this step.
    """

    solver: InnerSolver
    options: SolverOptions
    damping: float
    tolerance: float
    constraint: Constraint
    bounds: Bounds
    ema: float

    def learn(
        self, flat: FlatModel, blocks: BlockDiagonal, old: States, *, first: bool, renew: bool
    ) -> Outcome:
        """Solve from the current states, average with them, and judge J at the result.

        Args:
            flat: the quadratic model.
            blocks: the structure of U.
            old: the current states; not changed.
            first: whether no refresh was accepted before.
            renew: whether bases that follow the gradient are renewed now.
        """
        g, agree_on = flat.gradient, blocks.space.agree_on
        if not agree_on(bool(torch.isfinite(g).all())):
            return Outcome(None, NAN, NAN, "the gradient is not finite")
        objective = Objective(blocks, g, flat.product, self.damping)
        # Bases that follow the gradient rotate first; U itself stays as near as they allow.
        start = old
        if blocks.renews_bases:
            start = blocks.renew_bases(old, g, first, renew)
        solved, value = solve_inner_problem(
            objective, old, start, self.solver, self.options, self.tolerance
        )
        before = float(value)  # J at the old U, from the first product of the solve
        finite = all(bool(torch.isfinite(v).all()) for entries in solved for v in entries.values())
        if not agree_on(finite):
            return Outcome(None, before, NAN, "the inner solve left entries that are not finite")
        # J is judged on what would be stored: after the average and the projection.
        new = self._constrain_and_average(blocks, start, solved)
        after, rounding = (float(v) for v in objective.value_and_rounding(new))
        if not (math.isfinite(before) and math.isfinite(after)):
            return Outcome(None, before, after, "J is not finite")
        # The authors' arithmetic ("none") takes any finite J.
        if self.constraint != "none" and after > before + rounding:
            return Outcome(None, before, after, "J did not go down")
        return Outcome(new, before, after, None)

    def _constrain_and_average(
        self, blocks: BlockDiagonal, start: States, solved: States
    ) -> States:
        """Return beta U + (1 - beta) U_T, projected before and after (equation 9's U > 0)."""
        # The T inner steps are unconstrained; U leaves the bounds there and comes back here.
        if self.constraint != "positive":
            return blocks.floor_entries(blocks.average(start, solved, self.ema))
        solved = blocks.project(solved, self.bounds)
        # An average of factors may leave the bounds of the operator: project again.
        return blocks.project(blocks.average(start, solved, self.ema), self.bounds)
