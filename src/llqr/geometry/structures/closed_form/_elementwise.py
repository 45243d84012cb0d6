"""Closed forms without bases: U is a number per entry, or per layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .._base import State
from .._diagonal import Diagonal
from .._scalar import Scalar
from ._base import ClosedForm

__all__ = ["DiagonalMoments", "ScalarMoments"]


class DiagonalMoments(ClosedForm, Diagonal):
    """A number per entry: M is the mean of w o w."""

    def identity(self, device: torch.device) -> State:
        """Return U = I and an empty average."""
        state = Diagonal.identity(self, device)
        return {**state, "M": torch.zeros_like(state["U"])}

    def squares(self, state: State, x: Tensor) -> Tensor:
        """Return the mean of x o x."""
        return x.square().mean(0)

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the least and greatest entry of each block."""
        return Diagonal.extreme_eigenvalues(self, {"U": state["U"]}, exact)


class ScalarMoments(ClosedForm, Scalar):
    """A number per layer: M is the mean of |w|^2 / n."""

    def identity(self, device: torch.device) -> State:
        """Return U = I and an empty average."""
        state = Scalar.identity(self, device)
        return {**state, "M": torch.zeros_like(state["U"])}

    def squares(self, state: State, x: Tensor) -> Tensor:
        """Return the mean of each block's entries of x o x."""
        runs = self.group.split_equal_runs(x.square().mean(0))
        return torch.cat([run.mean(1) for run in runs])

    def weigh_first(self, state: State, g: Tensor, factor: float) -> Tensor:
        """Return the gradient, times a factor in blocks whose first one it is."""
        lengths = torch.tensor(self.group.lengths, device=g.device)
        return torch.where(self.is_empty(state).repeat_interleave(lengths), factor * g, g)

    def trace(self, values: Tensor) -> Tensor:
        """Return the sum over all entries: a block's number counts for each of its entries."""
        return (values * values.new_tensor(self.group.lengths)).sum()
