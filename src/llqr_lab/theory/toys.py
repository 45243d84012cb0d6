"""The experiments of Figures 2 and 3, and the window of step and radius in which they come out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llqr_lab.common.output import progress_bar

from .sharp_well import SharpWell
from .swarm import METHODS, first_arrivals, train_paths

__all__ = ["DRAWN", "ETA", "RHO", "Toy", "Window", "escape_window", "gradient_noise", "many_starts"]

ETA = 0.132
RHO = 0.12
STEPS = 400
DRAWN = 120  # steps that the pictures show at most
ANGLE = 35.0  # degrees, of Figure 3's start
OFFSETS = torch.linspace(-0.25, 0.35, 7, dtype=torch.float64)  # from the bottom, in widths


@dataclass(frozen=True)
class Toy:
    """Paths of all methods over the same starts.

    Attributes:
        well: the landscape.
        U: (2, 2), the inverse of its average Hessian.
        paths: method -> (starts, steps + 1, 2); shorter where all arrived before the last step.
        about: the constants, in words that fit a caption.
    """

    well: SharpWell
    U: Tensor
    paths: dict[str, Tensor]
    about: dict[str, Any]

    def losses(self, method: str) -> Tensor:
        """Return the loss of every path at every step (starts, steps + 1)."""
        return self.well.loss(self.paths[method])

    def arrivals(self, method: str) -> Tensor:
        """Return the first step inside r < 1, -1 for never (starts,)."""
        return first_arrivals(self.paths[method])

    def lengths(self, method: str) -> Tensor:
        """Return the path length up to the arrival, or of the whole path (starts,)."""
        paths, when = self.paths[method], self.arrivals(method)
        strides = (paths[:, 1:] - paths[:, :-1]).norm(dim=-1)
        last = torch.where(when < 0, strides.shape[1], when)
        return (strides * (torch.arange(strides.shape[1]) < last[:, None])).sum(1)

    def summary(self, method: str) -> dict[str, Any]:
        """Return who arrived, when (mean and standard deviation of those), and who stayed."""
        when = self.arrivals(method)
        arrived = when[when >= 0].double()
        lengths = self.lengths(method)
        stayed = self.paths[method][:, -1].norm(dim=-1) > self.well.barrier
        return {
            "method": method,
            "arrived_percent": 100.0 * len(arrived) / len(when),
            "stayed_percent": 100.0 * float(stayed.double().mean()),
            "steps_mean": float(arrived.mean()) if len(arrived) else None,
            "steps_std": float(arrived.std(correction=0)) if len(arrived) else None,
            "path_mean": float(lengths.mean()),
            "path_std": float(lengths.std(correction=0)),
        }


def at_angles(radii: Tensor, angles: Tensor) -> Tensor:
    """Return the points (angles * radii, 2) on every ray at every radius."""
    rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return (rays[:, None] * radii[None, :, None]).reshape(-1, 2)


def train_all(well: SharpWell, starts: Tensor, noise: Tensor | None, about: dict[str, Any]) -> Toy:
    """Train every method from the same starts with the same step and radius."""
    U = well.average_inverse()
    paths = {}
    for method in METHODS:
        steps = progress_bar(range(STEPS), method)
        paths[method] = train_paths(well, method, starts, U, ETA, RHO, steps, noise, DRAWN)
    known = {"eta": ETA, "rho": RHO, "steps": STEPS, "well": vars(well), "U": U.tolist()}
    known |= {"bottom": well.bottom, "barrier": well.barrier}
    return Toy(well, U, paths, known | about)


def many_starts() -> Toy:
    """Figure 2: 24 angles times 7 radii in the sharp well, no noise."""
    well = SharpWell()
    angles = (torch.arange(24, dtype=torch.float64) + 0.5) * (2 * math.pi / 24)
    starts = at_angles(well.bottom + OFFSETS * well.w, angles)
    return train_all(well, starts, None, {"starts": len(starts)})


def gradient_noise(schedules: int = 50, variance: float = 1e-9, seed: int = 0) -> Toy:
    """Figure 3: all start at the bottom; each schedule of noise is shared by the methods."""
    well = SharpWell()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(schedules, STEPS, 2, generator=generator, dtype=torch.float64)
    bottom = torch.tensor([well.bottom], dtype=torch.float64)
    start = at_angles(bottom, torch.tensor([math.radians(ANGLE)], dtype=torch.float64))
    about = {"schedules": schedules, "variance": variance, "seed": seed, "angle": ANGLE}
    return train_all(well, start.repeat(schedules, 1), variance**0.5 * noise, about)


@dataclass(frozen=True)
class Window:
    """Which share of the starts arrives, for every step and radius.

    Attributes:
        etas: (m,).
        rhos: (n,).
        arrived: method -> (m, n), between 0 and 1; constant in rho for methods that do not probe.
    """

    etas: Tensor
    rhos: Tensor
    arrived: dict[str, Tensor]

    def verdicts(self) -> list[list[str]]:
        """Say for every (eta, rho) which of Figure 2's claims hold."""
        share = {method: values.tolist() for method, values in self.arrived.items()}
        return [
            [
                verdict_of({method: values[i][j] for method, values in share.items()})
                for j in range(len(self.rhos))
            ]
            for i in range(len(self.etas))
        ]


