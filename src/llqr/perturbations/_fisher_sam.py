"""FisherSAM: probe in the metric of the squared gradient."""

from __future__ import annotations

from typing import ClassVar

import torch

from .._checks import Schedule, check_number
from .._vectors import Tensors
from ._base import Perturbation, Probe

__all__ = ["FisherSAM"]


class FisherSAM(Perturbation):
    r"""Probe in the metric of the squared gradient.

    .. math:: d = \frac{g}{g^2 + \eta}, \qquad \epsilon = \rho \frac{d}{\sqrt{g^\top d}}

    The probe ignores U; the paper's FisherSAM has no geometry at all. The direction depends on the
    scale of g: pass the GradScaler to passes, perturbed or minimize.

    Args:
        rho: radius (see :class:`Perturbation`).
        eta: damping of the squared gradient.
        start: first optimizer step that is probed.
        interval: every interval-th step is probed (see :class:`Perturbation`).

    Source: M. Kim et al., Fisher SAM, ICML 2022, in the form of the authors' code of the paper.

    Example:
        >>> import llqr
        >>> llqr.FisherSAM(rho=0.2)
        FisherSAM(rho=0.2, start=0, interval=1, eta=0.1)
    """

    _is_bounded: ClassVar[bool] = True

    def __init__(
        self, rho: Schedule = 0.1, *, eta: float = 0.1, start: int = 0, interval: int = 1
    ) -> None:
        super().__init__(rho, start=start, interval=interval)
        check_number("eta", eta, low=0, open_low=True)
        self.eta = eta

    def displacement(self, probe: Probe) -> Tensors | None:
        """Return rho d / sqrt(g.d)."""
        g = probe.gradients
        whole = list(g.values())
        damped = torch._foreach_mul(whole, whole)
        torch._foreach_add_(damped, self.eta)
        d = dict(zip(g, torch._foreach_div(whole, damped), strict=True))
        return probe.scale_by_radius(d, probe._inverse_length(g, d))
