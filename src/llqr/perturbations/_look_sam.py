"""LookSAM: probe now and then, and use what the probe found in the steps between."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .._checks import Schedule, check_number
from .._vectors import Tensors, scale_tensors, total_as_scalar
from ._memory import RememberingSAM
from ._sam import Along, Direction, Norm

__all__ = ["LookSAM"]


class LookSAM(RememberingSAM):
    r"""Probe every few steps, and reuse in between what the probe added to the gradient.

    .. math::
        \begin{aligned}
        &\text{every interval-th step:} && \text{step along } \tilde g, \qquad
         g_v = \tilde g - \frac{\tilde g^\top g}{g^\top g} g, \qquad v \leftarrow g_v / |g_v| \\
        &\text{the others:} && \text{step along } g + \alpha |g| v
        \end{aligned}

    The part of the probed gradient that is orthogonal to g changes slowly from step to step, so an
    older one serves. Orthogonal and long are meant in the Euclidean sense and of the whole
    gradient, as in the paper (in pytorch_optimizer of each tensor). U acts in the probe and in the
    step; ``step()`` adds alpha |g| v after clipping. The memory v takes one copy of the parameters.
    Of ``interval`` steps one has two passes.

    Args:
        rho: radius (see :class:`Perturbation`).
        interval: k of the paper: every k-th step is probed, counted from ``start``.
        alpha: length of what is added, in units of |g|.
        norm: as in :class:`SAM`.
        direction: as in :class:`SAM`.
        along: as in :class:`SAM`.
        start: first optimizer step that is probed.

    Source: Y. Liu et al., Towards efficient and scalable sharpness-aware minimization, CVPR 2022,
    algorithm 1.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.LookSAM(rho=0.05))
        >>> probed = []
        >>> for _ in range(6):
        ...     probed.append(optimizer.needs_second_pass)
        ...     _ = optimizer.minimize(lambda: model(torch.ones(3, 2)).square().mean())
        >>> probed
        [True, False, False, False, False, True]
    """

    memory_key: ClassVar[str] = "direction"
    _forgets_skipped: ClassVar[bool] = True

    def __init__(
        self,
        rho: Schedule = 0.05,
        *,
        interval: int = 5,
        alpha: float = 0.7,
        norm: Norm = "metric",
        direction: Direction = "raw",
        along: Along = "metric",
        start: int = 0,
    ) -> None:
        super().__init__(
            rho, norm=norm, direction=direction, along=along, start=start, interval=interval
        )
        check_number("alpha", alpha, low=0)
        self.alpha = alpha

    def observe(self, gradients: Tensors) -> None:
        """Drop what a step that did not count has left."""
        self._next_memory = {}

    def combine(self, clean: Tensors, perturbed: Tensors) -> Tensors:
        """Return g~; keep the unit vector of its part that is orthogonal to g."""
        square = total_as_scalar(clean, clean)
        c = total_as_scalar(perturbed, clean) / (square + (square == 0))
        v = scale_tensors(clean, -c)
        g_v = list(v.values())
        torch._foreach_add_(g_v, [perturbed[n] for n in clean])
        part = total_as_scalar(v, v)
        # Without a displacement g~ is g, and what differs is rounding: it has no direction to keep.
        rounding = 16 * max(torch.finfo(x.dtype).eps for x in g_v)
        found = part > rounding**2 * (part + c**2 * square)  # |g~|^2
        self._next_memory = scale_tensors(v, found * (part + (part == 0)) ** -0.5)
        return perturbed

    def adjust(self, gradients: Tensors) -> dict[str, Tensor]:
        """Return g + alpha |g| v."""
        length = self.alpha * total_as_scalar(gradients, gradients) ** 0.5
        v = dict(zip(gradients, self._recall_all(gradients), strict=True))
        adjusted = scale_tensors(v, length)
        torch._foreach_add_(list(adjusted.values()), list(gradients.values()))
        return adjusted
