"""The scalar map (14): its two-cycle (16), the envelope (17), and where they apply."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .findings import HOLDS, LIMITS, Finding
from .two_scale import coordinate_step, optimizer_path

__all__ = ["check_hovering", "hovering_envelope", "iterate_hovering", "two_cycle_amplitude"]

Array = NDArray[np.float64]


def two_cycle_amplitude(eta: Array, rho: float, mu: Array, average: Array) -> Array:
    """Return the two-cycle's amplitude, equation (16)."""
    return eta * rho * mu / ((2 - eta * mu) * np.sqrt(average))


def hovering_envelope(rho: float, average: Array) -> Array:
    """Return the hovering envelope, equations (5) and (17)."""
    return rho / np.sqrt(average)


def iterate_hovering(a: Array, b: Array, start: float = 1.0, steps: int = 4000) -> Array:
    """Iterate z <- a z - b sign(z), equation (14); return |z| at the end."""
    z = np.full(np.broadcast(a, b).shape, start)
    for _ in range(steps):
        z = a * z - b * np.sign(z)
    return np.abs(z)


def check_hovering() -> list[Finding]:
    """Check amplitude, envelope and the directions they hold in."""
    return [
        two_cycle(),
        no_fixed_point(),
        check_bound(),
        check_sharpness(),
        largest_mu(),
        tied_mu(),
    ]


RHO, AVERAGE = 0.1, 0.25


def two_cycle() -> Finding:
    """Compare the end of the map with (16) for eta mu over (0, 2), and look at 2."""
    mu = np.linspace(0.02, 1.98, 50)
    one = np.ones_like(mu)
    exact = two_cycle_amplitude(one, RHO, mu, AVERAGE * one)
    measured = iterate_hovering(1 - mu, RHO * mu / np.sqrt(AVERAGE))
    error = np.max(np.abs(measured / exact - 1))
    by_optimizer = 0.0
    for value in (0.5, 1.0, 1.5):
        H, U = torch.tensor([[value * AVERAGE]]).double(), torch.tensor([[1 / AVERAGE]]).double()
        # The map scales with rho; at 100 the 1e-12 in the optimizer's root is below rounding.
        path = optimizer_path(torch.ones(1, dtype=torch.float64), H, U, 1.0, 100.0, steps=100)
        expected = float(two_cycle_amplitude(1.0, 100.0, value, AVERAGE))
        by_optimizer = max(by_optimizer, abs(float(path[-1].abs()) / expected - 1))
    b = RHO * 2 / np.sqrt(AVERAGE)
    growth = (iterate_hovering(-1.0, b, steps=2000) - iterate_hovering(-1.0, b, steps=1000)) / (
        1000 * b
    )
    return Finding(
        "(14), (16)",
        "limsup |z| = eta rho mu / ((2 - eta mu) sqrt(avg))",
        LIMITS,
        bool(error < 1e-10 and by_optimizer < 1e-10 and abs(growth - 1) < 1e-10),
        {
            "largest relative error over 0.02 <= eta mu <= 1.98": float(error),
            "the same with llqr.Optimizer at 0.5, 1, 1.5": by_optimizer,
            "growth a step at eta mu = 2, in kicks b": float(growth),
        },
        "(14) asks for a in (0, 1); it holds for a in (-1, 1), that is 0 < eta mu < 2, and "
        "diverges at 2.",
        {
            "eta mu": mu.tolist(),
            "measured amplitude": measured.tolist(),
            "two-cycle (16)": exact.tolist(),
            "envelope (17)": hovering_envelope(RHO, AVERAGE * one).tolist(),
        },
        {
            "title": r"how far LLQR+SAM swings about a minimum, "
            r"$\limsup |z| = \eta\rho\mu \,/\, ((2 - \eta\mu)\sqrt{\bar\lambda})$",
            "y": "amplitude $|z|$",
            "eta mu": r"$\eta\mu$",
            "two-cycle (16)": r"two-cycle (16): $\eta\rho\mu/((2-\eta\mu)\sqrt{\bar\lambda})$",
            "envelope (17)": r"envelope (17): $\rho/\sqrt{\bar\lambda}$",
        },
    )


