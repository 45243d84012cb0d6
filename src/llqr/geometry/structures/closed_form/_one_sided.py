"""The closed form that acts on one side of a matrix: U X = QB (s o (QB' X))."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...layout._blocks import CutRule
from .._base import State
from ._base import Averaging, ClosedForm

__all__ = ["OneSided"]


class OneSided(ClosedForm):
    """Act on the shorter side of each matrix alone, as for U = B^-1: cheap where the other is wide.

    Q are the eigenvectors of the average C of W W' (of W'W if the matrix is tall), and the best
    eigenvalues are n over those of C, n the length of the other side.

    Example:
        >>> import torch, llqr
        >>> from llqr.geometry.structures.closed_form import OneSided
        >>> def structure(name, parameter):
        ...     return OneSided if max(parameter.shape) > 1000 else "e-kfac"
        >>> geometry = llqr.NaturalGradient(structure, block_size=None)
    """

    name: ClassVar[str] = "one-sided"
    cut: ClassVar[CutRule] = "rectangles"
    eigenvalue_entry: ClassVar[str] = "S"

    @property
    def tall(self) -> bool:
        """Whether U acts on the columns, the shorter side."""
        rows, columns = self.group.matrix_shape
        return rows > columns

    def identity(self, device: torch.device) -> State:
        """Return U = I and empty averages."""
        q = self.batch_of_identities(min(self.group.matrix_shape), device)
        ones = q.new_ones(q.shape[:2])
        return {"Q": q, "S": ones, "C": torch.zeros_like(q), "M": torch.zeros_like(ones)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return Q (s o (Q'X)), or the same from the right."""
        x = x.mT if self.tall else x
        result = state["Q"] @ (state["S"][:, :, None] * (state["Q"].mT @ x))
        return result.mT if self.tall else result

    def squares(self, state: State, x: Tensor) -> Tensor:
        """Return the mean of (Q'X) o (Q'X) over samples and the longer side."""
        x = x.mT if self.tall else x
        return (state["Q"].mT @ x).square().mean((0, 3))

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Average W W', turn its eigenvectors, and average the squares in them."""
        new, keep = dict(state), averaging.keep_bases
        if keep is not None:
            wide = (w.mT if self.tall else w).transpose(0, 1)  # (count, m, k, n)
            square = averaging.mean_over_ranks((wide @ wide.mT).mean(1))
            new["C"] = torch.lerp(square, state["C"], keep)
            new["Q"] = averaging.turn_bases(new["C"], state["Q"])
            if keep:  # the diagonal of the old operator in the new basis
                overlap = torch.square(new["Q"].mT @ state["Q"])
                new["M"] = (overlap @ state["M"][:, :, None])[:, :, 0]
        return super().update_moments(new, w, averaging)

    def trace(self, values: Tensor) -> Tensor:
        """Return the trace: each eigenvalue counts once for every entry of the longer side."""
        return values.sum() * max(self.group.matrix_shape)

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extremes of S."""
        return state["S"].amin(1), state["S"].amax(1)
