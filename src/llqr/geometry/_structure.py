"""What a structure of U is: how a block acts, how a residual pulls back to it, how it is kept.

A structure is a set of pure functions on a batch of equal blocks. With the control u = -U g, the
gradient of <r, U x> with respect to the state is ``pullback(state, x, r)``. The state is a dict of
tensors whose first dimension counts blocks (elementwise structures: one flat run).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._pieces import Group

__all__ = ["Bounds", "State", "Structure", "matrix_of"]

State = dict[str, Tensor]
Bounds = tuple[float, float]


class Structure:
    """The functions of one structure on one group of blocks (base class, and the identity).

    Attributes:
        trainable: the state entries that the inner solve changes.
        linear: True when U is linear in the trainable entries.
    """

    trainable: tuple[str, ...] = ()
    linear = True

    def __init__(self, group: Group) -> None:
        self.group = group
        self.count = len(group.blocks)

    def identity(self, device: torch.device) -> State:
        """Return the state at which U is the identity."""
        return {}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return U x for the group's view x of a flat vector."""
        return x

    def lowered(self, state: State) -> State:
        """Return what :meth:`apply` takes for the state in lower precision (kfac alone)."""
        return state

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return the gradient of <r, U x> in the trainable entries."""
        return {}

    def turn(self, state: State, x: Tensor) -> Tensor:
        """Return x in the fixed orthonormal coordinates in which a linear structure is simple."""
        return x

    def turn_back(self, state: State, x: Tensor) -> Tensor:
        """Undo :meth:`turn`."""
        return x

    def act(self, state: State, x: Tensor) -> Tensor:
        """Return U x, both in turned coordinates (linear structures)."""
        return self.apply(state, x)

    def pull(self, x: Tensor, r: Tensor) -> State:
        """Return the pullback of r at x, both turned; it depends on no state where U is linear."""
        return self.pullback({}, x, r)

    def tangent(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write what U x changes by along the pullback of r: ``act(pull(x, r), x)``.

        For a linear structure, all three in turned coordinates; ``out`` may be r.
        """
        out.zero_()

    def project(self, state: State, bounds: Bounds) -> State:
        """Return the nearest state with bounds[0] I <= U <= bounds[1] I."""
        return state

    def extremes(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest eigenvalue of each block."""
        ones = torch.ones(self.count)
        return ones, ones

    def leaves(self, entries: State) -> list[Tensor]:
        """Return one view a leaf (a tensor of one block), the unit of the gradient clip."""
        return [leaf for tensor in entries.values() for leaf in tensor.unbind(0)]

    def batches(self, entry: Tensor) -> list[Tensor]:
        """Return matrix views of a state entry, one row a leaf, leaves of one size together."""
        return [entry.view(len(entry), -1)]

    def blockwise(self, state: State) -> list[State]:
        """Return views of the state, one dict a block."""
        return [{k: v[i] for k, v in state.items()} for i in range(self.count)]

    def _ones(self, *shape: int, device: torch.device) -> Tensor:
        return torch.ones(self.count, *shape, dtype=self.group.dtype, device=device)

    def _eyes(self, n: int, device: torch.device) -> Tensor:
        return torch.eye(n, dtype=self.group.dtype, device=device).repeat(self.count, 1, 1)


def matrix_of(group: Group) -> tuple[int, int]:
    """Return the (rows, columns) of a group's blocks."""
    assert group.shape is not None and len(group.shape) == 2
    return group.shape[0], group.shape[1]
