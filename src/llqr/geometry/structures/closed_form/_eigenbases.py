"""Closed forms in Kronecker eigenbases: U X = QB (S o (QB' X QA)) QA'."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .._base import State
from .._e_kfac import EKfac, squared_overlaps
from ._base import Averaging, ClosedForm, average

__all__ = ["EKfacMoments", "KfacMoments"]


class KroneckerBases(ClosedForm, EKfac):
    """Eigenvectors of the averages L of W W' and R of W'W as bases (base class).

    They are exact at the first refresh and follow by one step of orthogonal iteration at each later
    one: M is measured in whatever bases there are.
    """

    eigenvalue_entry: ClassVar[str] = "S"

    def identity(self, device: torch.device) -> State:
        """Return U = I and empty averages."""
        state = EKfac.identity(self, device)
        return {**state, "L": torch.zeros_like(state["QB"]), "R": torch.zeros_like(state["QA"])}

    def squares(self, state: State, x: Tensor) -> Tensor:
        """Return the mean of (QB' X QA) o (QB' X QA)."""
        left, right = state["QB"].mT, state["QA"]
        half, turned, total = torch.empty_like(x[0]), torch.empty_like(x[0]), torch.zeros_like(x[0])
        # One sample at a time: all of them in one product would have to be copied side by side.
        for w in x:
            torch.bmm(left, w, out=half)
            torch.bmm(half, right, out=turned)
            total.addcmul_(turned, turned)
        return total.div_(len(x))

    def is_empty(self, state: State) -> Tensor:
        """Return the mask of blocks whose L is zero: so is its diagonal."""
        return ~state["L"].diagonal(dim1=-2, dim2=-1).any(-1)

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extremes of S: the bases are orthogonal."""
        return state["S"].amin((1, 2)), state["S"].amax((1, 2))

    def work_bytes(self, samples: int, device: torch.device) -> int:
        """Return what the squares take, three vectors, or the bases: matrices of their sides."""
        vectors = 3 * super().work_bytes(1, device)
        rows, columns = self.group.matrix_shape
        own = self.group.dtype.itemsize
        factors = 2 * own * self.count * (rows**2 + columns**2)
        # On the wider side: what follows the eigenvectors, in float64 unless by reflections.
        turned = self.count * max(rows, columns) ** 2 * (5 * own if device.type == "cpu" else 8 * 8)
        return max(vectors, factors + turned)

    def average_factors(self, state: State, w: Tensor, averaging: Averaging, keep: float) -> State:
        """Return the state whose L and R have seen the samples."""
        left, right = w[0] @ w[0].mT, w[0].mT @ w[0]
        for x in w[1:]:
            left.baddbmm_(x, x.mT)
            right.baddbmm_(x.mT, x)
        new = dict(state)
        for entry, square in (("L", left), ("R", right)):
            new[entry] = average(state[entry], averaging.mean_over_ranks(square / len(w)), keep)
        return new

    def follow_gradient(
        self, state: State, g: Tensor, averaging: Averaging, *, turn: bool
    ) -> State:
        """Average L and R at every gradient; turn the bases when it is their time."""
        beta = averaging.keep
        left = torch.baddbmm(state["L"], g, g.mT, beta=beta, alpha=1 - beta)
        right = torch.baddbmm(state["R"], g.mT, g, beta=beta, alpha=1 - beta)
        new = {**state, "L": left, "R": right}
        return self.turn_bases(new, averaging) if turn else new

    def turn_bases(self, state: State, averaging: Averaging) -> State:
        """Return the state with the eigenvectors of L and R as bases."""
        pairs = (("L", "QB"), ("R", "QA"))
        return {**state, **{q: averaging.turn_bases(state[k], state[q]) for k, q in pairs}}


class EKfacMoments(KroneckerBases):
    """M is the mean of the squares of the samples in the bases, carried over when they turn."""

    def identity(self, device: torch.device) -> State:
        """Return U = I and empty averages."""
        state = super().identity(device)
        return {**state, "M": torch.zeros_like(state["S"])}

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Renew the bases, carry M over, and average the squares in them."""
        keep = averaging.keep_bases
        if keep is None:
            return super().update_moments(state, w, averaging)
        new = self.turn_bases(self.average_factors(state, w, averaging, keep), averaging)
        if keep:  # the diagonal of the old operator in the new bases
            turn_b, turn_a = squared_overlaps(state, new)
            new["M"] = turn_b @ state["M"] @ turn_a.mT
        return super().update_moments(new, w, averaging)

    def follow_gradient(
        self, state: State, g: Tensor, averaging: Averaging, *, turn: bool
    ) -> State:
        """Average M as well, in the bases that there are then; it stays when they turn."""
        new = super().follow_gradient(state, g, averaging, turn=turn)
        return self.observe_gradient(new, g, averaging.keep)


class KfacMoments(KroneckerBases):
    """M = outer(eigenvalues of L, eigenvalues of R) / trace of R: Kronecker factors."""

    name: ClassVar[str] = "kfac"
    observes_gradients: ClassVar[bool] = False

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Average L and R, whose eigenvalues are M, and turn the bases when it is their time."""
        new = self.average_factors(state, w, averaging, averaging.keep)
        return new if averaging.keep_bases is None else self.turn_bases(new, averaging)

    def second_moment(self, state: State) -> Tensor:
        """Return the outer product of the factors' eigenvalues over their common trace."""
        left, right = (
            (state[q] * (state[k] @ state[q])).sum(1) for q, k in (("QB", "L"), ("QA", "R"))
        )
        trace = right.sum(1).clamp(min=torch.finfo(right.dtype).tiny)
        return left[:, :, None] * (right / trace[:, None])[:, None, :]
