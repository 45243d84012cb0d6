"""One refresh of LLQR: renew bases, solve, project, average, judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from ..structures import BlockDiagonal, Bounds, States
from ._flat_model import FlatModel
from ._objective import Objective
from ._own_units import in_own_units, inner_rates
from ._recycled_product import RecycledProduct
from ._solve import basis_capacity, solve_inner_problem
from ._solvers import InnerSolver, SolverOptions

__all__ = ["Constraint", "Learner", "Outcome"]

Constraint = Literal["positive", "square", "none"]
NAN = float("nan")
#: J that is no number of float32, the dtype of most models, is not credible.
LARGEST = torch.finfo(torch.float32).max
UNDECOMPOSED = "an eigenvalue or singular value decomposition failed, also in float64"


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
        own_units: whether J is learned from in units of its own, with the inner learning rate that
            they give in place of ``options.lr``.
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
    own_units: bool = False

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
        start: States | None = old
        if blocks.renews_bases:
            start = self._decompose(blocks, lambda: blocks.renew_bases(old, g, first, renew))
        if start is None:
            return Outcome(None, NAN, NAN, UNDECOMPOSED)
        if not self.own_units:
            return self._solve(objective, old, start, self.options)
        return self._solve_in_own_units(objective, old, start)

    def _solve_in_own_units(self, objective: Objective, old: States, start: States) -> Outcome:
        """Solve at the rate that J itself gives, and at smaller ones until J goes down."""
        capacity = basis_capacity(objective.blocks.layout, self.options.steps, own_units=True)
        dot, g = objective.blocks.space.dot, objective.gradient
        if float(dot(g, g)) == 0:
            return Outcome(start, 0.0, 0.0, None)  # a minimum: nothing to learn, nothing wrong
        scaled = in_own_units(objective, old, self.tolerance, capacity)
        if scaled is None:
            return Outcome(None, NAN, NAN, "the curvature along U g is zero or not finite")
        rates = inner_rates(scaled.objective, start, self.solver, self.options)
        if not rates:  # J is flat in U, as of the identity, or not finite
            value = float(scaled.objective.value(start))
            flat = abs(value) < LARGEST
            outcome = Outcome(
                start if flat else None, value, value, None if flat else "J is not finite"
            )
        for lr in rates:
            outcome = self._solve(scaled.objective, old, start, replace(self.options, lr=lr))
            if outcome.states is not None:
                break
        g.mul_(scaled.length)
        before, after = outcome.J_before * scaled.unit, outcome.J_after * scaled.unit
        return replace(outcome, J_before=before, J_after=after)

    def _solve(
        self, objective: Objective, old: States, start: States, options: SolverOptions
    ) -> Outcome:
        """Solve from ``start``, average with it, and judge J at the result."""
        blocks = objective.blocks
        agree_on = blocks.space.agree_on
        solved, value = solve_inner_problem(
            objective, old, start, self.solver, options, self.tolerance
        )
        if isinstance(objective.product, RecycledProduct):
            # Their memory is the new U's and its image's. With U g begins every solve.
            objective.product.keep_first(1)
        before = float(value)  # J at the old U, from the first product of the solve
        finite = all(bool(torch.isfinite(v).all()) for entries in solved for v in entries.values())
        if not agree_on(finite):
            return Outcome(None, before, NAN, "the inner solve left entries that are not finite")
        # J is judged on what would be stored: after the average and the projection.
        new = self._decompose(blocks, partial(self._constrain_and_average, blocks, start, solved))
        del solved  # not beside the product that follows
        if new is None:
            return Outcome(None, before, NAN, UNDECOMPOSED)
        after, rounding = (float(v) for v in objective.value_and_rounding(new))
        if not (abs(before) < LARGEST and abs(after) < LARGEST):  # also if one is not a number
            return Outcome(None, before, after, "J is not finite")
        # The authors' arithmetic ("none") takes any finite J.
        if self.constraint != "none":
            if after > before + rounding:
                return Outcome(None, before, after, "J did not go down")
            if 0 < max(abs(before), abs(after)) < rounding:
                return Outcome(None, before, after, "J is below its rounding")
        return Outcome(new, before, after, None)

    def _decompose(self, blocks: BlockDiagonal, change: Callable[[], States]) -> States | None:
        """Return what a change of the states comes to, or None if a decomposition in it failed."""
        states: States | None = None
        try:
            states = change()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not a word of the stubs
            pass
        return states if blocks.space.agree_on(states is not None) else None

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
