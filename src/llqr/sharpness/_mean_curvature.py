"""Products with the curvature of the mean loss over all batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from .._vectors import dots
from ..curvature import Curvature, as_curvature
from ..curvature._term import Term
from ._data import Data
from ._measurement import Effort

__all__ = ["MeanCurvature"]


class MeanCurvature:
    r"""Multiply flat vectors by the mean curvature: :math:`C v = \sum_b s_b C_b v`.

    The graph of one batch is held at a time; only the graph of a single batch is kept between
    products.

    Args:
        data: what to measure on.
        curvature: which matrix the C of each batch is.
        effort: counts the products.

    Attributes:
        quadratics: :math:`v^\top C_b v` of the batches of this process at the last product, (B,),
            in float64 on the CPU.
    """

    def __init__(self, data: Data, curvature: str | Curvature, effort: Effort) -> None:
        self._data, self._effort = data, effort
        self.curvature = as_curvature(curvature)
        with data.ranks.together("expanding the loss"):
            self._terms = [self._expand(i) for i in range(len(data.forwards))]

    def _expand(self, index: int) -> Term:
        data = self._data
        keep = len(data.forwards) == 1
        term = Term(data.forwards[index], data.active, self.curvature, False, keep)
        if not bool(term.loss.isfinite()):
            raise ValueError(
                f"forward: the loss of batch {index} is {float(term.loss)}; what is not finite "
                "has no curvature"
            )
        term.gradient = []  # as large as the model, for each batch
        return term

    def __call__(self, v: Tensor) -> Tensor:
        """Return C v."""
        data = self._data
        direction, total = data.unflatten(v), torch.zeros_like(v)
        quadratics = []
        with data.ranks.together("a curvature product"):
            for share, term in zip(data.shares.tolist(), self._terms, strict=True):
                image = data.flatten(term.product(direction))
                quadratics.append(float(dots(image, v)))
                total.add_(image, alpha=share)
        data.ranks.sum_(total)
        if not bool(total.isfinite().all()):
            raise RuntimeError(
                "a curvature product is not finite although the loss is: look for a square root "
                "or a norm at zero, or for numbers beyond the range of the dtype"
            )
        self.quadratics = torch.tensor(quadratics, dtype=torch.float64, device="cpu")
        self._effort.count()
        return total
