"""GSAM: step along the gradient of the second pass without closing the gap to the first."""

from __future__ import annotations

from typing import ClassVar

import torch

from .._checks import Schedule, check_number
from .._vectors import Tensors, scale_tensors, total_as_scalar
from ._sam import SAM, Along, Direction, Norm

__all__ = ["GSAM"]


class GSAM(SAM):
    r"""Step against the perturbed loss and its gap to the loss (surrogate gap).

    .. math:: \epsilon = \rho \frac{U g}{\sqrt{g^\top U g}}, \qquad
              g_\perp = g - \frac{g^\top \tilde g}{\tilde g^\top \tilde g} \tilde g, \qquad
              \text{step along } \tilde g - \alpha g_\perp

    The part of g that is orthogonal to g~ can be removed without changing how fast the perturbed
    loss falls; the gap L(theta + eps) - L(theta) falls then. U acts in the probe and in the step;
    orthogonal is meant in the Euclidean sense, as in the paper. Two passes per step.

    Args:
        rho: radius (see :class:`Perturbation`); the paper lets it fall with the learning rate.
        alpha: how much of the orthogonal part is subtracted; 0 is SAM.
        norm: as in :class:`SAM`.
        direction: as in :class:`SAM`.
        along: as in :class:`SAM`.
        start: first optimizer step that is probed.
        interval: as in :class:`SAM`.

    Source: J. Zhuang et al., Surrogate gap minimization improves sharpness-aware training, ICLR
    2022, algorithm 1.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.GSAM(rho=0.05, alpha=0.4))
        >>> _ = optimizer.minimize(lambda: model(torch.ones(3, 2)).square().mean())
    """

    _forgets_skipped: ClassVar[bool] = True

    def __init__(
        self,
        rho: Schedule = 0.05,
        *,
        alpha: float = 0.4,
        norm: Norm = "metric",
        direction: Direction = "raw",
        along: Along = "metric",
        start: int = 0,
        interval: int = 1,
    ) -> None:
        super().__init__(
            rho, norm=norm, direction=direction, along=along, start=start, interval=interval
        )
        check_number("alpha", alpha, low=0)
        self.alpha = alpha

    def combine(self, clean: Tensors, perturbed: Tensors) -> Tensors:
        """Return g~ - alpha g_perp = (1 + alpha c) g~ - alpha g with c = g.g~ / g~.g~."""
        square = total_as_scalar(perturbed, perturbed)
        divisor = square + (square == 0)
        alpha = self.alpha * (square / divisor)  # at g~ = 0 nothing is orthogonal to it
        c = total_as_scalar(clean, perturbed) / divisor
        stepped = scale_tensors(perturbed, 1 + alpha * c)
        g = scale_tensors({n: clean[n] for n in perturbed}, alpha)
        torch._foreach_sub_(list(stepped.values()), list(g.values()))
        return stepped
