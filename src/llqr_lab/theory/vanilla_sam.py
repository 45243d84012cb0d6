"""LLQR+SAM against vanilla SAM: section B.6 and Corollaries 4.2 and B.2."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .findings import ERRATUM, HOLDS, LIMITS, Finding
from .hovering import iterate_hovering
from .two_scale import optimizer_path, scalar_step

__all__ = ["check_vanilla_sam", "llqr_sam", "vanilla_amplitude"]

Array = NDArray[np.float64]
RHO = 0.1


def vanilla_amplitude(eta: Array, curvature: Array) -> Array:
    """Return the measured amplitude of vanilla SAM, by iterating (19)."""
    return iterate_hovering(1 - eta * curvature, eta * RHO * curvature)


def llqr_sam(eta: Array, curvature: Array, average: Array) -> Array:
    """Return the measured amplitude of LLQR+SAM, by iterating (13)."""
    mu = curvature / average
    return iterate_hovering(1 - eta * mu, eta * RHO * mu / np.sqrt(average))


def check_vanilla_sam() -> list[Finding]:
    """Check the recursion, the corollary as printed and as meant, and its limits."""
    return [check_recursion(), check_envelope(), check_corollary(), same_step(), check_above_one()]


def check_recursion() -> Finding:
    """Compare (19) with a step of llqr.Optimizer without a geometry."""
    worst, one = 0.0, torch.ones(1, dtype=torch.float64)
    for curvature in (0.3, 2.0, 11.0):
        for start in (-4.0, 3.0):
            z, H = start * one, torch.tensor([[curvature]], dtype=torch.float64)
            got = optimizer_path(z, H, None, 0.1, RHO)[1]
            worst = max(worst, float((got - scalar_step(z, H[0], one, 0.1, RHO)).abs()))
    return Finding(
        "(19)",
        "recursion of vanilla SAM in an eigendirection",
        HOLDS,
        worst < 1e-12,
        {"largest error": worst},
        "Against a step of llqr.Optimizer without a geometry.",
    )


def check_envelope() -> Finding:
    """Divide vanilla SAM's amplitude by rho: eta lambda / (2 - eta lambda), as in (17)."""
    step = np.array([0.5, 1.0, 1.5])
    ratio = vanilla_amplitude(1.0, step) / RHO
    return Finding(
        "(20)",
        "vanilla SAM hovers at about rho in every direction",
        LIMITS,
        bool(np.max(np.abs(ratio - step / (2 - step))) < 1e-10),
        {
            f"amplitude / rho at eta lambda = {s:g}": float(r)
            for s, r in zip(step, ratio, strict=True)
        },
        "The limits are those of (17).",
    )


def check_corollary() -> Finding:
    """Match the contractions; the ratio is 1/sqrt(average), not 1/sqrt(sharp)."""
    rng = np.random.default_rng(0)
    average, sharp = 10 ** rng.uniform(-2, 1, (2, 200))
    average[0], sharp[0] = 0.1, 0.7
    curvature = average + sharp
    contraction = rng.uniform(0.1, 1.9, 200)
    ratio = llqr_sam(contraction * average / curvature, curvature, average) / vanilla_amplitude(
        contraction / curvature, curvature
    )
    meant = np.max(np.abs(ratio * np.sqrt(average) - 1))
    printed = np.median(np.abs(ratio * np.sqrt(sharp) - 1))
    order = np.argsort(average)
    return Finding(
        "Corollary B.2",
        "amplification 1/sqrt(lambda_eps), as printed",
        ERRATUM,
        bool(meant < 1e-10 and printed > 0.1),
        {
            "measured at avg 0.1": float(ratio[0]),
            "largest relative error of 1/sqrt(avg)": float(meant),
            "median relative error of 1/sqrt(lambda_eps)": float(printed),
        },
        "It must be the average curvature, as in its text and in Corollary 4.2, at matched "
        "contraction (eta mu of LLQR equal to eta lambda of SAM).",
        {
            "average curvature": average[order].tolist(),
            "measured ratio LLQR+SAM / SAM": ratio[order].tolist(),
            "1/sqrt(avg)": (average[order] ** -0.5).tolist(),
            "as printed, 1/sqrt(lambda_eps)": (sharp[order] ** -0.5).tolist(),
        },
        {
            "title": r"LLQR+SAM swings further than SAM by $1/\sqrt{\bar\lambda}$, "
            r"not $1/\sqrt{\lambda_\epsilon}$ as printed",
            "y": "amplitude of LLQR+SAM / of SAM",
            "average curvature": r"average curvature $\bar\lambda$",
            "measured ratio LLQR+SAM / SAM": "measured ratio",
            "1/sqrt(avg)": r"$1/\sqrt{\bar\lambda}$",
            "as printed, 1/sqrt(lambda_eps)": r"as printed, $1/\sqrt{\lambda_\epsilon}$",
        },
    )


def same_step() -> Finding:
    """Use one eta for both: the ratio is avg^(-3/2) (2 - eta lambda) / (2 - eta mu)."""
    rng = np.random.default_rng(1)
    average = 10 ** rng.uniform(-1.5, 0.5, 200)
    curvature = average + 10 ** rng.uniform(-1.5, 0.5, 200)
    mu = curvature / average
    eta = rng.uniform(0.1, 1.9, 200) / np.maximum(mu, curvature)
    ratio = llqr_sam(eta, curvature, average) / vanilla_amplitude(eta, curvature)
    exact = average**-1.5 * (2 - eta * curvature) / (2 - eta * mu)
    error = np.max(np.abs(ratio / exact - 1))
    corollary = np.median(np.abs(ratio * np.sqrt(average) - 1))
    return Finding(
        "Corollary 4.2",
        "amplification 1/sqrt(avg) at the same learning rate",
        LIMITS,
        bool(error < 1e-10 and corollary > 0.1),
        {
            "largest relative error of avg^(-3/2) (2 - eta lambda) / (2 - eta mu)": float(error),
            "median relative error of 1/sqrt(avg)": float(corollary),
        },
        "Holds at matched contraction. At the same eta the ratio is the first expression.",
    )


def check_above_one() -> Finding:
    """Take an average curvature above 1: LLQR+SAM hovers closer than SAM."""
    average = np.array([0.25, 1.0, 4.0])
    curvature = average + 2.0
    ratio = llqr_sam(0.5 * average / curvature, curvature, average) / vanilla_amplitude(
        0.5 / curvature, curvature
    )
    return Finding(
        "Corollary 4.2",
        "LLQR+SAM amplifies",
        LIMITS,
        bool(np.max(np.abs(ratio - average**-0.5)) < 1e-10 and ratio[2] < 1),
        {f"ratio at avg {a:g}": float(r) for a, r in zip(average, ratio, strict=True)},
        "For avg > 1 it shrinks the amplitude.",
    )
