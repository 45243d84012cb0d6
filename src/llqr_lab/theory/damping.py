"""Proposition B.4: stationary variance and one-step motion of a noisy mode, by simulation."""

from __future__ import annotations

import numpy as np

from .findings import HOLDS, LIMITS, Finding

__all__ = ["check_damping", "mean_squared_step", "simulate_chains", "stationary_variance"]


def stationary_variance(eta: float, curvature: float, d: float, tau: float) -> float:
    """Return the stationary variance of Proposition B.4; d is the metric's denominator."""
    return eta * tau**2 / (curvature * (2 * d - eta * curvature))


def mean_squared_step(eta: float, curvature: float, d: float, tau: float) -> float:
    """Return the stationary mean of the squared step."""
    return 2 * eta**2 * tau**2 / (d * (2 * d - eta * curvature))


def simulate_chains(
    eta: float, curvature: float, d: float, tau: float, chains: int = 4000, steps: int = 1000
) -> tuple[float, float]:
    """Return (variance, mean squared step) of many chains after they have settled."""
    rng = np.random.default_rng(0)
    q = 1 - eta * curvature / d
    z = np.zeros(chains)
    settle = 20 + int(20 / -np.log(max(abs(q), 0.1)))
    squares = moves = 0.0
    for step in range(settle + steps):
        new = q * z - eta / d * tau * rng.standard_normal(chains)
        if step >= settle:
            squares += float(np.mean(new**2))
            moves += float(np.mean((new - z) ** 2))
        z = new
    return squares / steps, moves / steps


def check_damping() -> list[Finding]:
    """Check the two formulas, what follows for two metrics, and its direction."""
    return [check_formulas(), check_direction()]


CASES = ((0.1, 2.0, 1.0, 0.5), (0.3, 1.0, 0.4, 1.0), (0.5, 3.0, 0.8, 0.2), (0.2, 5.0, 4.0, 2.0))


def check_formulas() -> Finding:
    """Divide the simulated moments by the formulas'."""
    ratios = []
    for case in CASES:
        spread, moved = simulate_chains(*case)
        ratios += [spread / stationary_variance(*case), moved / mean_squared_step(*case)]
    return Finding(
        "Proposition B.4",
        "variance and one-step motion of a noisy mode",
        HOLDS,
        # Four standard errors: the slowest case has about 4000 * 1000 / 20 independent samples.
        max(abs(r - 1) for r in ratios) < 4 * (2 / 200_000) ** 0.5,
        {
            "smallest simulated / formula": min(ratios),
            "largest simulated / formula": max(ratios),
            "cases": len(CASES),
        },
        "4000 chains of 1000 steps each.",
    )


def check_direction() -> Finding:
    """Compare the denominators of LLQR (avg) and SGD (1) on both sides of 1."""
    measured, agree = {}, True
    for average in (0.5, 2.0):
        ratio = simulate_chains(0.1, 1.0, average, 1.0)[1] / simulate_chains(0.1, 1.0, 1.0, 1.0)[1]
        measured[f"motion of LLQR / SGD at avg {average:g}"] = ratio
        measured[f"amplification of Corollary 4.2 at avg {average:g}"] = average**-0.5
        agree &= (ratio < 1) == (average > 1)
    return Finding(
        "Proposition B.4, Corollary 4.2",
        "LLQR moves less under noise, and amplifies the escape",
        LIMITS,
        agree,
        measured,
        "Less motion needs avg > 1, amplification avg < 1: not both in one direction.",
    )
