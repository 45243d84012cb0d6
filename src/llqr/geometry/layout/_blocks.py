"""The parts that parameters are cut into: slices, blocks of slices, groups of equal blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "Block",
    "BlockKind",
    "CutRule",
    "Group",
    "MatrixView",
    "PlannedBlock",
    "Slice",
    "group_equal_blocks",
]

#: How a layer is cut into blocks of one kind: the whole layer is one block; its entries are one
#: flat run, cut into runs of at most ``block_size``; or each parameter's matrix view is cut into
#: rectangles with sides of at most ``block_size``.
CutRule = Literal["layer", "runs", "rectangles"]


class BlockKind(Protocol):
    """What a layout asks of a structure of U (see :class:`llqr.geometry.structures.Structure`)."""

    @property
    def name(self) -> str:
        """The name in messages and summaries."""
        ...

    @property
    def cut(self) -> CutRule:
        """How a layer is cut into blocks."""
        ...

    @property
    def elementwise(self) -> bool:
        """Whether a block acts entry by entry, so that several processes may hold parts of it."""
        ...

    def count_stored(self, block: Block, shape: tuple[int, ...] | None) -> int:
        """Return how many scalars U stores for a block."""
        ...


@dataclass(frozen=True)
class MatrixView:
    """How one parameter is read as a matrix, and a matrix written back as the parameter."""

    shape: tuple[int, ...]
    matrix: tuple[int, int] | None
    transposed: bool = False

    def read_matrix(self, tensor: Tensor) -> Tensor:
        """Return the matrix view (a copy only if the strides force one)."""
        if self.shape == self.matrix and not self.transposed:  # as of most linear layers
            return tensor
        assert self.matrix is not None
        return (tensor.transpose(0, 1) if self.transposed else tensor).reshape(self.matrix)

    def write_matrix(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` shaped like the parameter, sharing its memory."""
        if not self.transposed:
            return matrix.reshape(self.shape)
        # A transposed convolution is stored (in, out, kernel), its matrix is (out, in * kernel).
        swapped = (self.shape[1], self.shape[0], *self.shape[2:])
        return matrix.reshape(swapped).transpose(0, 1)


@dataclass(frozen=True)
class Slice:
    """A part of one parameter: a rectangle of its matrix view, or a run of its flat entries."""

    name: str
    rows: tuple[int, int] | None
    columns: tuple[int, int]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The extent of the slice: (m, n) for a rectangle, (n,) for a run."""
        n = self.columns[1] - self.columns[0]
        return (n,) if self.rows is None else (self.rows[1] - self.rows[0], n)

    @property
    def place(self) -> tuple[int, int]:
        """Where it starts: (row, column), in the order in which a parameter's entries lie."""
        return 0 if self.rows is None else self.rows[0], self.columns[0]

    @cached_property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def cut_from(self, tensor: Tensor, view: MatrixView) -> Tensor:
        """Return the slice of a tensor shaped like the parameter."""
        a, b = self.columns
        if self.rows is None:  # a run of the flat entries
            return tensor.reshape(-1)[a:b]
        matrix = view.read_matrix(tensor)
        # Of a whole one the slice is left out: it takes as long as a small product.
        return matrix if self.shape == view.matrix else matrix[slice(*self.rows), a:b]


@dataclass(frozen=True)
class Block:
    """One diagonal block of U: the slices that it acts on, in the order of its flat vector.

    ``number`` counts the blocks that start in the same parameter. It names the block in exported
    states, and so depends on nothing but the parameters of its layer. ``index`` counts all blocks;
    the parts of a block that several processes hold keep its index.
    """

    layer: str
    slices: tuple[Slice, ...]
    number: int = 0
    index: int = 0

    @cached_property
    def numel(self) -> int:
        """The number of gradient entries that the block acts on."""
        return sum(part.numel for part in self.slices)


@dataclass
class Group:
    """Blocks of one kind, held together in one contiguous run of the flat vector.

    Blocks cut as rectangles or runs have one ``shape`` in a group and are a (count, *shape) view;
    all others are of any length and stay one flat run. What follows from the blocks is computed
    once, when they are all there.
    """

    kind: BlockKind
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    blocks: list[Block] = field(default_factory=list)
    start: int = 0

    @cached_property
    def numel(self) -> int:
        """The number of gradient entries of the group."""
        return sum(block.numel for block in self.blocks)

    @cached_property
    def lengths(self) -> list[int]:
        """The number of gradient entries of each block."""
        return [block.numel for block in self.blocks]

    @cached_property
    def equal_runs(self) -> list[tuple[int, int]]:
        """The blocks as runs of equal length: (blocks, length) in order."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]

    @cached_property
    def slice_offsets(self) -> list[tuple[Slice, int]]:
        """The slices of all blocks, each with where it starts in the group."""
        slices = [part for block in self.blocks for part in block.slices]
        starts = accumulate((part.numel for part in slices), initial=0)
        return list(zip(slices, starts, strict=False))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The (rows, columns) of blocks that are cut as rectangles."""
        assert self.shape is not None and len(self.shape) == 2
        return self.shape[0], self.shape[1]

    def split_equal_runs(self, part: Tensor) -> list[Tensor]:
        """Return the group's part of a flat vector as (blocks, length) views, one per run."""
        sizes = [count * length for count, length in self.equal_runs]
        pieces = torch.split(part.reshape(-1), sizes)
        return [p.view(run) for p, run in zip(pieces, self.equal_runs, strict=True)]

    def view_of(self, flat: Tensor) -> Tensor:
        """Return the group's part of a flat vector, without a copy."""
        return self.shape_blocks(flat[self.start : self.start + self.numel])

    def read_from(self, flat: Tensor) -> Tensor:
        """Return the group's part of a flat vector in the group's dtype."""
        return self.view_of(flat).to(self.dtype)

    def shape_blocks(self, part: Tensor) -> Tensor:
        """Return the group's part of a flat vector as a batch of blocks, (count, *shape)."""
        return part if self.shape is None else part.view(len(self.blocks), *self.shape)

    def split_slices(self, batch: Tensor) -> Sequence[Tensor]:
        """Return views of the slices of blocks that lie side by side, as :meth:`shape_blocks`."""
        parts = [part for part, _ in self.slice_offsets]
        if self.shape is not None and len(parts) == len(self.blocks):  # each block is one slice
            return batch.unbind(0)
        return torch.split(batch.reshape(-1), [part.numel for part in parts])

    def shape_samples(self, rows: Tensor) -> Tensor:
        """Return the group's part of several flat vectors as batches, (m, count, *shape)."""
        return rows if self.shape is None else rows.view(len(rows), len(self.blocks), *self.shape)


class PlannedBlock(NamedTuple):
    """A block, and what makes it equal to others: blocks of equal keys form a group."""

    kind: BlockKind
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    block: Block


def group_equal_blocks(plans: Sequence[PlannedBlock]) -> list[Group]:
    """Gather blocks in groups, one behind the other in a flat vector, equal lengths together."""
    groups: dict[tuple[BlockKind, tuple[int, ...] | None, torch.dtype], Group] = {}
    # By length, so that equal blocks lie together and are one batch (the sort is stable).
    for kind, shape, dtype, block in sorted(plans, key=lambda plan: plan.block.numel):
        groups.setdefault((kind, shape, dtype), Group(kind, shape, dtype)).blocks.append(block)
    start = 0
    for group in groups.values():
        group.start, start = start, start + group.numel
    return list(groups.values())
