"""ASAM: probe in units of the weights' own size."""

from __future__ import annotations

from typing import ClassVar

import torch

from .._checks import Schedule, check_number
from .._vectors import Tensors
from ._base import Perturbation, Probe

__all__ = ["ASAM"]


class ASAM(Perturbation):
    r"""Probe in units of the weights' own size.

    .. math:: \epsilon = \rho \frac{T^2 g}{|T g|}, \qquad T = |w| + \eta

    T is 1 for biases: parameters whose last name starts with "bias" or ends with "_bias"
    (pytorch_optimizer scales them too, and has no eta). The probe ignores U; ``transport`` of the
    optimizer acts as given.

    Args:
        rho: radius (see :class:`Perturbation`).
        eta: added to the size of the weights, so that zeros move too.
        start: first optimizer step that is probed.
        interval: every interval-th step is probed (see :class:`Perturbation`).

    Source: J. Kwon et al., ASAM, ICML 2021.

    Example:
        >>> import llqr
        >>> llqr.ASAM(rho=1.0)
        ASAM(rho=1.0, start=0, interval=1, eta=0.01)
    """

    _is_bounded: ClassVar[bool] = True

    def __init__(
        self, rho: Schedule = 0.5, *, eta: float = 0.01, start: int = 0, interval: int = 1
    ) -> None:
        super().__init__(rho, start=start, interval=interval)
        check_number("eta", eta, low=0)
        self.eta = eta

    def displacement(self, probe: Probe) -> Tensors | None:
        """Return rho T^2 g / |T g|."""
        g = probe.gradients
        scaled = [n for n in g if not is_bias(n)]  # for the others T = 1
        weights = [probe.parameters[n].detach().to(g[n].dtype) for n in scaled]
        t = torch._foreach_abs(weights)
        torch._foreach_add_(t, self.eta)
        tg = torch._foreach_mul(t, [g[n] for n in scaled])
        t_g = {**g, **dict(zip(scaled, tg, strict=True))}
        tt_g = {**g, **dict(zip(scaled, torch._foreach_mul(t, tg), strict=True))}
        return probe.scale_by_radius(tt_g, probe._inverse_length(t_g, t_g))


def is_bias(name: str) -> bool:
    """Tell whether a parameter is a bias, by its last name."""
    last = name.rpartition(".")[2]
    return last.startswith("bias") or last.endswith("_bias")
