"""FisherSAM: probe in the metric of the squared gradient."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from .._checks import Schedule, check_choice, check_number
from .._vectors import Tensors
from ._base import Perturbation, Probe

__all__ = ["FisherSAM"]


#: Whose inverse of the diagonal Fisher g^2.
Form = Literal["paper", "kim"]


class FisherSAM(Perturbation):
    r"""Probe in the metric of the squared gradient.

    .. math:: d = \frac{g}{g^2 + \eta} \text{ (paper) or } \frac{g}{1 + \eta g^2} \text{ (kim)},
              \qquad \epsilon = \rho \frac{d}{\sqrt{g^\top d}}

    The probe ignores U; the paper's FisherSAM has no geometry at all. The direction depends on the
    scale of g: pass the GradScaler to passes, perturbed or minimize.

    Args:
        rho: radius (see :class:`Perturbation`).
        eta: damping of the squared gradient ("paper"), or its weight ("kim").
        form: "paper", as in the code of the paper's authors; or "kim", as Kim et al. have it:
            there SAM's probe is the limit of a small eta, here that of a large one.
        start: first optimizer step that is probed.
        interval: every interval-th step is probed (see :class:`Perturbation`).

    Raises:
        ValueError: ``eta`` not positive, or another ``form``.

    Source: M. Kim et al., Fisher SAM, ICML 2022; its form in the authors' code of the paper.

    Example:
        >>> import llqr
        >>> llqr.FisherSAM(rho=0.2)
        FisherSAM(rho=0.2, start=0, interval=1, eta=0.1, form='paper')
    """

    _is_bounded: ClassVar[bool] = True

    def __init__(
        self,
        rho: Schedule = 0.1,
        *,
        eta: float = 0.1,
        form: Form = "paper",
        start: int = 0,
        interval: int = 1,
    ) -> None:
        super().__init__(rho, start=start, interval=interval)
        check_number("eta", eta, low=0, open_low=True)
        check_choice("form", form, Form)
        self.eta, self.form = eta, form

    def displacement(self, probe: Probe) -> Tensors | None:
        """Return rho d / sqrt(g.d)."""
        g = probe.gradients
        whole = list(g.values())
        damped = torch._foreach_mul(whole, whole)
        if self.form == "kim":
            torch._foreach_mul_(damped, self.eta)
        torch._foreach_add_(damped, 1.0 if self.form == "kim" else self.eta)
        d = dict(zip(g, torch._foreach_div(whole, damped), strict=True))
        return probe.scale_by_radius(d, probe._inverse_length(g, d))
