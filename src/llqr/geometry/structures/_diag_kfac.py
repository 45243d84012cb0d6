"""Diagonal Kronecker factors: (U X)_ij = b_i X_ij a_j."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..layout._blocks import CutRule
from ._base import Bounds, State, Structure
from ._eigenvalues import extremes_of_kronecker
from ._inner_step import InnerStep

__all__ = ["DiagKfac"]


class DiagKfac(Structure):
    """Diagonal Kronecker factors: (U X)_ij = b_i X_ij a_j."""

    name: ClassVar[str] = "diag-kfac"
    cut: ClassVar[CutRule] = "rectangles"
    trainable: ClassVar[tuple[str, ...]] = ("A", "B")

    def identity(self, device: torch.device) -> State:
        """Return factors of ones."""
        m, n = self.group.matrix_shape
        return {
            "A": self.batch_of_ones(n, device=device),
            "B": self.batch_of_ones(m, device=device),
        }

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return b_i X_ij a_j."""
        # (count, m, 1) * (count, m, n) * (count, 1, n)
        return state["B"][:, :, None] * x * state["A"][:, None, :]

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return dA_j = sum_i b_i X_ij R_ij and dB_i = sum_j X_ij R_ij a_j."""
        return _pull_factors(state, x * r)

    def project(self, state: State, bounds: Bounds) -> State:
        """Clamp both factors to the square roots of the bounds."""
        # u_ij = b_i a_j: factors within the roots keep the products within the bounds.
        low, high = bounds[0] ** 0.5, bounds[1] ** 0.5
        return {k: v.clamp(low, high) for k, v in state.items()}

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme products of the factors' entries."""
        a, b = state["A"].aminmax(dim=1), state["B"].aminmax(dim=1)
        return extremes_of_kronecker((a.min, a.max), (b.min, b.max))

    def inner_step(self, state: State, x: Tensor) -> InnerStep:
        """Return the steps with one buffer."""
        return DiagKfacStep(self, state, x)


class DiagKfacStep(InnerStep):
    """U X = b_i X_ij a_j, with one buffer."""

    def compute_control(self, out: Tensor) -> None:
        """Write b_i X_ij a_j."""
        torch.mul(self.x, self.entries["A"][:, None, :], out=out)
        out.mul_(self.entries["B"][:, :, None])

    def compute_gradient(self, r: Tensor) -> State:
        """Return dA_j = sum_i b_i X_ij R_ij and dB_i = sum_j X_ij R_ij a_j."""
        return _pull_factors(
            self.entries, torch.mul(self.x, r, out=self.reuse_buffer("xr", *self.x.shape))
        )


def _pull_factors(state: State, xr: Tensor) -> State:
    """Return the gradients in both factors, from X o R."""
    da = torch.bmm(state["B"][:, None, :], xr)[:, 0]
    # The vector on the left: a batch of GEMVs takes several times as long.
    db = torch.bmm(state["A"][:, None, :], xr.mT)[:, 0]
    return {"A": da, "B": db}
