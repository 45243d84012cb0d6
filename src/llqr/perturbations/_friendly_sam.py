"""FriendlySAM (F-SAM): probe along the part of the gradient that is new, through U."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from .._checks import Schedule, check_choice, check_number
from .._vectors import Tensors
from ._base import Probe
from ._memory import RememberingSAM
from ._sam import Along, Direction, Norm

__all__ = ["FriendlySAM"]


#: What the memory is at first.
MemoryStart = Literal["zero", "gradient"]


class FriendlySAM(RememberingSAM):
    r"""Probe along the part of the gradient that is new, through U.

    .. math:: v = g - \sigma m, \qquad \epsilon = \rho \frac{U v}{\sqrt{v^\top U v}}, \qquad
              m \leftarrow \lambda m + (1 - \lambda) g \text{ after } v

    The memory m starts at zero, as in the paper's code (the method's own authors and
    pytorch_optimizer start at g: ``memory_start="gradient"``). It holds raw gradients, advances
    also at rho = 0, and does not advance at a skipped step. The paper takes lambda = .6, .9 or .95
    (appendix C).

    Args:
        rho: radius (see :class:`Perturbation`).
        sigma: how much of the memory is subtracted.
        decay: lambda, in [0, 1).
        norm: as in :class:`SAM`.
        direction: as in :class:`SAM`.
        along: as in :class:`SAM`; "gradient" probes along v itself.
        start: first optimizer step that is probed.
        interval: as in :class:`SAM`; the memory sees every step.
        memory_start: "zero": after the first step m is (1 - lambda) g; "gradient": it is g. The
            first probe is along g in both cases.

    Raises:
        ValueError: a value out of range; the message names argument and value.

    Source: T. Li et al., Friendly sharpness-aware minimization, CVPR 2024.

    Example:
        >>> import llqr
        >>> llqr.FriendlySAM(rho=0.1).decay
        0.9
    """

    _is_bounded: ClassVar[bool] = True
    _forgets_skipped: ClassVar[bool] = True

    def __init__(
        self,
        rho: Schedule = 0.1,
        *,
        sigma: float = 1.0,
        decay: float = 0.9,
        norm: Norm = "metric",
        direction: Direction = "raw",
        along: Along = "metric",
        start: int = 0,
        interval: int = 1,
        memory_start: MemoryStart = "zero",
    ) -> None:
        super().__init__(
            rho, norm=norm, direction=direction, along=along, start=start, interval=interval
        )
        check_number("sigma", sigma, low=0)
        check_number("decay", decay, low=0, high=1)
        check_choice("memory_start", memory_start, MemoryStart)
        self.sigma, self.decay, self.memory_start = sigma, decay, memory_start

    def displacement(self, probe: Probe) -> Tensors | None:
        """Return SAM's displacement with v = g - sigma m in the place of g."""
        g, m = list(probe.gradients.values()), self._recall_all(probe.gradients)
        v = torch._foreach_sub(g, torch._foreach_mul(m, self.sigma))
        return self._ascend(dict(zip(probe.gradients, v, strict=True)), probe)

    def observe(self, gradients: Tensors) -> None:
        """Form the next memory; it becomes the memory when the step counts."""
        m, g = self._recall_all(gradients), list(gradients.values())
        means = torch._foreach_mul(m, self.decay)
        torch._foreach_add_(means, torch._foreach_mul(g, 1 - self.decay))
        memory = list(means)
        if self.memory_start == "gradient":
            # One that is zero has seen nothing yet; asked on the device, without a wait.
            memory = [
                torch.where(old.any(), mean, new)
                for old, mean, new in zip(m, means, g, strict=True)
            ]
        self._next_memory = dict(zip(gradients, memory, strict=True))
