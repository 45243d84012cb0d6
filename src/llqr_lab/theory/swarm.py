"""Many starts at once, each trained by llqr.Optimizer as if it were alone.

Every start is a layer of its own. ``SAM(norm="layer-metric")`` takes the norm of each layer and
divides by the root of the number of layers, so rho times that root is Algorithm 1 on every start;
losses are summed, so gradients do not mix. A test compares it with one optimizer a start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import llqr

from .sharp_well import SharpWell

__all__ = ["INSIDE", "METHODS", "first_arrivals", "train_paths"]

INSIDE = 1.0  # arrived in the basin: r < 1. Distance from the well would not do: shadow traps.

# name: (goes through U, probes)
METHODS = {
    "GD": (False, False),
    "LLQR": (True, False),
    "SAM": (False, True),
    "LLQR+SAM": (True, True),
}


class Point(nn.Module):
    """One start."""

    def __init__(self, xy: Tensor) -> None:
        """Keep a copy of the point (2,)."""
        super().__init__()
        self.xy = nn.Parameter(xy.clone())


class Swarm(nn.Module):
    """All starts, each in a layer of its own."""

    def __init__(self, starts: Tensor) -> None:
        """Make a layer for each row of starts (n, 2)."""
        super().__init__()
        self.points = nn.ModuleList(Point(xy) for xy in starts)

    def forward(self) -> Tensor:
        """Return the points (n, 2)."""
        return torch.stack([point.xy for point in self.points])


def make_optimizer(
    swarm: Swarm, method: str, U: Tensor, eta: Tensor, rho: Tensor
) -> llqr.Optimizer:
    """Return the optimizer of a swarm; eta and rho (n,) are those of each start."""
    through_u, probes = METHODS[method]
    root = math.sqrt(len(swarm.points))
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for point, key in zip(swarm.points, zip(eta.tolist(), rho.tolist(), strict=True), strict=True):
        groups.setdefault(key, []).append(point.xy)
    base = torch.optim.SGD(
        [{"params": p, "lr": lr, "rho": radius * root} for (lr, radius), p in groups.items()]
    )
    geometry = llqr.FixedGeometry(dict.fromkeys(dict(swarm.named_parameters()), U))
    return llqr.Optimizer(
        base,
        swarm,
        geometry=geometry if through_u else None,
        perturbation=llqr.SAM(norm="layer-metric") if probes else None,
    )


def train_paths(
    well: SharpWell,
    method: str,
    starts: Tensor,
    U: Tensor,
    eta: Tensor | float,
    rho: Tensor | float,
    steps: Iterable[int],
    noise: Tensor | None = None,
    enough: int | None = None,
) -> Tensor:
    """Train every start and return the paths (n, steps + 1, 2).

    Args:
        well: the landscape.
        method: a name in ``METHODS``.
        starts: (n, 2), float64.
        U: (2, 2), the inverse metric.
        eta: learning rate; a number, or one a start (n,).
        rho: radius; a number, or one a start (n,).
        steps: as many steps as it yields.
        noise: (n, steps, 2), added to the gradient of the second pass, before U.
        enough: stop after so many steps if every start has been in the basin by then.
    """
    swarm = Swarm(starts)
    full = [torch.as_tensor(x, dtype=starts.dtype).expand(len(starts)) for x in (eta, rho)]
    optimizer = make_optimizer(swarm, method, U, *full)
    path, arrived = [starts.clone()], torch.zeros(len(starts), dtype=torch.bool)
    for step in steps:
        if enough is not None and step >= enough and arrived.all():
            break

        def add_noise(step: int = step) -> None:
            if noise is not None:
                gradients = [point.xy.grad for point in swarm.points]
                torch._foreach_add_(gradients, list(noise[:, step]))

        optimizer.minimize(lambda: well.loss(swarm()).sum(), before_step=add_noise)
        path.append(swarm().detach())
        arrived |= path[-1].norm(dim=-1) < INSIDE
    return torch.stack(path, dim=1)


def first_arrivals(paths: Tensor) -> Tensor:
    """Return the first step at which each path (n, steps, 2) is in the basin; -1 for never."""
    inside = paths.norm(dim=-1) < INSIDE
    return torch.where(inside.any(1), inside.int().argmax(1), -1)
