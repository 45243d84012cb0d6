"""Diagonal H: squared error, binary cross-entropy, Poisson and every other loss per entry."""

from __future__ import annotations

from torch import Tensor

from ._base import IndefiniteHessian, Probes, SquareRoot

__all__ = ["DiagonalRoot"]


class DiagonalRoot(SquareRoot):
    """The square root of a diagonal H: the roots of its entries.

    Args:
        diagonal: H 1, shaped like z.
    """

    def __init__(self, diagonal: Tensor) -> None:
        self._root = diagonal.sqrt()

    @classmethod
    def recognise(cls, z: Tensor, probes: Probes) -> SquareRoot | None:
        """Return F if H v = (H 1) o v."""
        h = probes.ones
        largest = float(h.abs().max()) if h.numel() else 0.0
        expected = h * probes.v
        allowed = probes.tolerance * expected.abs() + 8 * probes.eps * largest
        if not bool(((probes.image - expected).abs() <= allowed).all()):
            return None
        least = float(h.min()) if h.numel() else 0.0
        if least < -probes.tolerance * largest:
            raise IndefiniteHessian(least)
        return cls(h.clamp(min=0))

    def product(self, e: Tensor) -> Tensor:
        """Return sqrt(H 1) o e."""
        return self._root * e
