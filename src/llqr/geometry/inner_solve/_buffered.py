"""The inner solve of any structure, with everything kept between its steps that can be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._vectors import quadratic_value
from ..structures import States
from ._objective import Objective
from ._solvers import InnerSolver, SolverOptions

__all__ = ["solve_in_buffers"]


def solve_in_buffers(
    objective: Objective, states: States, solver: InnerSolver, options: SolverOptions
) -> tuple[States, Tensor]:
    """Do what :func:`solve_literally` does, for solvers with ``heavy_ball``.

    The same steps, in other coordinates if those are cheaper (see
    :class:`llqr.geometry.structures.InnerStep` and the structures' own).

    Args:
        objective: J; its product returns a new vector.
        states: where the solve starts; not changed.
        solver: the method.
        options: how to solve.

    Returns:
        The new states and J at the old ones.
    """
    blocks, g, damping = objective.blocks, objective.gradient, objective.damping
    u, first = torch.empty_like(g), None
    momentum = solver.momentum_of(options)
    parts = list(zip(blocks.parts, states, strict=True))
    steps = [(p.group, p.inner_step(state, p.group.read_from(g))) for p, state in parts]
    for _ in range(options.steps):
        if first is not None and objective.is_spent():
            break
        # u = -U g, written part by part into one vector.
        for group, step in steps:
            step.write_control(group.view_of(u))
        u.neg_()
        # u -> C u + damping u
        image = objective.product(u)
        if damping:
            image.add_(u, alpha=damping)
        if first is None:
            first = quadratic_value(u, g, image, blocks.space.dot)
        r = image.add_(g).neg_()  # u = -U g: the pullback is that of -r
        for group, step in steps:
            step.take_step(group.read_from(r), options.lr, momentum, options.clip)
    assert first is not None
    return [step.final_state() for _, step in steps], first
