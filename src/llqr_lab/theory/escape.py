"""The escape criterion (6), (18): what it says, and when the quadratic map does exit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .findings import LIMITS, Finding

__all__ = ["check_escape", "exit_time"]

Array = NDArray[np.float64]


def exit_time(contraction: Array, reach: Array, starts: Array, steps: int) -> Array:
    """Return the first step with |z| > R = 1 from any of the starts; -1 for none.

    Args:
        contraction: eta mu, (n,).
        reach: the envelope over R, (n,); the kick b is contraction times it.
        starts: inside the well, (m,).
        steps: iterations of (14) at most.
    """
    a, b = 1 - contraction[:, None], (contraction * reach)[:, None]
    z = np.broadcast_to(starts, (len(contraction), len(starts))).copy()
    when = np.full(len(contraction), -1)
    for step in range(1, steps + 1):
        z = a * z - b * np.sign(z)
        when[(when < 0) & (np.abs(z) > 1).any(1)] = step
    return when


def check_escape() -> list[Finding]:
    """Check that the kick, not the envelope, decides."""
    return [check_criterion(), exact_condition()]


def check_criterion() -> Finding:
    """Take envelopes of 1.5 R and 2.5 R at eta mu = 1/2, so kicks of .75 R and 1.25 R."""
    steps = 100_000
    half = np.array([0.5])
    starts = np.linspace(-1, 1, 7) + 1e-9
    below = exit_time(half, np.array([1.5]), starts, steps)[0]
    above = exit_time(half, np.array([2.5]), starts, 10)[0]
    return Finding(
        "(6), (18)",
        "the iterate leaves radius R when rho / sqrt(avg) > R",
        LIMITS,
        bool(below == -1 and above == 1),
        {
            "steps without exit, envelope 1.5 R": steps if below < 0 else float(below),
            "step of the exit, envelope 2.5 R": float(above),
        },
        "Not an exit condition: without noise the map exits only when the kick b = eta mu "
        "rho / sqrt(avg) is above R.",
    )


def exact_condition() -> Finding:
    """Scan contraction and reach: exit exactly when the kick or the amplitude is above R."""
    contraction, reach = (
        x.ravel() for x in np.meshgrid(np.arange(0.13, 2, 0.1), np.arange(0.21, 4, 0.1))
    )
    when = exit_time(contraction, reach, np.linspace(-1, 1, 9) + 1e-9, 1000)
    kick = contraction * reach
    predicted = np.maximum(kick, kick / (2 - contraction)) > 1
    wrong = int(np.sum((when > 0) != predicted))
    paper = int(np.sum((when > 0) != (reach > 1)))
    return Finding(
        "(6), (18)",
        "the same, predicted over many contractions and envelopes",
        LIMITS,
        wrong == 0 and paper > 0,
        {
            "settings": len(when),
            "wrong by max(b, amplitude) > R": wrong,
            "wrong by rho / sqrt(avg) > R": paper,
        },
        "Exact is: the kick b or the amplitude (16) is above R. For eta mu <= 1 the kick is the "
        "larger, above 1 the amplitude.",
    )
