"""Functions of vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["quadratic_value"]


def quadratic_value(
    u: Tensor, g: Tensor, image: Tensor, dot: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return J = g'u + u'Cu/2, the objective of the paper's equation (9), with image = C u."""
    # One inner product in place of two: g'u + u'Cu/2 = u'(g + Cu/2).
    return dot(u, torch.add(g, image, alpha=0.5))
