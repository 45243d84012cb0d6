"""The inner solve: a few steps of a first-order method on the state of U.

With the control u = -U g, minimise J(U) = g'u + u'Cu / 2 + damping |u|^2 / 2 (paper, equation 9).
The solver sees flat vectors and states; it knows no module, rank or parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._blocks import BlockDiagonal, States

__all__ = ["Objective", "SOLVERS", "SolverOptions", "solve"]


@dataclass(frozen=True)
class SolverOptions:
    """How the inner problem is solved (see :class:`llqr.LLQR`)."""

    solver: str
    steps: int
    lr: float
    momentum: float
    clip: float | None


class Objective:
    """J as a function of the state of U, for one gradient and one curvature."""

    def __init__(
        self,
        blocks: BlockDiagonal,
        gradient: Tensor,
        product: Callable[[Tensor], Tensor],
        damping: float,
    ) -> None:
        self.blocks, self.gradient, self.product, self.damping = blocks, gradient, product, damping

    def value(self, states: States) -> Tensor:
        """Return J(U), a device scalar."""
        return self.value_and_rounding(states)[0]

    def value_and_rounding(self, states: States) -> tuple[Tensor, Tensor]:
        """Return J(U) and the rounding error to expect in it."""
        u, cu = self.control(states)
        dot = self.blocks.layout.dot
        # The terms of J cancel near its minimum; what rounding leaves is of the size of the terms.
        size = (dot(u, u) * (dot(self.gradient, self.gradient) + dot(cu, cu))).sqrt()
        return dot(u, self.gradient + 0.5 * cu), self.blocks.layout.rounding * size

    def value_and_gradient(self, states: States) -> tuple[Tensor, States]:
        """Return J(U) and dJ/dstate, the pullback of u -> r = g + C u + damping u."""
        u, cu = self.control(states)
        r = self.gradient + cu
        value = self.blocks.layout.dot(u, self.gradient + 0.5 * cu)
        return value, self.blocks.pullback(states, self.gradient, -r)

    def control(self, states: States) -> tuple[Tensor, Tensor]:
        """Return u = -U g and (C + damping) u."""
        u = -self.blocks.apply(states, self.gradient)
        return u, self.product(u) + self.damping * u


Factory = Callable[[list[Tensor], SolverOptions], torch.optim.Optimizer]
SOLVERS: dict[str, Factory] = {
    "momentum": lambda s, o: torch.optim.SGD(s, lr=o.lr, momentum=o.momentum),
    "sgd": lambda s, o: torch.optim.SGD(s, lr=o.lr),
    "adam": lambda s, o: torch.optim.Adam(s, lr=o.lr),
    # One call makes at most `steps` evaluations; lr plays no part in a line search.
    "lbfgs": lambda s, o: torch.optim.LBFGS(
        s, max_iter=o.steps, max_eval=o.steps, history_size=10, line_search_fn="strong_wolfe"
    ),
}


def solve(objective: Objective, states: States, options: SolverOptions) -> tuple[States, Tensor]:
    """Run the inner steps from ``states``; return the new states and J at the old ones.

    The momentum starts at zero, and each leaf's gradient is clipped to norm ``clip``.
    """
    blocks = objective.blocks
    states = [{k: v.clone() for k, v in s.items()} for s in states]
    names = [(s, k) for s, part in zip(states, blocks.parts, strict=True) for k in part.trainable]
    values: list[Tensor] = []

    def closure() -> Tensor:
        value, gradient = objective.value_and_gradient(states)
        clip_(blocks, gradient, options.clip)
        entries = [
            g[k] for g, part in zip(gradient, blocks.parts, strict=True) for k in part.trainable
        ]
        for (state, key), entry in zip(names, entries, strict=True):
            state[key].grad = entry
        values.append(value)
        return value

    if set(blocks.layout.structures.values()) == {"identity"}:
        return states, objective.value(states)
    # A process may hold no block; the others need it for the products.
    free = [s[k] for s, k in names] or [torch.empty(0)]
    optimizer = SOLVERS[options.solver](free, options)
    for _ in range(1 if options.solver == "lbfgs" else options.steps):
        optimizer.step(closure)  # type: ignore[arg-type]  # LBFGS takes a tensor
    for state, key in names:
        state[key].grad = None
    return states, values[0]


def clip_(blocks: BlockDiagonal, gradient: States, clip: float | None) -> None:
    """Scale each leaf to norm at most ``clip``, in place: g c / max(c, |g|)."""
    if clip is None:
        return
    factors = [clip / norm.clamp(min=clip) for norm in blocks.leaf_norms(gradient)]
    if factors:
        torch._foreach_mul_(blocks.leaves(gradient), factors)
