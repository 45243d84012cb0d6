"""The space of flat vectors: inner products and combinations, block by block, over all shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._devices import widen
from ..._vectors import dots, dots_of_runs
from ...distributed import Ranks
from ._blocks import Group

__all__ = ["FlatSpace"]


class FlatSpace:
    """What a solve needs to know of flat vectors, without names, ranks or dtypes.

    Where U is sharded, the vectors of each process are its shard, and all numbers returned here
    are of the whole vectors, equal in all processes.

    Args:
        groups: the groups of blocks of this process.
        block_count: the number of blocks of all processes.
        dtype: of the vectors.
        rounding: relative error to expect in an inner product of gradients and products.
        ranks: the processes that hold a shard each; None: this one holds everything.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        block_count: int,
        dtype: torch.dtype,
        rounding: float,
        ranks: Ranks | None,
    ) -> None:
        self.block_count, self.dtype, self.rounding = block_count, dtype, rounding
        self._ranks = ranks
        self._equal_runs = [run for group in groups for run in group.equal_runs]
        self._held_blocks = [block.index for group in groups for block in group.blocks]

    @property
    def sharded(self) -> bool:
        """Whether several processes hold a shard of each vector."""
        return self._ranks is not None

    def sum_over_shards(self, x: Tensor) -> Tensor:
        """Add up over the processes that hold shards (in place)."""
        return x if self._ranks is None else self._ranks.sum_(x)

    def agree_on(self, good: bool) -> bool:
        """Tell whether something holds in every process."""
        return good if self._ranks is None else self._ranks.all(good)

    def widest_ranges(
        self, ranges: dict[str, tuple[float, float]], names: Sequence[str]
    ) -> dict[str, tuple[float, float]]:
        """Return the least and greatest values per name in any process, in the order of names."""
        if self._ranks is None:
            return {name: ranges[name] for name in names if name in ranges}
        nothing = (math.inf, -math.inf)  # of a layer that this process has no block of
        ends = [ranges.get(name, nothing) for name in names]
        return dict(zip(names, self._ranks.ranges(ends), strict=True))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of two flat vectors, or of a matrix's rows with one."""
        return self.sum_over_shards(dots(a, b))

    def dots_per_block(self, rows: Tensor, b: Tensor) -> Tensor:
        """Return each block's part in the inner products of (k, P) rows with b: (blocks, k)."""
        parts, start = [widen(rows.new_zeros(0, len(rows)))], 0
        for many, length in self._equal_runs:
            stop = start + many * length
            parts.append(dots_of_runs(rows[:, start:stop], b[start:stop], length))
            start = stop
        return self.sum_per_block(torch.cat(parts))

    def sum_per_block(self, values: Tensor) -> Tensor:
        """Add up the values of this process's blocks over all that hold a part of a block."""
        if self._ranks is None:
            return values
        # A block may lie in several processes (elementwise) or in one: add up by its index.
        whole = values.new_zeros(self.block_count, *values.shape[1:])
        whole[self._held_blocks] = values
        return self._ranks.sum_(whole)

    def add_combination(self, coefficients: Tensor, rows: Tensor, out: Tensor) -> None:
        """Add to ``out`` the rows with coefficients per block: (blocks, k) and (k, P)."""
        if self._ranks is not None:
            coefficients = coefficients[self._held_blocks]
        first = start = 0
        for many, length in self._equal_runs:
            stop, last = start + many * length, first + many
            a, c, v = rows[:, start:stop], coefficients[first:last], out[start:stop]
            if many == 1:  # (k, length)' @ (k,)
                v.addmv_(a.mT, c[0])
            else:
                # (many, 1, k) @ (many, k, length): equal blocks in one batch
                a = a.view(len(rows), many, length).transpose(0, 1)
                v.view(many, 1, length).baddbmm_(c[:, None, :], a)
            start, first = stop, last
