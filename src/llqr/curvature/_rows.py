"""A growing stack of flat vectors, kept as a few matrices so that products with it are GEMVs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Rows"]


class Rows:
    """Up to ``capacity`` vectors of one length, in chunks that double (nothing is ever copied)."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        self._like, self._capacity = like, capacity
        self._chunks: list[Tensor] = []
        self._used = 0  # rows of the last chunk that are filled
        self.count = 0

    @property
    def full(self) -> bool:
        """True when no vector can be added."""
        return self.count >= self._capacity

    def append(self) -> Tensor:
        """Add a vector and return it, uninitialised, to be written in place."""
        if not self._chunks or self._used == len(self._chunks[-1]):
            size = min(max(2, self.count), self._capacity - self.count)
            self._chunks.append(self._like.new_empty(size, self._like.numel()))
            self._used = 0
        row = self._chunks[-1][self._used]
        self._used += 1
        self.count += 1
        return row

    def matrices(self, count: int | None = None) -> list[Tensor]:
        """Return the first ``count`` vectors (all) as a list of matrices."""
        left, found = self.count if count is None else count, []
        for chunk in self._chunks:
            if left > 0:
                found.append(chunk[:left])
                left -= len(found[-1])
        return found

    def each(self, function: Callable[[Tensor], Tensor], count: int | None = None) -> Tensor:
        """Join what a function of a (k, P) matrix gives for all vectors, along the last dimension.

        There must be at least one vector.
        """
        parts = [function(matrix) for matrix in self.matrices(count)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def subtract(self, c: Tensor, target: Tensor) -> None:
        """Subtract the combination with coefficients ``c`` (a prefix of the rows) from a vector."""
        start = 0
        for matrix in self.matrices(len(c)):
            target.addmv_(matrix.mT, c[start : start + len(matrix)], alpha=-1)
            start += len(matrix)
