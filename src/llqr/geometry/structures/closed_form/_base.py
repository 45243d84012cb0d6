"""What a structure needs so that its best U has a closed form (base class)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._base import Bounds, State, Structure
from .._eigenvalues import eigenvectors, follow_eigenvectors
from ._units import expand_mask

__all__ = ["Averaging", "ClosedForm", "average"]


@dataclass(frozen=True)
class Averaging:
    """How averages take in the samples of a refresh.

    Attributes:
        keep: the weight of the old averages.
        keep_bases: that of the averages whose eigenvectors are the bases; None: the bases stay.
        mean_over_ranks: averages a statistic over the processes, in place.
    """

    keep: float
    keep_bases: float | None
    mean_over_ranks: Callable[[Tensor], Tensor]

    def turn_bases(self, matrices: Tensor, old: Tensor) -> Tensor:
        """Return the eigenvectors of averages: exact if no old ones count, else followed."""
        new = follow_eigenvectors(matrices, old) if self.keep_bases else eigenvectors(matrices)
        # Contiguous, as a checkpoint brings them back: products round by the strides.
        return new.contiguous()

    def from_nothing(self) -> Averaging:
        """Return the weights with which averages start."""
        return Averaging(0.0, 0.0, self.mean_over_ranks)


class ClosedForm(Structure):
    r"""A structure U = Q diag(s) Q' whose best s is known from curvature samples (base class).

    For samples w with :math:`\mathbb E\, w w^\top = C`, the expectation of the paper's equation (9)
    over vectors :math:`v` with :math:`\mathbb E\, v v^\top = I` in the place of the gradient,

    .. math:: \mathbb E\, J(U) = -\operatorname{tr} U + \tfrac12 \operatorname{tr}(U C U),

    is least at :math:`s_i = 1 / (Q^\top C Q)_{ii} = 1 / \mathbb E\,(Q^\top w)_i^2`: all that is
    learned is Q and M, the second moment of the samples in its coordinates.

    A subclass inherits the structure too: ``class DiagonalMoments(ClosedForm, Diagonal)``. Its
    state has the entries of both, with M as "M".
    """

    trainable: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False
    #: The state entry that holds the eigenvalues of U.
    eigenvalue_entry: ClassVar[str] = "U"
    #: Whether M may follow gradients too, by :meth:`observe_gradient`.
    observes_gradients: ClassVar[bool] = True

    @abstractmethod
    def squares(self, state: State, x: Tensor) -> Tensor:
        """Return the mean of the squares of vectors in the coordinates of Q, shaped like M.

        Args:
            state: the present state.
            x: vectors, (m, count, *shape), or (m, n) for blocks of any length.
        """

    def update_moments(self, state: State, w: Tensor, averaging: Averaging) -> State:
        """Return the state whose averages (and bases) have seen new samples.

        Args:
            state: the present state.
            w: the samples, as :meth:`squares` takes them.
            averaging: how.
        """
        squares = averaging.mean_over_ranks(self.squares(state, w))
        return {**state, "M": average(state["M"], squares, averaging.keep)}

    def follow_gradient(
        self, state: State, g: Tensor, averaging: Averaging, *, turn: bool
    ) -> State:
        """Return the state whose averages have seen a gradient.

        Args:
            state: the present state.
            g: the blocks of the gradient.
            averaging: how averages take it in.
            turn: whether the bases follow what was averaged.
        """
        own = averaging if turn else replace(averaging, keep_bases=None)
        return self.update_moments(state, g[None], own)

    def observe_gradient(self, state: State, g: Tensor, keep: float) -> State:
        """Return the state whose M has seen a gradient, in the present coordinates."""
        return {**state, "M": average(state["M"], self.squares(state, g[None]), keep)}

    def weigh_first(self, state: State, g: Tensor, factor: float) -> Tensor:
        """Return the blocks of a gradient, times a factor where it is the first one."""
        return torch.where(expand_mask(self.is_empty(state), g), factor * g, g)

    def is_empty(self, state: State) -> Tensor:
        """Return the mask of rows of which nothing was seen: their averages are zero."""
        m = state["M"]
        return m == 0 if self.elementwise else ~m.reshape(self.count, -1).any(1)

    def second_moment(self, state: State) -> Tensor:
        """Return M, the diagonal of Q'CQ."""
        return state["M"]

    def set_eigenvalues(self, state: State, values: Tensor) -> State:
        """Return the state whose U has these eigenvalues, in the order of M."""
        return {**state, self.eigenvalue_entry: values}

    def work_bytes(self, samples: int, device: torch.device) -> int:
        """Return what :meth:`update_moments` allocates at a time, beside samples and states.

        Args:
            samples: how many.
            device: where they are.
        """
        return samples * self.group.numel * self.group.dtype.itemsize  # their squares

    def trace(self, values: Tensor) -> Tensor:
        """Return the trace of a matrix with these eigenvalues, a scalar."""
        return values.sum()

    def project(self, state: State, bounds: Bounds) -> State:
        """Return the state: c (M + lambda)^-power is positive."""
        return state


def average(old: Tensor, new: Tensor, keep: float) -> Tensor:
    """Return keep old + (1 - keep) new."""
    return torch.lerp(new, old, keep)
