"""Lanczos with full orthogonalisation and thick restarts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._vectors import dots

__all__ = ["LanczosBasis", "orthogonalise"]

#: Columns that are combined at a time, so that a restart needs no second basis.
CHUNK = 2**16


def orthogonalise(w: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """Take from w its part in the span of orthonormal rows, in place.

    Args:
        w: (P,).
        rows: (k, P).

    Returns:
        The coefficients of that part, (k,), and the norm of the rest, 0 if that is rounding.
    """
    before = _norm(w)
    h = w.new_zeros(len(rows))
    # Twice is enough: the first time leaves rounding that is large beside a small rest.
    for _ in range(2 if len(rows) else 0):
        c = dots(rows, w).to(w.dtype)
        w.addmv_(rows.mT, c, alpha=-1)
        h += c
    rest = _norm(w)
    return h, rest if rest > 10 * torch.finfo(w.dtype).eps * before else 0.0


def _norm(v: Tensor) -> float:
    return math.sqrt(dots(v, v))


class LanczosBasis:
    r"""An orthonormal basis Q in which a symmetric C is almost H.

    .. math:: C Q^\top = Q^\top H + \beta\, q_{j+1} e_j^\top

    Q holds rows here. H is not only tridiagonal: a restart leaves Ritz vectors, whose coupling to
    the next direction full orthogonalisation finds by itself (Wu and Simon, 2000).

    Args:
        product: v -> C v.
        start: the first direction, (P,), not zero.
        capacity: how many directions are kept at most.
        draw: gives random directions to go on with when C maps the basis into itself.
        negligible: beta that counts as zero, relative to the longest image of a direction.

    Attributes:
        rows: (capacity + 1, P); the first ``size`` are Q, the next one is the next direction.
        size: j.
        H: (capacity, capacity) in float64 on the CPU, of which (size, size) is filled.
        rest: beta.
        breakdowns: how often C mapped the basis into itself.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        start: Tensor,
        capacity: int,
        draw: Callable[[], Tensor] | None = None,
        negligible: float = 0.0,
    ) -> None:
        self._product, self._draw, self._negligible = product, draw, negligible
        self._longest = 0.0
        self.capacity = min(capacity, len(start))
        self.rows = start.new_empty(self.capacity + 1, len(start))
        self.rows[0] = start / _norm(start)
        self.H = torch.zeros(self.capacity, self.capacity, dtype=torch.float64, device="cpu")
        self.size, self.rest, self.breakdowns = 0, 0.0, 0

    def expand(self) -> None:
        """Take in one more direction, by one product."""
        j = self.size
        if j and not self.rest:
            self.rows[j] = self._random_outside()
        w = self._product(self.rows[j])
        h, self.rest = orthogonalise(w, self.rows[: j + 1])
        self.H[j, : j + 1] = self.H[: j + 1, j] = h.to(self.H)
        self.size = j + 1
        self._longest = max(self._longest, math.hypot(float(h.norm()), self.rest))
        if self.size == w.numel() or self.rest <= self._negligible * self._longest:
            self.rest = 0.0
        if self.rest:
            self.rows[j + 1] = w / self.rest
        else:
            self.breakdowns += 1

    def _random_outside(self) -> Tensor:
        """Return a random unit vector outside the basis."""
        assert self._draw is not None
        while True:
            w = self._draw()
            _, rest = orthogonalise(w, self.rows[: self.size])
            if rest:
                return w / rest

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of H, ascending, and its eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.H[: self.size, : self.size])
        return values, vectors

    def residuals(self, vectors: Tensor) -> Tensor:
        """Return the norms of C v - theta v of Ritz vectors: beta times their last entries."""
        return self.rest * vectors[-1].abs()

    def restart(self, values: Tensor, vectors: Tensor, kept: Sequence[int]) -> None:
        """Keep only these Ritz vectors, and the next direction.

        Args:
            values: of :meth:`ritz`.
            vectors: of :meth:`ritz`.
            kept: which of them.
        """
        many, index = len(kept), list(kept)
        turn = vectors[:, index].mT.to(self.rows)  # (many, size)
        for part in torch.split(self.rows, CHUNK, 1):
            part[:many] = turn @ part[: self.size]
        self.rows[many] = self.rows[self.size]
        self.H.zero_()
        self.H[range(many), range(many)] = values[index]
        self.size = many
