"""The bases of U: coordinates in which it is diagonal, for tensors shaped like the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .._vectors import Tensors
from .structures import BlockDiagonal, States

__all__ = ["Bases"]


@dataclass(frozen=True, eq=False)
class Bases:
    """Q, with U = Q S Q', as it is until the next refresh.

    Attributes:
        blocks: how U acts.
        states: U itself; another list is another U.
    """

    blocks: BlockDiagonal
    states: States

    @cached_property
    def names(self) -> frozenset[str]:
        """The parameters that have bases; on the others Q is the identity."""
        return self.blocks.rotated_names()

    def rotate(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return Q'x for tensors shaped like the parameters."""
        return self.blocks.rotate_tensors(self.states, tensors)

    def rotate_back(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return Q x, which undoes :meth:`rotate`."""
        return self.blocks.rotate_tensors(self.states, tensors, back=True)

    def equals(self, other: Bases | None) -> bool:
        """Tell whether the other is of the same U, also if both were copied together."""
        return other is not None and self.states is other.states

    def goes_on_as(self, other: Bases | None) -> bool:
        """Tell whether the other is this one, laid out anew: it has these bases, and new blocks."""
        return other is not None and self.blocks is not other.blocks

    def on(self, device: torch.device) -> Bases:
        """Return the same bases on a device."""
        states = [{k: v.to(device) for k, v in state.items()} for state in self.states]
        return Bases(self.blocks, states)
