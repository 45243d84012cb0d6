"""WSAM: the sharpness as a regularizer with its own weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .._checks import Schedule, check_number
from .._vectors import Tensors
from ._sam import SAM, Along, Direction, Norm

__all__ = ["WSAM"]


class WSAM(SAM):
    r"""Weight the sharpness L(theta + eps) - L(theta) as a regularizer of the loss.

    .. math:: \epsilon = \rho \frac{U g}{\sqrt{g^\top U g}}, \qquad
              \text{step along } g + \frac{\gamma}{1 - \gamma} (\tilde g - g)

    gamma = 1/2 is SAM, 0 the base method; above 1/2 the sharpness counts more than in SAM. The
    whole sum goes through U and the base's momentum (in pytorch_optimizer ``decouple=False``). The
    paper's algorithm lets only g into the momentum and adds the rest with the bare learning rate;
    the two agree for SGD without momentum and U. Two passes per step.

    Args:
        rho: radius (see :class:`Perturbation`).
        gamma: weight of the sharpness, in [0, 1).
        norm: as in :class:`SAM`.
        direction: as in :class:`SAM`.
        along: as in :class:`SAM`.
        start: first optimizer step that is probed.
        interval: as in :class:`SAM`.

    Source: Y. Yue et al., Sharpness-aware minimization revisited: weighted sharpness as a
    regularization term, KDD 2023.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.WSAM(rho=0.05, gamma=0.8))
        >>> _ = optimizer.minimize(lambda: model(torch.ones(3, 2)).square().mean())
    """

    _forgets_skipped: ClassVar[bool] = True

    def __init__(
        self,
        rho: Schedule = 0.05,
        *,
        gamma: float = 0.9,
        norm: Norm = "metric",
        direction: Direction = "raw",
        along: Along = "metric",
        start: int = 0,
        interval: int = 1,
    ) -> None:
        super().__init__(
            rho, norm=norm, direction=direction, along=along, start=start, interval=interval
        )
        check_number("gamma", gamma, low=0, high=1)
        self.gamma = gamma

    def combine(self, clean: Tensors, perturbed: Tensors) -> dict[str, Tensor]:
        """Return g + gamma / (1 - gamma) (g~ - g)."""
        weight = self.gamma / (1 - self.gamma)
        g = [clean[n] for n in perturbed]
        rise = torch._foreach_sub(list(perturbed.values()), g)
        torch._foreach_mul_(rise, weight)
        return dict(zip(perturbed, torch._foreach_add(g, rise), strict=True))
