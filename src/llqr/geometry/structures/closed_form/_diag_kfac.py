"""The closed form of diagonal Kronecker factors: that of kfac with identity bases."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .._base import State
from .._diag_kfac import DiagKfac
from ._base import Averaging, ClosedForm, average

__all__ = ["DiagKfacMoments"]


class DiagKfacMoments(ClosedForm, DiagKfac):
    """M = outer(B, A) / mean of B, with B and A the row and column means of w o w.

    (M + lambda)^-power is no product of two vectors, so that U has an entry for each of M.
    """

    eigenvalue_entry: ClassVar[str] = "S"

    def identity(self, device: torch.device) -> State:
        """Return U = I and empty averages."""
        factors = DiagKfac.identity(self, device)
        ones = self.batch_of_ones(*self.group.matrix_shape, device=device)
        return {"S": ones, **{k: torch.zeros_like(v) for k, v in factors.items()}}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return S o X."""
        return state["S"] * x

    def squares(self, state: State, x: Tensor) -> Tensor:
        """Return the mean of x o x."""
        return x.square().mean(0)

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Average the row and column means of w o w."""
        squares = averaging.mean_over_ranks(self.squares(state, w))
        return _average_sides(state, squares, averaging.keep)

    def observe_gradient(self, state: State, g: Tensor, keep: float) -> State:
        """Return the state whose averages have seen a gradient."""
        return _average_sides(state, self.squares(state, g[None]), keep)

    def is_empty(self, state: State) -> Tensor:
        """Return the mask of blocks whose B is zero."""
        return ~state["B"].any(1)

    def second_moment(self, state: State) -> Tensor:
        """Return outer(B, A) / mean of B."""
        b, a = state["B"], state["A"]
        mean = b.mean(1, keepdim=True).clamp(min=torch.finfo(b.dtype).tiny)
        return b[:, :, None] * (a / mean)[:, None, :]

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extremes of S."""
        return state["S"].amin((1, 2)), state["S"].amax((1, 2))


def _average_sides(state: State, squares: Tensor, keep: float) -> State:
    """Return the state with new averages of the row and column means, (count, m, n) -> B, A."""
    b, a = squares.mean(2), squares.mean(1)
    return {**state, "B": average(state["B"], b, keep), "A": average(state["A"], a, keep)}
