"""The landscape of Figures 2 and 3: a flat basin with a sharp annular well in its side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["SharpWell"]


@dataclass(frozen=True)
class SharpWell:
    r"""A bowl with a ring-shaped pothole.

    .. math::
        L(x, y) = \tfrac12 k r^2 - h \exp\Bigl(-\frac{(r - R)^2}{2 w^2}\Bigr),
        \qquad r = \sqrt{x^2 + y^2}

    Args:
        k: curvature of the bowl.
        h: depth of the pothole.
        R: radius of the ring.
        w: width of the pothole.
    """

    k: float = 0.7
    h: float = 1.9
    R: float = 5.0
    w: float = 0.3

    def loss(self, xy: Tensor) -> Tensor:
        """Return the loss (...,) of points (..., 2)."""
        square = xy.square().sum(-1)
        # 1e-24 is lost in rounding away from the origin and keeps the root smooth at it.
        r = (square + 1e-24).sqrt()
        return 0.5 * self.k * square - self.h * torch.exp(-((r - self.R) ** 2) / (2 * self.w**2))

    def gradient(self, xy: Tensor) -> Tensor:
        """Return the gradients (n, 2) at points (n, 2)."""
        xy = xy.detach().requires_grad_()
        return torch.autograd.grad(self.loss(xy).sum(), xy)[0]

    def hessian(self, xy: Tensor) -> Tensor:
        """Return the Hessians (n, 2, 2) at points (n, 2)."""
        xy = xy.detach().requires_grad_()
        slope = torch.autograd.grad(self.loss(xy).sum(), xy, create_graph=True)[0]
        rows = [torch.autograd.grad(s.sum(), xy, retain_graph=True)[0] for s in slope.unbind(-1)]
        return torch.stack(rows, dim=1)

    @property
    def bottom(self) -> float:
        """The radius of the well's bottom."""
        return self._flat_point(self.R - self.w, self.R)

    @property
    def barrier(self) -> float:
        """The radius of the ridge between the well and the basin."""
        return self._flat_point(self.R - self.w, self.R - 3 * self.w)

    def average_inverse(self, radius: float = 8.0, points: int = 20_000, seed: int = 0) -> Tensor:
        """Return U, the inverse of the Hessian averaged over a disc (assumption 4.1)."""
        rng = np.random.default_rng(seed)
        r = torch.from_numpy(radius * np.sqrt(rng.random(points)))
        angle = torch.from_numpy(2 * math.pi * rng.random(points))
        xy = torch.stack([r * angle.cos(), r * angle.sin()], dim=-1)
        return torch.linalg.inv(self.hessian(xy).mean(0))

    def _flat_point(self, low: float, high: float) -> float:
        """Halve an interval (slope negative at low, positive at high) down to the last bit."""
        for _ in range(100):
            middle = 0.5 * (low + high)
            at = torch.tensor([[middle, 0.0]], dtype=torch.float64)
            if float(self.gradient(at)[0, 0]) < 0:
                low = middle
            else:
                high = middle
        return 0.5 * (low + high)
