"""Closed forms in Kronecker eigenbases: U X = QB (S o (QB' X QA)) QA'."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .._base import State
from .._e_kfac import EKfac, squared_overlaps
from ._base import Averaging, ClosedForm

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
        m, count, rows, columns = x.shape
        # All samples of a block in one product each side: (rows, rows) @ (rows, m columns), ...
        turned = state["QB"].mT @ side_by_side(x)
        turned = turned.view(count, rows, m, columns).transpose(1, 2)
        turned = turned.reshape(count, m * rows, columns) @ state["QA"]
        return turned.square_().view(count, m, rows, columns).mean(1)

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extremes of S: the bases are orthogonal."""
        return state["S"].amin((1, 2)), state["S"].amax((1, 2))

    def work_bytes(self, samples: int, contiguous: bool) -> int:
        """Return what the bases take, or the squares in them: three tensors like the samples."""
        own = super().work_bytes(samples, contiguous)
        # A single block is stacked without a copy.
        copies = 1 if self.count == 1 and contiguous else 2
        # Eight float64 matrices of the wider side follow the eigenvectors.
        wide = 8 * 8 * self.count * max(self.group.matrix_shape) ** 2
        return copies * own + max(own, wide)

    def update_bases(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Return the state with L, R and their eigenvectors."""
        keep = averaging.keep_bases
        if keep is None:
            return state
        wide, tall = side_by_side(w), stacked(w)
        new = dict(state)
        for entry, basis, square in (("L", "QB", wide @ wide.mT), ("R", "QA", tall.mT @ tall)):
            mean = averaging.mean_over_ranks(square / len(w))
            new[entry] = torch.lerp(mean, state[entry], keep)
            new[basis] = averaging.turn_bases(new[entry], state[basis])
        return new


class EKfacMoments(KroneckerBases):
    """M is the mean of the squares of the samples in the bases, carried over when they turn."""

    def identity(self, device: torch.device) -> State:
        """Return U = I and empty averages."""
        state = super().identity(device)
        return {**state, "M": torch.zeros_like(state["S"])}

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Renew the bases, carry M over, and average the squares in them."""
        new = self.update_bases(state, w, averaging)
        if averaging.keep_bases:  # the diagonal of the old operator in the new bases
            turn_b, turn_a = squared_overlaps(state, new)
            new["M"] = turn_b @ state["M"] @ turn_a.mT
        return super().update_moments(new, w, averaging)


class KfacMoments(KroneckerBases):
    """M = outer(eigenvalues of L, eigenvalues of R) / trace of R: Kronecker factors."""

    name: ClassVar[str] = "kfac"
    observes_gradients: ClassVar[bool] = False

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Renew the bases."""
        return self.update_bases(state, w, averaging)

    def second_moment(self, state: State) -> Tensor:
        """Return the outer product of the factors' eigenvalues over their common trace."""
        left, right = (
            (state[q] * (state[k] @ state[q])).sum(1) for q, k in (("QB", "L"), ("QA", "R"))
        )
        trace = right.sum(1).clamp(min=torch.finfo(right.dtype).tiny)
        return left[:, :, None] * (right / trace[:, None])[:, None, :]


def side_by_side(x: Tensor) -> Tensor:
    """Return the samples of each block side by side: (m, count, r, c) -> (count, r, m c)."""
    m, count, rows, columns = x.shape
    return x.permute(1, 2, 0, 3).reshape(count, rows, m * columns)


def stacked(x: Tensor) -> Tensor:
    """Return the samples of each block one below the other: (m, count, r, c) -> (count, m r, c)."""
    m, count, rows, columns = x.shape
    return x.transpose(0, 1).reshape(count, m * rows, columns)
