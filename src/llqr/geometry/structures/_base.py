"""What a structure of U is: how a block acts, how a residual pulls back to it, how it is cut.

A structure is a set of pure functions on a batch of equal blocks. With the control u = -U g, the
gradient of <r, U x> with respect to the state is ``pullback(state, x, r)``. The state is a dict of
tensors whose first dimension counts blocks (elementwise structures: one flat run).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..layout import Block, Group
from ..layout._blocks import CutRule
from ._application import Application
from ._eigenvalues import extremes_of_operator
from ._inner_step import InnerStep, State

__all__ = ["Bounds", "State", "Structure"]

#: (u_min, u_max), between which the eigenvalues of U are kept.
Bounds = tuple[float, float]


class Structure(ABC):
    """The functions of one structure of U, on one group of equal blocks (base class).

    A subclass names its traits and writes :meth:`identity`, :meth:`apply` and :meth:`project`;
    everything else has a general default. Faster or exact forms override the defaults, and
    :func:`verify_structure` checks all of them against explicit matrices and autograd.

    Attributes:
        name: in messages, summaries and the table.
        trainable: the state entries that the inner solve changes.
        linear: whether U is linear in the trainable entries. The solve then runs on coefficients,
            in the coordinates of :meth:`rotate`.
        cut: how a layer is cut into blocks: "layer": all its parameters are one block, of any
            length; "runs": their entries, one behind the other, in runs of at most ``block_size``,
            each a vector; "rectangles": each parameter's matrix view in rectangles with sides of at
            most ``block_size``, each a matrix (the structure needs matrices; 1-D parameters are
            elementwise, as in all structures of the paper).
        elementwise: whether U acts entry by entry, by :meth:`scale_tensors`. Then several processes
            each hold a run of every parameter; other blocks are whole in one process.
        rotates: whether :meth:`rotate` does anything; U is diagonal in these coordinates.
        basis_entries: the state entries that it depends on; none: it may depend on all.
        renews_bases: whether :meth:`renew_bases` does anything.

    Args:
        group: the blocks; their number is ``count``.

    Example:
        One number per row of a matrix, U X = diag(b) X:

        >>> import torch, llqr
        >>> from llqr.geometry.structures import Structure, verify_structure
        >>> class Rows(Structure):
        ...     name, trainable, cut = "rows", ("b",), "rectangles"
        ...     def identity(self, device):
        ...         return {"b": self.batch_of_ones(self.group.matrix_shape[0], device=device)}
        ...     def apply(self, state, x):
        ...         return state["b"][:, :, None] * x  # (count, m, 1) * (count, m, n)
        ...     def project(self, state, bounds):
        ...         return {"b": state["b"].clamp(*bounds)}
        >>> verify_structure(Rows)
        >>> geometry = llqr.LLQR(Rows)
    """

    name: ClassVar[str]
    trainable: ClassVar[tuple[str, ...]]
    linear: ClassVar[bool] = False
    cut: ClassVar[CutRule]
    elementwise: ClassVar[bool] = False
    rotates: ClassVar[bool] = False
    basis_entries: ClassVar[tuple[str, ...]] = ()
    renews_bases: ClassVar[bool] = False

    def __init__(self, group: Group) -> None:
        self.group = group
        self.count = len(group.blocks)

    # -- what a subclass writes ----------------------------------------------------------------

    @abstractmethod
    def identity(self, device: torch.device) -> State:
        """Return the state at which U is the identity."""

    @abstractmethod
    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return U x for the group's view x of a flat vector: (count, *shape), or one flat run.

        x is not to be written to; the result may be x itself.
        """

    @abstractmethod
    def project(self, state: State, bounds: Bounds) -> State:
        """Return a near state with bounds[0] I <= U <= bounds[1] I."""

    # -- what has a general form ---------------------------------------------------------------

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return the gradient of <r, U x> in the trainable entries; by default from autograd."""
        if not self.trainable:
            return {}
        with torch.enable_grad():
            free = {k: state[k].detach().requires_grad_() for k in self.trainable}
            value = (r * self.apply({**state, **free}, x)).sum()
            gradients = torch.autograd.grad(value, list(free.values()))
        return dict(zip(free, gradients, strict=True))

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest eigenvalue of each block, (count,) each.

        By default from :meth:`apply`: as explicit matrices; if large, or not ``exact``, by Lanczos.
        """
        like = next(iter(state.values()))
        if self.group.shape is not None:
            batch = like.new_empty(self.count, *self.group.shape)
            return extremes_of_operator(lambda x: self.apply(state, x), batch, exact)
        ends, start = [], 0
        for length in self.group.lengths:  # blocks of any length, one after the other
            block = slice(start, start + length)

            def apply_to_block(x: Tensor, block: slice = block) -> Tensor:
                flat = like.new_zeros(self.group.numel)
                flat[block] = x[0]
                return self.apply(state, flat)[None, block]

            ends.append(extremes_of_operator(apply_to_block, like.new_empty(1, length), exact))
            start += length
        return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])

    def estimate_bytes(self) -> int:
        """Return what :meth:`extreme_eigenvalues` takes at a time for a report."""
        return 0

    def inner_step(self, state: State, x: Tensor) -> InnerStep:
        """Return the steps of the inner solve from a state, for the gradient x."""
        return InnerStep(self, state, x)

    def renew_bases(self, state: State, x: Tensor, first: bool, renew: bool) -> State:
        """Return the state after a refresh saw the gradient x; bases may follow it.

        Args:
            state: the present state.
            x: the gradient.
            first: whether no gradient was seen before.
            renew: whether the bases are renewed now, not only their averages.
        """
        return state

    def floor_entries(self, state: State) -> State:
        """Return the state as the authors' code bounds it when U is otherwise unconstrained."""
        return state

    def applied_form(self, state: State, application: Application) -> State:
        """Return what :meth:`apply` takes in place of the state in a step, if that is faster.

        It is made anew after each refresh, and no part of a checkpoint.
        """
        return state

    # -- in the coordinates of the bases -------------------------------------------------------

    def with_orthogonal_bases(self, state: State) -> State:
        """Return a state in which :meth:`rotate` keeps lengths, if this one's bases are skewed."""
        return state

    def rotate(self, state: State, x: Tensor) -> Tensor:
        """Return x in orthonormal coordinates in which U is simple; those of linear ones stay."""
        return x

    def rotate_back(self, state: State, x: Tensor) -> Tensor:
        """Undo :meth:`rotate`."""
        return x

    def act_rotated(self, state: State, x: Tensor) -> Tensor:
        """Return U x, with x and U x in rotated coordinates."""
        return self.apply(state, x)

    def pull_rotated(self, x: Tensor, r: Tensor) -> State:
        """Return the pullback of r at x, both rotated; it depends on no state if U is linear."""
        blank = self.identity(x.device)
        return self.pullback({k: blank[k].to(x.dtype) for k in self.trainable}, x, r)

    def kernel_product(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write K r = U[pullback of r at x] x: what U x changes by along the pullback of r.

        Args:
            x: the gradient, rotated.
            r: a residual, rotated.
            out: where K r goes; may be r.
        """
        out.copy_(self.act_rotated(self.pull_rotated(x, r), x))

    # -- elementwise structures ----------------------------------------------------------------

    def scale_tensors(self, state: State, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """Return U x for tensors shaped like the parameters, one per slice of the group."""
        slices = [s for s, _ in self.group.slice_offsets]
        first = next(x for x in tensors if x is not None)
        flat = torch.cat([
            first.new_zeros(s.numel) if x is None else x.reshape(-1)
            for s, x in zip(slices, tensors, strict=True)
        ])  # fmt: skip
        runs = torch.split(self.apply(state, flat), [s.numel for s in slices])
        pairs = zip(runs, tensors, strict=True)
        return [None if x is None else run.view(x.shape) for run, x in pairs]

    # -- how a state is laid out ---------------------------------------------------------------

    @classmethod
    def variant(cls, *, bases: str, constraint: str) -> type[Structure]:
        """Return the class that stands for this structure under two settings of LLQR.

        Raises:
            ValueError: the structure has no form under them.
        """
        if constraint == "square":
            raise ValueError(
                "constraint: 'square' is the authors' psd-e-kfac and defined only for 'e-kfac', "
                f"got structure {cls.name!r}"
            )
        return cls

    @classmethod
    def count_stored(cls, block: Block, shape: tuple[int, ...] | None) -> int:
        """Return how many scalars U stores for a block."""
        state = cls(Group(cls, shape, torch.float32, [block])).identity(torch.device("meta"))
        return sum(v.numel() for v in state.values())

    def split_by_block(self, entries: State) -> list[Tensor]:
        """Return one view per entry and block, the unit of the inner gradient's clip."""
        return [part for tensor in entries.values() for part in self._split_entry(tensor)]

    def rows_per_block(self, entry: Tensor) -> list[Tensor]:
        """Return matrix views of a state entry, one row per block, equal blocks together."""
        if self.elementwise:
            return self.group.split_equal_runs(entry)
        return [entry.view(len(entry), -1)]

    def states_of_blocks(self, state: State) -> list[State]:
        """Return views of the state, one dict per block."""
        split = {k: self._split_entry(v) for k, v in state.items()}
        return [{k: parts[i] for k, parts in split.items()} for i in range(self.count)]

    def _split_entry(self, entry: Tensor) -> Sequence[Tensor]:
        """Return one view per block: a row, or of an elementwise structure the block's run."""
        return torch.split(entry, self.group.lengths) if self.elementwise else entry.unbind(0)

    def batch_of_ones(self, *shape: int, device: torch.device) -> Tensor:
        """Return ones of shape (count, *shape)."""
        return torch.ones(self.count, *shape, dtype=self.group.dtype, device=device)

    def batch_of_identities(self, n: int, device: torch.device) -> Tensor:
        """Return identity matrices, (count, n, n)."""
        return torch.eye(n, dtype=self.group.dtype, device=device).repeat(self.count, 1, 1)
