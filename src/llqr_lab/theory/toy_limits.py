"""What the toy of Figures 2 and 3 cannot show: checks beside the figures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .findings import LIMITS, Finding
from .sharp_well import SharpWell
from .swarm import first_arrivals, train_paths
from .toys import ETA, OFFSETS, RHO, at_angles

__all__ = ["check_toys"]

F64 = torch.float64


def check_toys() -> list[Finding]:
    """Check that the metric is nearly a number, and that leaving the well is not arriving."""
    well = SharpWell()
    return [check_criterion(well), check_isotropy(well), shadow_trap(well)]


def check_criterion(well: SharpWell) -> Finding:
    """Hold the well's inner side against the envelope (17) and the amplitude (16)."""
    U = well.average_inverse()
    across = well.bottom - well.barrier
    bottom = torch.tensor([[well.bottom, 0.0]], dtype=F64)
    curvature = float(well.hessian(bottom)[0, 0, 0])
    starts = at_angles(well.bottom + OFFSETS * well.w, torch.zeros(1, dtype=F64))
    measured, agree = {"from the bottom to the barrier": across}, True
    for method, u in (("SAM", 1.0), ("LLQR+SAM", float(torch.linalg.eigvalsh(U)[0]))):
        reach = RHO * u**0.5
        contraction = ETA * curvature * u
        hovers = reach * contraction / (2 - contraction)
        paths = train_paths(well, method, starts, U, ETA, RHO, range(100))
        agree &= reach < across < hovers and bool((first_arrivals(paths) >= 0).all())
        measured |= {f"envelope of {method}": reach, f"amplitude of {method}": hovers}
    return Finding(
        "Figures 2, 3, (6)",
        "the SAM variants escape by their hovering scale",
        LIMITS,
        agree,
        measured,
        "Not by the envelope: it is smaller than the well, and by (6) neither would escape. The "
        "amplitudes (16) are larger, since eta times curvature is above 1 (at the bottom, with U's "
        "smaller eigenvalue).",
    )


def check_isotropy(well: SharpWell) -> Finding:
    """Give SAM the step and radius that the mean of U stands for."""
    U = well.average_inverse()
    c = float(U.trace()) / 2
    angles = (torch.arange(0, 24, 3, dtype=F64) + 0.5) * (2 * math.pi / 24)
    starts = at_angles(well.bottom + OFFSETS * well.w, angles)

    def paths(method: str, metric: Tensor, eta: float, rho: float) -> Tensor:
        return train_paths(well, method, starts, metric, eta, rho, range(40))

    number = c * torch.eye(2, dtype=F64)
    exact = paths("LLQR+SAM", number, ETA, RHO)
    retuned = paths("SAM", U, c * ETA, c**0.5 * RHO)
    gap = float((exact - retuned).abs()[:, :10].max())
    ours = first_arrivals(paths("LLQR+SAM", U, ETA, RHO)).double().mean()
    theirs = first_arrivals(retuned).double().mean()
    return Finding(
        "Figures 2, 3",
        "LLQR+SAM leaves faster than SAM at the same settings",
        LIMITS,
        gap < 1e-9 and abs(float(theirs / ours) - 1) < 0.1,
        {
            "smaller eigenvalue of U": float(torch.linalg.eigvalsh(U)[0]),
            "larger eigenvalue of U": float(torch.linalg.eigvalsh(U)[1]),
            "largest gap of U = c I and SAM with c eta, sqrt(c) rho, 10 steps": gap,
            "mean steps of LLQR+SAM": float(ours),
            "mean steps of SAM so retuned": float(theirs),
        },
        "It does, but U is nearly a number here: LLQR+SAM is nearly SAM with another step and "
        "radius, and SAM given those arrives as fast.",
    )


def shadow_trap(well: SharpWell) -> Finding:
    """Take a radius wider than the well's inner side: SAM stops with its probe on the bottom."""
    start, rho = torch.tensor([[4.7, 0.0]], dtype=F64), 0.25
    path = train_paths(well, "SAM", start, torch.eye(2, dtype=F64), 0.05, rho, range(300))
    r = float(path[0, -1].norm())
    return Finding(
        "Figures 2, 3",
        "the SAM variants leave the sharp well",
        LIMITS,
        abs(r - (well.bottom - rho)) < 1e-6 and r < well.barrier,
        {
            "eta": 0.05,
            "rho": rho,
            "r at the end": r,
            "bottom minus rho": well.bottom - rho,
            "barrier": well.barrier,
        },
        "Leaving is not arriving: the iterate can rest exactly rho inside the bottom, beyond the "
        "barrier, held by its probe. Here 'escaped' means r < 1.",
    )
