"""What the tests of sharpness measure: a network with several batches, and its curvature."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explicit import F64, gauss_newton, gradient_and_hessian


class Measured:
    """A network, batches of unequal sizes, and the function of a batch that is measured."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, sizes: list[int]) -> None:
        self.model, self.x, self.y = model.to(F64), x, y
        self.batches = list(zip(x.split(sizes), y.split(sizes), strict=True))

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        z = self.model(batch[0])
        return F.cross_entropy(z, batch[1]), z

    @property
    def whole(self) -> list[Any]:
        """All rows in one batch."""
        return [(self.x, self.y)]

    @functools.cached_property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def matrix_of(self, batch: Any, curvature: str) -> Tensor:
        """C of one batch."""
        loss, z = self(batch)
        if curvature == "newton":
            return gradient_and_hessian(loss, self.parameters)[1]
        return gauss_newton(z, lambda z: F.cross_entropy(z, batch[1]), self.parameters)

    @functools.cached_property
    def matrices(self) -> dict[str, Tensor]:
        return {c: self.matrix_of(*self.whole, c) for c in ("newton", "fisher")}


@functools.cache
def network() -> Measured:
    """4-6-5-3 with tanh, 83 parameters, 24 rows in batches of 10, 8 and 6."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
        ).to(F64)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        return Measured(model, torch.randn(24, 4, dtype=F64), torch.randint(3, (24,)), [10, 8, 6])


def quadratic(diagonal: list[float], dtype: torch.dtype = F64) -> Any:
    """A loss with this Hessian at w = 0, and [w]."""
    w = nn.Parameter(torch.zeros(len(diagonal), dtype=dtype))
    a = torch.tensor(diagonal, dtype=dtype)
    return (lambda: (a * w.square()).sum() / 2), [w]
