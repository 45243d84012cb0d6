"""The closed form of a full matrix: U = Q diag(s) Q' with the eigenvectors of the mean of w w'."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .._base import State
from .._dense import Dense
from .._eigenvalues import decompose_symmetric
from ._base import Averaging, ClosedForm

__all__ = ["DenseMoments"]


class DenseMoments(ClosedForm, Dense):
    """Q are the eigenvectors of the average C of w w', M its eigenvalues."""

    eigenvalue_entry: ClassVar[str] = "S"
    observes_gradients: ClassVar[bool] = False

    def identity(self, device: torch.device) -> State:
        """Return U = I and empty averages."""
        q = Dense.identity(self, device)["U"]
        ones = q.new_ones(q.shape[:2])
        return {"Q": q, "S": ones, "C": torch.zeros_like(q), "M": torch.zeros_like(ones)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return Q (s o (Q'x))."""
        turned = state["S"] * (x[:, None, :] @ state["Q"])[:, 0]  # x'Q: (1, n) @ (n, n)
        return (turned[:, None, :] @ state["Q"].mT)[:, 0]

    def squares(self, state: State, x: Tensor) -> Tensor:
        """Return the mean of (Q'x) o (Q'x)."""
        return (x.transpose(0, 1) @ state["Q"]).square().mean(1)

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Average w w'; renew its eigenvectors and eigenvalues."""
        rows = w.transpose(0, 1)  # (count, m, n)
        square = averaging.mean_over_ranks(rows.mT @ rows / len(w))
        average = torch.lerp(square, state["C"], averaging.keep)
        values, vectors = decompose_symmetric(average)
        q = vectors.contiguous()
        return {**state, "C": average, "Q": q, "M": values.clamp(min=0)}

    def work_bytes(self, samples: int, device: torch.device) -> int:
        """Return four matrices like C: the decomposition's."""
        return 4 * self.group.dtype.itemsize * self.group.numel * (self.group.numel // self.count)

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extremes of S."""
        return state["S"].amin(1), state["S"].amax(1)
