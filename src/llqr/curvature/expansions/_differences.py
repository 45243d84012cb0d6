"""Central differences: the way that needs no second derivative, and the check of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._moved_parameters import parameters_moved
from .._random import random_normal

__all__ = ["central_difference", "differ_too_much", "parameters_moved", "random_direction"]


def central_difference(
    function: Callable[[], list[Tensor]], parameters: Sequence[Tensor], d: Sequence[Tensor]
) -> list[Tensor]:
    """Return (f(p + e d) - f(p - e d)) / 2e; the parameters come back bit for bit."""
    length = torch.stack([v.norm() for v in d]).norm()
    size = torch.stack([p.detach().norm() for p in parameters]).norm()
    eps = max(torch.finfo(p.dtype).eps for p in parameters)
    # Rounding costs eps / e and the third derivative e^2: least in sum at the cube root of eps.
    e = float(eps ** (1 / 3) * size.clamp(min=eps) / length.clamp(min=torch.finfo(d[0].dtype).tiny))
    with torch.no_grad():
        ends = []
        for step in (e, -e):
            with parameters_moved(parameters, d, step):
                ends.append([z.detach().clone() for z in function()])
    return [(a - b) / (2 * e) for a, b in zip(*ends, strict=True)]


def random_direction(parameters: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return a direction of random entries, as large as each parameter's entries are."""
    direction = []
    for p in parameters:
        draw = random_normal(p.shape, p.dtype, seed).to(p.device)
        direction.append(draw * p.detach().square().mean().sqrt().clamp(min=1e-3))
    return direction


def differ_too_much(found: Sequence[Tensor | None], sure: Sequence[Tensor]) -> bool:
    """Tell whether derivatives (None is zero) are further from ``sure`` than differences err."""
    error = torch.stack(
        [(b if a is None else a - b).norm() for a, b in zip(found, sure, strict=True)]
    ).norm()
    return float(error) > 0.05 * float(torch.stack([b.norm() for b in sure]).norm())
