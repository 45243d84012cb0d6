"""Proposition B.3: how much time the regenerative process spends in sharp wells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .findings import LIMITS, Finding

__all__ = ["check_selection", "exit_steps", "flat_step", "hovering_well", "unstable_step"]

Array = NDArray[np.float64]
Well = Callable[[Array], Array]
SIGMAS = (0.2, 0.1, 0.05, 0.025, 0.0125)
GROWTH = 1.2  # |1 - eta lambda| of the unstable well


def flat_step(z: Array) -> Array:
    """Stay where you are: only the noise moves, so the exit takes R^2 / sigma^2 steps."""
    return z


def unstable_step(z: Array) -> Array:
    """Step past the minimum by more than came in: eta lambda = 2.2."""
    return -GROWTH * z


def hovering_well(kick: float) -> Well:
    """Return the map (14) with a = 1/2 and a kick, in units of R."""
    return lambda z: 0.5 * z - kick * np.sign(z)


def exit_steps(well: Well, sigma: float, chains: int = 5000, limit: int = 200_000) -> float:
    """Return the mean first step with |z| >= R = 1 from the center, chains run to their exits."""
    rng = np.random.default_rng(0)
    z, total, exited = np.zeros(chains), 0, 0
    for step in range(1, limit + 1):
        z = well(z) + sigma * rng.standard_normal(len(z))
        inside = np.abs(z) < 1
        total += step * int(np.sum(~inside))
        exited += int(np.sum(~inside))
        z = z[inside]
        if not len(z):
            return total / exited
    return float("inf")


def check_selection() -> list[Finding]:
    """Check the scaling with unstable sharp wells, and what hovering wells do instead."""
    return [check_scaling(), check_hypothesis()]


def check_scaling() -> Finding:
    """Divide the share of the sharp well by sigma^2 log(R / sigma), at equal nu."""
    ratios, flat_steps, shares = {}, [], []
    for sigma in SIGMAS:
        slow, fast = exit_steps(flat_step, sigma), exit_steps(unstable_step, sigma)
        flat_steps.append(slow * sigma**2)
        share = fast / (fast + slow)
        shares.append(share)
        ratios[sigma] = share / (sigma**2 * np.log(1 / sigma))
    # share <= fast / slow, and fast is about (log(R / sigma) + .3) / log(growth).
    bound = 1.2 / np.log(GROWTH)
    return Finding(
        "Proposition B.3",
        "sharp wells are occupied O(sigma^2 log(R/sigma)) of the time",
        LIMITS,
        max(ratios.values()) < bound and min(flat_steps) > 0.95,
        {f"share / (sigma^2 log(1/sigma)) at {s:g}": float(r) for s, r in ratios.items()}
        | {"smallest flat exit time, in R^2/sigma^2": min(flat_steps)},
        "Holds where the sharp wells are linearly unstable (here eta lambda = 2.2), R = 1.",
        {
            "noise sigma": list(SIGMAS),
            "measured share of the sharp well": shares,
            "6 sigma^2 log(1/sigma)": [6 * s**2 * float(np.log(1 / s)) for s in SIGMAS],
        },
        {
            "title": r"with less noise, sharp wells are left: $O(\sigma^2 \log(R/\sigma))$ "
            "of the time is spent there",
            "y": "share of the time",
            "noise sigma": r"noise $\sigma$",
            "measured share of the sharp well": "measured, in the sharp well",
            "6 sigma^2 log(1/sigma)": r"$6\,\sigma^2 \log(1/\sigma)$",
        },
    )


def check_hypothesis() -> Finding:
    """Let a hovering well's kick be below R: its exit time is exponential, not logarithmic."""
    sigmas = np.array([0.25, 0.2, 0.17, 0.14])
    below = np.array([exit_steps(hovering_well(0.75), s, 2000) for s in sigmas])
    above = [exit_steps(hovering_well(1.25), s, 2000) for s in sigmas]
    slopes = np.diff(np.log(below)) / np.diff(sigmas**-2)
    return Finding(
        "Proposition B.3",
        "the iterate leaves sharp wells in C (1 + log(R/sigma)) steps",
        LIMITS,
        bool(slopes.min() > 0.08 and slopes.max() < 1.3 * slopes.min() and max(above) < 4),
        {f"steps at sigma {s:g}, kick .75 R": float(t) for s, t in zip(sigmas, below, strict=True)}
        | {
            "smallest d log(steps) / d(R/sigma)^2": float(slopes.min()),
            "largest d log(steps) / d(R/sigma)^2": float(slopes.max()),
            "steps at most, kick 1.25 R": max(above),
        },
        "Fails for the map (14) (here a = 1/2) whenever the kick b is below R: the exit time then "
        "grows like exp(c R^2 / sigma^2).",
    )
