r"""The inner problem in units of its own, and the inner learning rate that these give.

J of equation (9) is not free of scale: a loss times c has the minimiser U / c, and the gradient of
J in the state is c^2 times as long. So ``lr="auto"`` learns from

.. math:: \hat J(U) = \hat g^\top u + \tfrac12 u^\top \hat C u, \qquad u = -U \hat g,
    \quad \hat g = g / |g|, \quad \hat C = (C + \lambda I) / \kappa,
    \quad \kappa = \hat u^\top (C + \lambda I) \hat u / (\hat g^\top \hat u)^2

with u-hat = -U g-hat at the present U. Of all multiples of that U the best one then has
g-hat'U g-hat = 1, as the identity has: U learns the directions, and the step length stays the base
optimizer's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._devices import widen
from ..._vectors import dots
from ..structures import States
from ._objective import Objective
from ._recycled_product import RecycledProduct
from ._solvers import InnerSolver, SolverOptions

__all__ = ["OwnUnits", "in_own_units", "inner_rates"]

#: The inner steps go as far as this many steps of steepest descent with exact line search would.

REACH = 2.0
#: What is tried in turn until J goes down.
FRACTIONS = (1.0, 1 / 4, 1 / 16)
#: Of solvers whose steps do not grow with the gradient, in a problem that is free of scale.
PLAIN_RATE = 1e-2


@dataclass(frozen=True)
class OwnUnits:
    """J in its own units.

    Attributes:
        objective: J-hat; all solves share its products.
        unit: what J-hat is to be multiplied by, |g|^2 / kappa: twice what the best step along
            -U g takes off the loss, in the model.
        length: |g|, by which the gradient was divided.
    """

    objective: Objective
    unit: float
    length: float


def in_own_units(
    objective: Objective, states: States, tolerance: float, capacity: int
) -> OwnUnits | None:
    """Return J in its own units at the present U; None if there is no curvature along U g.

    Args:
        objective: J, whose gradient is not zero. It is divided by its length where it lies, for
            which there is one copy of it; multiplied by it again if None is returned.
        states: the present U.
        tolerance: of recycled products; 0: all are computed.
        capacity: how many directions are kept; a solve ends where it would need more.
    """
    blocks, dot = objective.blocks, objective.blocks.space.dot
    length = float(dot(objective.gradient, objective.gradient).sqrt())
    # |g|^2 and u'Cu may leave float32 where g-hat does not.
    g = objective.gradient.div_(length)
    u = -blocks.apply(states, g)
    image = objective.damped_product(u)
    along = float(dot(g, u))
    # The sign of the curvature is not its size: Newton's may be negative.
    kappa = abs(float(dot(u, image))) / along**2 if along else math.nan
    if not 0 < kappa < torch.finfo(torch.float32).max:
        g.mul_(length)
        return None

    def scaled_product(d: Tensor) -> Tensor:
        return objective.damped_product(d).div_(kappa)

    unit = length**2 / kappa
    if not tolerance:
        return OwnUnits(Objective(blocks, g, scaled_product, 0.0), unit, length)
    product = RecycledProduct(scaled_product, g, tolerance, capacity, dot)
    product.remember(u, image.div_(kappa))  # every solve begins with it
    return OwnUnits(Objective(blocks, g, product, 0.0, lambda: product.full), unit, length)


def inner_rates(
    objective: Objective, states: States, solver: InnerSolver, options: SolverOptions
) -> list[float]:
    r"""Return the inner learning rates to try, the largest first; none if J is flat.

    Along the gradient G of J in the state, J goes to
    :math:`J - \eta |G|^2 + \tfrac12 \eta^2 v^\top C v` with v what u changes by along -G, so that
    the best step is :math:`\eta = |G|^2 / |v^\top C v|`. T steps with momentum mu at rate lr go as
    far as lr T / (1 - mu).

    Args:
        objective: J.
        states: where the solve starts.
        solver: the method.
        options: how to solve.
    """
    if not solver.heavy_ball:
        return [PLAIN_RATE * fraction for fraction in FRACTIONS]
    blocks = objective.blocks
    u, image = objective.control_and_image(states)
    slope = blocks.pullback(states, objective.gradient, -(objective.gradient + image))
    square = _square_norm(objective, slope)
    if not 0 < square < math.inf:
        return []
    # Short enough that U, which may be quadratic in its state, is linear along it.
    short = 1e-4 * math.sqrt(_square_norm(objective, states) / square)
    moved = [
        {k: v - short * change[k] if k in change else v for k, v in state.items()}
        for state, change in zip(states, slope, strict=True)
    ]
    del slope
    v = blocks.apply(moved, objective.gradient).add_(u).div_(-short)
    del u, image, moved
    bend = abs(float(blocks.space.dot(v, objective.damped_product(v))))
    if not 0 < bend < math.inf:
        return []
    momentum = solver.momentum_of(options)
    rate = REACH * (square / bend) * (1 - momentum) / options.steps
    return [rate * fraction for fraction in FRACTIONS]


def _square_norm(objective: Objective, states: States) -> float:
    """Return the sum of the squares of all entries, over all shards."""
    total = widen(objective.gradient.new_zeros(()))
    for entries in states:
        for value in entries.values():
            flat = value.reshape(-1)
            total += dots(flat, flat)
    return float(objective.blocks.space.sum_over_shards(total))
