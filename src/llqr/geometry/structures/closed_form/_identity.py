"""The closed form that learns nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .._base import State
from .._identity import Identity
from ._base import Averaging, ClosedForm

__all__ = ["IdentityMoments"]


class IdentityMoments(ClosedForm, Identity):
    """U = I: these blocks have no part in the scale of U."""

    def work_bytes(self, samples: int, device: torch.device) -> int:
        """Return nothing."""
        return 0

    def squares(self, state: State, x: Tensor) -> Tensor:
        """Return no number."""
        return x.new_zeros(self.count, 0)

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Return the state."""
        return state

    def observe_gradient(self, state: State, g: Tensor, keep: float) -> State:
        """Return the state."""
        return state

    def weigh_first(self, state: State, g: Tensor, factor: float) -> Tensor:
        """Return the gradient: there are no averages."""
        return g

    def second_moment(self, state: State) -> Tensor:
        """Return no number, in a row for each entry, as masks of elementwise blocks have."""
        return torch.zeros(self.group.numel, 0)

    def set_eigenvalues(self, state: State, values: Tensor) -> State:
        """Return the state."""
        return state
