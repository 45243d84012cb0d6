"""A growing stack of flat vectors, kept as a few matrices so that products with it are GEMVs.

And their inner products, which are sums of millions of terms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Rows", "bordered", "dots", "dots_of_runs"]

#: The longest sum that is left to one matrix product.
PIECE = 2**8

#: Numbers that are copied to float64 rather than summed in their own precision.
SHORT = 2**16

#: Vectors that memory is taken for at a time.
CHUNK = 4


def dots(rows: Tensor, v: Tensor) -> Tensor:
    """Return the inner products of a vector, or of the rows of a matrix, with a vector, in float64.

    In pieces: of 5 million terms of one sign in float32, torch's dot and GEMV on a CPU get three
    or four digits right, and a basis orthogonalised by those falls apart within ten vectors. In
    pieces it is nine, in the same time.
    """
    matrix, whole = rows if rows.dim() == 2 else rows[None], len(v) - len(v) % PIECE
    total = torch.mv(matrix[:, whole:].double(), v[whole:].double())
    if whole:
        total += dots_of_runs(matrix[:, :whole], v[:whole], PIECE).sum(0)
    return total if rows.dim() == 2 else total[0]


def dots_of_runs(rows: Tensor, v: Tensor, length: int) -> Tensor:
    """Return, for each run of ``length`` entries, its share of the rows' inner products with v.

    Args:
        rows: (k, P), with P a multiple of ``length``.
        v: (P,).
        length: of a run.

    Returns:
        (P / length, k), in float64.
    """
    many, piece = len(v) // length, _piece(length)
    if piece is None:
        pairs = zip(torch.split(rows, length, 1), torch.split(v, length), strict=True)
        return torch.stack([dots(a, b) for a, b in pairs])
    if piece < length:
        return dots_of_runs(rows, v, piece).view(many, length // piece, len(rows)).sum(1)
    if rows.numel() <= SHORT:
        rows, v = rows.double(), v.double()
    # The vector as a row: with it as a column a batch of GEMVs takes five times as long.
    columns = rows.view(len(rows), many, length).permute(1, 2, 0)
    return torch.bmm(v.view(many, 1, length), columns)[:, 0].double()


@cache
def _piece(length: int) -> int | None:
    """Return the longest divisor of a length that is neither more than a PIECE nor very short."""
    if length <= PIECE:
        return length
    return next((d for d in range(PIECE, PIECE // 16, -1) if length % d == 0), None)


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

    def append(self) -> Tensor:
        """Add a vector and return it, uninitialised, to be written in place."""
        if not self._chunks or self._used == len(self._chunks[-1]):
            size = min(CHUNK, self._capacity - self.count)
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

    def each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Join what a function of a (k, P) matrix gives for all vectors, along the last dimension.

        There must be at least one vector.
        """
        parts = [function(matrix) for matrix in self.matrices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def subtract(self, c: Tensor, target: Tensor) -> None:
        """Subtract the combination with coefficients ``c`` (a prefix of the rows) from a vector."""
        start, c = 0, c.to(target.dtype)
        for matrix in self.matrices(len(c)):
            target.addmv_(matrix.mT, c[start : start + len(matrix)], alpha=-1)
            start += len(matrix)


def bordered(matrix: Tensor, border: Tensor) -> Tensor:
    """Append a row and column to symmetric matrices (the border has the corner last)."""
    larger = pad(matrix, (0, 1, 0, 1))
    larger[..., -1, :] = larger[..., :, -1] = border
    return larger
