"""The two-scale quadratic (2) and its recursions (3), (4), (10) to (13), against llqr.Optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import llqr

from .findings import HOLDS, Finding

__all__ = [
    "TwoScale",
    "check_recursions",
    "coordinate_step",
    "full_step",
    "scalar_step",
    "whitened_step",
]

F64 = torch.float64


@dataclass(frozen=True)
class TwoScale:
    """L = e'He / 2 with H = H_bar + H_eps and U = H_bar^-1 (assumption 4.1); all (n, n)."""

    H_bar: Tensor
    H_eps: Tensor

    @property
    def H(self) -> Tensor:
        """The whole Hessian."""
        return self.H_bar + self.H_eps

    @property
    def U(self) -> Tensor:
        """The inverse metric, symmetric to the last bit."""
        U = torch.linalg.inv(self.H_bar)
        return (U + U.mT) / 2

    @property
    def root(self) -> Tensor:
        """H_bar^(1/2)."""
        values, vectors = torch.linalg.eigh(self.H_bar)
        return (vectors * values.sqrt()) @ vectors.mT


class RandomCase(NamedTuple):
    """A model and, if its matrices commute, their eigenvectors (columns), averages and mu."""

    model: TwoScale
    vectors: Tensor
    average: Tensor
    mu: Tensor


def random_two_scale(n: int, commuting: bool, generator: torch.Generator) -> RandomCase:
    """Draw average curvatures in [.1, 10] and sharp ones in [0, 50]."""

    def basis() -> Tensor:
        return torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator)).Q

    def matrix(values: Tensor, vectors: Tensor) -> Tensor:
        full = (vectors * values) @ vectors.mT
        return (full + full.mT) / 2

    smooth, sharp = torch.rand(2, n, dtype=F64, generator=generator)
    average, sharp = 10 ** (2 * smooth - 1), 50 * sharp**4
    vectors = basis()
    other = vectors if commuting else basis()
    model = TwoScale(matrix(average, vectors), matrix(sharp, other))
    return RandomCase(model, vectors, average, 1 + sharp / average)


def full_step(e: Tensor, model: TwoScale, eta: float, rho: float) -> Tensor:
    """Return e_{t+1} of equations (3) and (11)."""
    H, U = model.H, model.U
    g = H @ e
    norm = (g @ U @ g).sqrt()
    return e - eta * U @ H @ e - eta * rho / norm * U @ H @ U @ H @ e


def whitened_step(y: Tensor, A: Tensor, eta: float, rho: float) -> Tensor:
    """Return y_{t+1} of equation (10); y = H_bar^(1/2) e."""
    return y - eta * A @ y - eta * rho / (A @ y).norm() * A @ A @ y


def coordinate_step(z: Tensor, mu: Tensor, average: Tensor, eta: float, rho: float) -> Tensor:
    """Return z_{t+1} of equation (12); mu and average curvature per eigendirection."""
    norm = (mu**2 * average * z**2).sum().sqrt()
    return (1 - eta * mu) * z - eta * rho * mu**2 / norm * z


def scalar_step(z: Tensor, mu: Tensor, average: Tensor, eta: float, rho: float) -> Tensor:
    """Return z_{t+1} of equations (4) and (13), elementwise: no entry sees another."""
    return (1 - eta * mu) * z - eta * rho * mu / average.sqrt() * z.sign()


class Quadratic(nn.Module):
    """e'He / 2 as a module."""

    def __init__(self, e: Tensor, H: Tensor) -> None:
        """Start at e (n,)."""
        super().__init__()
        self.e = nn.Parameter(e.clone())
        self.H = H

    def forward(self) -> Tensor:
        """Return the loss."""
        return 0.5 * self.e @ self.H @ self.e


def optimizer_path(
    e: Tensor, H: Tensor, U: Tensor | None, eta: float, rho: float, steps: int = 1
) -> Tensor:
    """Return the iterates (steps + 1, n) of llqr.Optimizer on e'He / 2; U None: vanilla SAM."""
    model = Quadratic(e, H)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=eta),
        model,
        geometry=None if U is None else llqr.FixedGeometry(U),
        perturbation=llqr.SAM(rho),
    )
    path = [e.clone()]
    for _ in range(steps):
        optimizer.minimize(model)
        path.append(model.e.detach().clone())
    return torch.stack(path)


def check_recursions(cases: int = 200) -> list[Finding]:
    """Compare one optimizer step with every recursion on random problems."""
    generator = torch.Generator().manual_seed(0)
    worst = dict.fromkeys(("full", "whitened", "coordinate", "scalar"), 0.0)

    def note(name: str, got: Tensor, expected: Tensor) -> None:
        error = float((got - expected).norm() / expected.norm().clamp(min=1.0))
        worst[name] = max(worst[name], error)

    for case in range(cases):
        n = 2 + case % 5
        eta, rho = (torch.rand(2, dtype=F64, generator=generator) * 0.1 + 0.01).tolist()
        e = 10 * torch.randn(n, dtype=F64, generator=generator)
        free = random_two_scale(n, commuting=False, generator=generator).model
        stepped = optimizer_path(e, free.H, free.U, eta, rho)[1]
        note("full", stepped, full_step(e, free, eta, rho))
        inverse = torch.linalg.inv(free.root)
        A = inverse @ free.H @ inverse
        note("whitened", free.root @ stepped, whitened_step(free.root @ e, A, eta, rho))

        shared, vectors, average, mu = random_two_scale(n, commuting=True, generator=generator)
        stepped = optimizer_path(e, shared.H, shared.U, eta, rho)[1]
        z = vectors.mT @ e
        note("coordinate", vectors.mT @ stepped, coordinate_step(z, mu, average, eta, rho))
        # |z| = 10: the 1e-12 in the optimizer's root is then below rounding.
        z = 10 * z[:1].sign()
        alone = optimizer_path(z * vectors[:, 0], shared.H, shared.U, eta, rho)[1]
        expected = scalar_step(z, mu[:1], average[:1], eta, rho)
        note("scalar", vectors[:, :1].mT @ alone, expected)

    names = {
        "full": (
            "(3), (11)",
            "recursion of LLQR+SAM on the quadratic, for H_bar and H_eps that do not commute",
        ),
        "whitened": ("(10)", "the same in whitened coordinates"),
        "coordinate": ("(12)", "coordinates in the common eigenbasis"),
        "scalar": ("(4), (13)", "a single eigendirection"),
    }
    return [
        Finding(
            source,
            statement,
            HOLDS,
            worst[key] < 1e-12,
            {"cases": cases, "largest relative error": worst[key]},
            "Against a step of llqr.Optimizer in float64.",
        )
        for key, (source, statement) in names.items()
    ]
