"""The bases of U: coordinates in which it is diagonal, for tensors shaped like the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .._vectors import Tensors
from .structures import BlockDiagonal, State, States

__all__ = ["Bases"]


@dataclass(frozen=True, eq=False)
class Bases:
    """Q, with U = Q S Q', as it is until the next refresh.

    Attributes:
        blocks: how U acts.
        states: U itself, with orthogonal bases.
    """

    blocks: BlockDiagonal
    states: States

    @cached_property
    def names(self) -> frozenset[str]:
        """The parameters that have bases; on the others Q is the identity."""
        return self.blocks.rotated_names()

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor has the shape of its parameter, as far as that has bases."""
        return name not in self.names or self.blocks.layout.views[name].shape == tensor.shape

    def rotate(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return Q'x for tensors shaped like the parameters."""
        return self.blocks.rotate_tensors(self.states, tensors)

    def rotate_back(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return Q x, which undoes :meth:`rotate`."""
        return self.blocks.rotate_tensors(self.states, tensors, back=True)

    def equals(self, other: Bases | None) -> bool:
        """Tell whether the other has the same bases; the eigenvalues of U may differ."""
        if other is None or self.blocks is not other.blocks:
            return False
        pairs = zip(self.states, other.states, strict=True)
        rotating = zip(self.blocks.parts, pairs, strict=True)
        return all(_same(part.basis_entries, a, b) for part, (a, b) in rotating if part.rotates)

    def on(self, device: torch.device) -> Bases:
        """Return the same bases on a device."""
        states = [{k: v.to(device) for k, v in state.items()} for state in self.states]
        return Bases(self.blocks, states)


def _same(entries: Sequence[str], a: State, b: State) -> bool:
    """Tell whether two states hold the very tensors of some entries."""
    return all(a[k] is b[k] for k in entries) if entries else a is b
