"""A growing stack of flat vectors, kept as a few matrices so that products with it are GEMVs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._allocations import bytes_of

__all__ = ["JoinedRows", "Rows", "append_border", "rows_allocated"]

#: Vectors that memory is allocated for at first, and then at a time. Longer ones stand alone: of
#: them memory is scarce, and the calls cost nothing.
FIRST, NEXT = 4, 2
SHORT_BYTES = 2**18


class Rows:
    """Up to ``capacity`` vectors of one length, in chunks of a few (nothing is ever copied)."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        self._like, self._capacity = like, capacity
        self._chunks: list[Tensor] = []
        self._used = 0  # rows of the last chunk that are filled
        self.count = 0

    @property
    def full(self) -> bool:
        """True when no vector can be added."""
        return self.count >= self._capacity

    def append_row(self) -> Tensor:
        """Add a vector and return it, uninitialised, to be written in place."""
        if not self._chunks or self._used == len(self._chunks[-1]):
            size = rows_at_a_time(self.count, self._capacity, bytes_of(self._like))
            self._chunks.append(self._like.new_empty(size, self._like.numel()))
            self._used = 0
        # Views of the chunk: the vectors stay where they were written.
        row = self._chunks[-1][self._used]
        self._used += 1
        self.count += 1
        return row

    def take(self, vector: Tensor) -> Tensor:
        """Add a vector that nobody changes any more, and return it; a long one is not copied."""
        size = bytes_of(vector)
        alone = rows_at_a_time(0, 2, size) == 1
        if alone and vector.dtype == self._like.dtype and vector.untyped_storage().nbytes() == size:
            return self.adopt(vector)
        return self.append_row().copy_(vector)

    def keep_first(self, count: int) -> None:
        """Let go of all vectors but the first ones, and of chunks with none of those."""
        kept = self.matrices(count)
        self._chunks, self.count = self._chunks[: len(kept)], min(count, self.count)
        self._used = len(kept[-1]) if kept else 0

    def adopt(self, vector: Tensor) -> Tensor:
        """Add a vector as it lies, without a copy, and return it."""
        self._chunks.append(vector[None])
        self._used = 1
        self.count += 1
        return vector

    def matrices(self, count: int | None = None) -> list[Tensor]:
        """Return the first ``count`` vectors (all) as a list of matrices."""
        left, found = self.count if count is None else min(count, self.count), []
        for chunk in self._chunks:
            if left > 0:
                found.append(chunk[:left])
                left -= len(found[-1])
        return found

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], count: int | None = None
    ) -> Tensor:
        """Join what a function of a (k, P) matrix gives, along the last dimension.

        For the first ``count`` vectors (all), of which there must be one.
        """
        parts = [function(matrix) for matrix in self.matrices(count)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def subtract_combination(self, c: Tensor, target: Tensor) -> None:
        """Subtract the combination with coefficients ``c`` (a prefix of the rows) from a vector."""
        start, c = 0, c.to(target.dtype)
        for matrix in self.matrices(len(c)):  # (k, P)' @ (k,), one GEMV per chunk
            target.addmv_(matrix.mT, c[start : start + len(matrix)], alpha=-1)
            start += len(matrix)


def rows_at_a_time(count: int, capacity: int, size: int) -> int:
    """Return for how many more vectors of ``size`` bytes memory is allocated at a time."""
    if size > SHORT_BYTES:
        return 1
    return min(NEXT if count else FIRST, capacity - count)


def rows_allocated(count: int, capacity: int, size: int) -> int:
    """Return how many vectors :class:`Rows` has memory for when it holds ``count``."""
    allocated = 0
    while allocated < count:
        allocated += rows_at_a_time(allocated, capacity, size)
    return allocated


class JoinedRows(Rows):
    """The vectors of two stacks as one, without a copy; the second one may grow."""

    def __init__(self, first: Rows, second: Rows) -> None:
        self._first, self._second = first, second

    def matrices(self, count: int | None = None) -> list[Tensor]:
        """Return the first ``count`` vectors (all) as a list of matrices."""
        left = None if count is None else max(count - self._first.count, 0)
        return self._first.matrices(count) + self._second.matrices(left)


def append_border(matrix: Tensor, border: Tensor) -> Tensor:
    """Append a row and column to symmetric matrices (the border has the corner last)."""
    larger = pad(matrix, (0, 1, 0, 1))
    larger[..., -1, :] = larger[..., :, -1] = border
    return larger