def no_fixed_point() -> Finding:
    """Look at the map's move over many z and a: it always points to the origin or past it."""
    z, a = np.meshgrid(np.logspace(-6, 3, 200), np.linspace(-0.99, 0.99, 100))
    b = 0.3
    move = (a * z - b) - z
    return Finding(
        "(14)",
        "the scalar map has no fixed point except 0",
        HOLDS,
        bool(np.max(move) <= -b),
        {"smallest |move| in kicks b": float(np.min(-move) / b)},
        "The move against sign(z) is b + eta mu |z|, never below the kick.",
    )


def check_bound() -> Finding:
    """Divide the amplitude by the envelope: eta mu / (2 - eta mu)."""
    mu = np.array([0.5, 1.0, 1.2, 1.5, 1.9])
    end = iterate_hovering(1 - mu, RHO * mu / np.sqrt(AVERAGE))
    ratio = end / hovering_envelope(RHO, np.full_like(mu, AVERAGE))
    exact = np.max(np.abs(ratio - mu / (2 - mu)))
    return Finding(
        "(5), (17)",
        "|z| is at most about rho / sqrt(avg)",
        LIMITS,
        bool(exact < 1e-10 and np.all((ratio <= 1 + 1e-10) == (mu <= 1))),
        {
            f"amplitude / envelope at eta mu = {m:g}": float(r)
            for m, r in zip(mu, ratio, strict=True)
        },
        "A bound for eta mu <= 1 only, and loose below; the ratio is eta mu / (2 - eta mu).",
    )


def check_sharpness() -> Finding:
    """Let the sharp curvature grow at a fixed learning rate."""
    eta, average = 0.05, 0.1
    sharp = np.array([0.1, 0.5, 1.5, 3.0])
    mu = 1 + sharp / average
    end = iterate_hovering(1 - eta * mu, eta * RHO * mu / np.sqrt(average))
    over = end / hovering_envelope(RHO, np.full_like(mu, average))
    return Finding(
        "(5), (18)",
        "the hovering scale does not depend on the sharp curvature",
        LIMITS,
        bool(np.all(np.diff(over) > 0) and over[-1] / over[0] > 10),
        {
            f"amplitude / envelope at sharp {s:g}": float(o)
            for s, o in zip(sharp, over, strict=True)
        },
        "True of the envelope. The amplitude (16) at a fixed eta grows with it (here eta 0.05, "
        "avg 0.1).",
    )


def largest_mu() -> Finding:
    """Run (12) with three mu: all but the largest die out."""
    mu = torch.tensor([2.0, 5.0, 20.0], dtype=torch.float64)
    average = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    eta, z = 0.05, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    for _ in range(600):
        z = coordinate_step(z, mu, average, eta, RHO)
    expected = two_cycle_amplitude(np.array(eta), RHO, mu.numpy(), average.numpy())
    ratio = z.abs().numpy() / expected
    return Finding(
        "(5), (16)",
        "the amplitude in every eigendirection",
        LIMITS,
        bool(abs(ratio[2] - 1) < 1e-10 and max(ratio[:2]) < 1e-10),
        {f"|z| / (16) at mu = {m:g}": float(r) for m, r in zip(mu, ratio, strict=True)},
        "Holds in the direction of the largest mu alone; the other components die out.",
    )


def tied_mu() -> Finding:
    """Run (12) with one mu for all directions: the squared ratios to (16) sum to 1."""
    generator = torch.Generator().manual_seed(0)
    sums = []
    for _ in range(20):
        mu = torch.full((3,), 20.0, dtype=torch.float64)
        average = torch.rand(3, dtype=torch.float64, generator=generator) + 0.1
        z = torch.randn(3, dtype=torch.float64, generator=generator)
        for _ in range(400):
            z = coordinate_step(z, mu, average, 0.03, RHO)
        expected = two_cycle_amplitude(np.array(0.03), RHO, mu.numpy(), average.numpy())
        sums.append(float(((z.numpy() / expected) ** 2).sum()))
    off = max(abs(s - 1) for s in sums)
    return Finding(
        "(16)",
        "the amplitude if several directions have the largest mu",
        LIMITS,
        off < 1e-10,
        {"largest |sum of squared ratios - 1|, 20 starts": off},
        "They share it: the squares of |z_i| / (16) sum to 1.",
    )