VERDICTS = (
    "every claim holds",
    "only LLQR+SAM escapes",
    "LLQR alone is not trapped",
    "LLQR+SAM does not always escape",
)


def verdict_of(share: dict[str, float]) -> str:
    """Return one of ``VERDICTS`` from the share of starts that arrive, method by method."""
    if share["GD"] > 0 or share["LLQR"] > 0:
        return VERDICTS[2]
    if share["LLQR+SAM"] < 1:
        return VERDICTS[3]
    return VERDICTS[0] if share["SAM"] == 1 else VERDICTS[1]


ETAS = (0.104, 0.111, 0.118, 0.125, 0.132, 0.141, 0.150, 0.155, 0.160)
RHOS = (0.03, 0.05, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24)


def escape_window(etas: tuple[float, ...], rhos: tuple[float, ...]) -> Window:
    """Try every step and radius from 7 radii in the well; arrive within 400 steps or not.

    Methods without U look alike from every angle, one ray is enough for them; those with U start
    on both axes of U.
    """
    well = SharpWell()
    U = well.average_inverse()
    axes = torch.linalg.eigh(U).eigenvectors
    rays = torch.atan2(axes[1], axes[0])
    arrived = {}
    for method, (through_u, probes) in METHODS.items():
        starts = at_angles(well.bottom + OFFSETS * well.w, rays if through_u else rays[:1])
        radii = rhos if probes else rhos[:1]
        grid = torch.cartesian_prod(*(torch.tensor(x, dtype=torch.float64) for x in (etas, radii)))
        eta, rho = grid.repeat_interleave(len(starts), 0).unbind(-1)
        inside = which_arrive(well, method, starts.repeat(len(grid), 1), U, eta, rho)
        share = inside.double().view(len(etas), len(radii), -1).mean(-1)
        arrived[method] = share.expand(-1, len(rhos))
    return Window(torch.tensor(etas), torch.tensor(rhos), arrived)


def which_arrive(
    well: SharpWell, method: str, starts: Tensor, U: Tensor, eta: Tensor, rho: Tensor
) -> Tensor:
    """Return which starts (n,) arrive; those that did are trained no further.

    Plain SGD has no memory, so the rest goes on in a smaller swarm exactly as before.
    """
    inside = torch.zeros(len(starts), dtype=torch.bool)
    where, left, chunk = starts, torch.arange(len(starts)), 20
    for _ in progress_bar(range(STEPS // chunk), method):
        paths = train_paths(well, method, where, U, eta[left], rho[left], range(chunk))
        there = first_arrivals(paths) >= 0
        inside[left[there]] = True
        where, left = paths[~there, -1], left[~there]
        if not len(left):
            break
    return inside
