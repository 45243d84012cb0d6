"""The inner solve as the paper runs it: the ground truth of the faster ways."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structures import BlockDiagonal, States
from ._objective import Objective
from ._solvers import InnerSolver, SolverOptions

__all__ = ["solve_literally"]


def solve_literally(
    objective: Objective, states: States, solver: InnerSolver, options: SolverOptions
) -> tuple[States, Tensor]:
    """Run the inner steps from ``states``; return the new states and J at the old ones.

    Algorithm 2 of the paper: T steps on dJ/dstate. The momentum starts at zero, and the gradient
    of each entry of each block (both factors of kfac) is clipped to norm ``clip``.
    """
    blocks = objective.blocks
    if not blocks.learns:
        return states, objective.value(states)
    # torch's optimizers change tensors in place; the caller's states stay.
    states = [{k: v.clone() for k, v in s.items()} for s in states]
    names = [(s, k) for s, part in zip(states, blocks.parts, strict=True) for k in part.trainable]
    values: list[Tensor] = []

    def closure() -> Tensor:
        # Algorithm 2, line 9: dJ/dstate at the present state.
        value, gradient = objective.value_and_gradient(states)
        _clip_blocks_(blocks, gradient, options.clip)
        entries = [
            g[k] for g, part in zip(gradient, blocks.parts, strict=True) for k in part.trainable
        ]
        for (state, key), entry in zip(names, entries, strict=True):
            state[key].grad = entry
        values.append(value)
        return value

    # A process may hold no block; the others need it for the products.
    free = [s[k] for s, k in names] or [torch.empty(0, device="cpu")]
    optimizer = solver.make(free, options)
    for _ in range(1 if solver.evaluates_within_step else options.steps):
        optimizer.step(closure)  # type: ignore[arg-type]  # LBFGS takes a tensor
    for state, key in names:
        state[key].grad = None
    return states, values[0]


def _clip_blocks_(blocks: BlockDiagonal, gradient: States, clip: float | None) -> None:
    """Scale the gradient of each entry of each block to norm at most c: g c / max(c, |g|)."""
    if clip is None:
        return
    factors = [clip / norm.clamp(min=clip) for norm in blocks.norms_by_block(gradient)]
    if factors:
        torch._foreach_mul_(blocks.split_by_block(gradient), factors)
