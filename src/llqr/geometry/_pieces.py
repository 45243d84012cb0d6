"""The parts that parameters are cut into: pieces, blocks of pieces, groups of equal blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ELEMENTWISE", "Block", "Group", "Piece", "Plan", "View", "grouped"]

#: Kinds of blocks that act entry by entry.
ELEMENTWISE = ("identity", "diagonal", "vector")


@dataclass(frozen=True)
class View:
    """How one parameter is read as a matrix, and a matrix written back as the parameter."""

    shape: tuple[int, ...]
    matrix: tuple[int, int] | None
    transposed: bool = False

    def read(self, tensor: Tensor) -> Tensor:
        """Return the matrix view (a copy only where strides force one)."""
        assert self.matrix is not None
        return (tensor.transpose(0, 1) if self.transposed else tensor).reshape(self.matrix)

    def write(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` shaped like the parameter, sharing its memory."""
        if not self.transposed:
            return matrix.reshape(self.shape)
        swapped = (self.shape[1], self.shape[0], *self.shape[2:])
        return matrix.reshape(swapped).transpose(0, 1)


@dataclass(frozen=True)
class Piece:
    """A part of one parameter: a rectangle of its matrix view, or a run of its flat entries."""

    name: str
    rows: tuple[int, int] | None
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent of the piece: (m, n) for a rectangle, (n,) for a run."""
        n = self.columns[1] - self.columns[0]
        return (n,) if self.rows is None else (self.rows[1] - self.rows[0], n)

    @cached_property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def of(self, tensor: Tensor, view: View) -> Tensor:
        """Cut the piece out of a tensor shaped like the parameter."""
        a, b = self.columns
        if self.rows is None:
            return tensor.reshape(-1)[a:b]
        return view.read(tensor)[self.rows[0] : self.rows[1], a:b]


@dataclass(frozen=True)
class Block:
    """One diagonal block of U: the pieces that it acts on, in the order of its flat vector.

    ``number`` counts the blocks that start in the same parameter. It names the block in exported
    states, and so depends on nothing but the parameters of its layer. ``leaf`` counts all blocks;
    the parts of a block that several processes share keep its leaf.
    """

    layer: str
    pieces: tuple[Piece, ...]
    number: int = 0
    leaf: int = 0

    @cached_property
    def numel(self) -> int:
        """The number of gradient entries that the block acts on."""
        return sum(piece.numel for piece in self.pieces)


@dataclass
class Group:
    """Blocks of one structure, held together in one contiguous run of the flat vector.

    Kronecker and dense blocks of a group have one ``shape`` and are a (count, *shape) view;
    elementwise, scalar and identity blocks are of any length and stay one flat run. "vector" is
    the elementwise structure of a 1-D parameter in a Kronecker layer. What follows from the blocks
    is computed once, when they are all there.
    """

    structure: str
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
    def runs(self) -> list[tuple[int, int]]:
        """The blocks as runs of equal length: (blocks, length) in order."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]

    @cached_property
    def places(self) -> list[tuple[Piece, int]]:
        """The pieces of all blocks, each with where it starts in the group."""
        pieces = [piece for block in self.blocks for piece in block.pieces]
        starts = accumulate((piece.numel for piece in pieces), initial=0)
        return list(zip(pieces, starts, strict=False))

    def matrices(self, part: Tensor) -> list[Tensor]:
        """Return the group's part of a flat vector as (blocks, length) views, one a run."""
        sizes = [count * length for count, length in self.runs]
        pieces = torch.split(part.reshape(-1), sizes)
        return [p.view(run) for p, run in zip(pieces, self.runs, strict=True)]

    def view(self, flat: Tensor) -> Tensor:
        """Return the group's part of a flat vector, without a copy."""
        return self.shaped(flat[self.start : self.start + self.numel])

    def own(self, flat: Tensor) -> Tensor:
        """Return the group's part of a flat vector in the group's dtype."""
        return self.view(flat).to(self.dtype)

    def shaped(self, part: Tensor) -> Tensor:
        """Return the group's own flat vector as a batch of blocks, or as it is."""
        return part if self.shape is None else part.view(len(self.blocks), *self.shape)


class Plan(NamedTuple):
    """A block, and what makes it equal to others: blocks of equal keys form a group."""

    kind: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    block: Block


def grouped(plans: Sequence[Plan]) -> list[Group]:
    """Gather blocks in groups, one behind the other in a flat vector, equal lengths together."""
    groups: dict[tuple[str, tuple[int, ...] | None, torch.dtype], Group] = {}
    for kind, shape, dtype, block in sorted(plans, key=lambda plan: plan.block.numel):
        groups.setdefault((kind, shape, dtype), Group(kind, shape, dtype)).blocks.append(block)
    start = 0
    for group in groups.values():
        group.start, start = start, start + group.numel
    return list(groups.values())
