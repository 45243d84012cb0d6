"""MSAM: probe along the momentum, which is known before the pass."""

from __future__ import annotations

from typing import ClassVar

from .._checks import Schedule
from .._vectors import Tensors, widen_to_float32
from ._base import Perturbation, Probe

__all__ = ["MSAM"]


class MSAM(Perturbation):
    r"""Probe along the momentum of the base, in the only pass of the step.

    .. math:: \epsilon = -\rho \frac{m}{|m|}, \qquad g = \nabla L(\theta + \epsilon)

    m is ``momentum_buffer`` of SGD, RMSprop or Muon and ``exp_avg`` of Adam and its relatives, as
    it is before the step: a mean of gradients (with a geometry, of U g), so eps points where the
    last steps went, as in the paper. The first step has no momentum and runs at theta. Weight decay
    acts on theta, not on theta + eps as in the authors' code.

    There is no clean pass: the loss that ``minimize`` returns, and what ``passes`` shows, is that
    at theta + eps. Loops with ``perturbed`` run their only forward and backward within it. In a
    plain loop the weights stay where they are, and ``step`` warns.

    Args:
        rho: radius (see :class:`Perturbation`), larger than SAM's, since m is far from the
            steepest ascent: the authors' commands take 3 where they take .2 for SAM.
        start: first optimizer step that is probed.
        interval: every interval-th step is probed.

    Raises:
        ValueError: (by :class:`llqr.Optimizer`) the base keeps no momentum.

    Source: M. Becker et al., Momentum-SAM: sharpness aware minimization without computational
    overhead, 2024, algorithm 1.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.MSAM(rho=0.3))
        >>> optimizer.needs_second_pass
        False
        >>> _ = optimizer.minimize(lambda: model(torch.ones(3, 2)).square().mean())
    """

    looks_ahead: ClassVar[bool] = True
    _is_bounded: ClassVar[bool] = True

    def __init__(self, rho: Schedule = 0.3, *, start: int = 0, interval: int = 1) -> None:
        super().__init__(rho, start=start, interval=interval)

    def displacement(self, probe: Probe) -> Tensors:
        """Return -rho m / |m|."""
        m = widen_to_float32(probe.momentum)
        return probe.scale_by_radius(m, -probe._inverse_length(m, m))
