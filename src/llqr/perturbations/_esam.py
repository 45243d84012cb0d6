"""ESAM: SAM on a random part of the parameters."""

from __future__ import annotations

from typing import ClassVar

import torch

from .._checks import Schedule, check_integer, check_number
from .._vectors import Tensors, multiple_of_some
from ._base import Probe
from ._sam import SAM, Along, Direction, Norm

__all__ = ["ESAM"]


class ESAM(SAM):
    r"""Probe a random part of the parameters in each step (stochastic weight perturbation).

    .. math:: \epsilon = \frac{\rho}{\beta} \, m \circ \frac{U g}{\sqrt{g^\top U g}}, \qquad
              m_i \sim \mathrm{Bernoulli}(\beta)

    The norm is that of the whole gradient, as in the paper, so the mean of eps is SAM's. One m_i is
    drawn for each parameter tensor, as in the authors' code, from the seed and the number of the
    step: all processes and resumed runs draw the same. The paper's other half, a second pass on the
    samples whose loss rises most, is not here, since it needs the loss of each sample; nor does the
    first pass leave gradients out. A step costs two passes.

    Args:
        rho: radius (see :class:`Perturbation`).
        beta: probability that a parameter is perturbed, in (0, 1]; 1 is SAM.
        seed: of the random choice, an integer >= 0.
        norm: as in :class:`SAM`.
        direction: as in :class:`SAM`.
        along: as in :class:`SAM`.
        start: first optimizer step that is probed.
        interval: as in :class:`SAM`.

    Source: J. Du et al., Efficient sharpness-aware minimization for improved training of neural
    networks, ICLR 2022.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.ESAM(rho=0.05, beta=0.5))
        >>> _ = optimizer.minimize(lambda: model(torch.ones(3, 2)).square().mean())
    """

    _is_bounded: ClassVar[bool] = True

    def __init__(
        self,
        rho: Schedule = 0.05,
        *,
        beta: float = 0.6,
        seed: int = 0,
        norm: Norm = "metric",
        direction: Direction = "raw",
        along: Along = "metric",
        start: int = 0,
        interval: int = 1,
    ) -> None:
        super().__init__(
            rho, norm=norm, direction=direction, along=along, start=start, interval=interval
        )
        check_number("beta", beta, low=0, open_low=True)
        if beta > 1:
            raise ValueError(f"beta: expected a probability > 0 and <= 1, got {beta!r}")
        check_integer("seed", seed, low=0)
        self.beta, self.seed = beta, seed

    def displacement(self, probe: Probe) -> Tensors | None:
        """Return SAM's displacement times m / beta; parameters that are not drawn are left out."""
        eps = super().displacement(probe)
        if eps is None:
            return None
        drawn = self._draw(probe)
        return multiple_of_some(eps, [n for n in eps if drawn[n]], 1 / self.beta)

    def _draw(self, probe: Probe) -> dict[str, bool]:
        """Return m, also for parameters that have no gradient here but elsewhere."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + probe.step) % 2**63)
        uniform = torch.rand(len(probe.parameters), generator=generator).tolist()
        return {n: u < self.beta for n, u in zip(probe.parameters, uniform, strict=True)}
