"""Curvature products, recycled: the directions of an inner solve span very little."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._rows import Rows, dots

__all__ = ["RecycledProduct"]


class RecycledProduct:
    r"""Answer C d from earlier products where that is accurate enough.

    Keep orthonormal :math:`q_i` with :math:`w_i = C q_i`. For a new direction
    :math:`d = Qc + r`,

    .. math:: C d = W c + |r| C(r / |r|),

    and the last term, one real product, is dropped when
    :math:`\lambda |r| \le \text{tolerance} \cdot |g + W c|` with :math:`\lambda` the largest
    :math:`|w_i|` seen. A real product extends the basis, so none is ever repeated.

    Args:
        product: the real product, flat vector to flat vector.
        gradient: g, the flat gradient that the products are added to.
        tolerance: relative error allowed in the residual g + C d, at least 1e-8.
        capacity: largest number of basis vectors kept (2 x capacity x P numbers); beyond it real
            products are spent on the residual and forgotten.
        dot: inner products of a vector, or of the rows of a matrix, with a vector.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        gradient: Tensor,
        tolerance: float,
        capacity: int = 64,
        dot: Callable[[Tensor, Tensor], Tensor] = dots,
    ) -> None:
        self._product, self._gradient, self._tolerance = product, gradient, tolerance
        self._dot = dot
        self._q, self._w = Rows(gradient, capacity), Rows(gradient, capacity)
        self._largest = gradient.new_zeros(())
        # Fresh memory for every answer would cost more than the arithmetic.
        self._rest, self._known, self._sum = (torch.empty_like(gradient) for _ in range(3))

    def __call__(self, d: Tensor) -> Tensor:
        """Return C d, exactly if a real product was spent, else within the tolerance.

        The result is the caller's to change, and lasts until the next call.
        """
        r, known = self._rest.copy_(d), self._known.zero_()
        # A second pass before a product is spent: in float32 one leaves the residual visibly
        # oblique to the basis, and what rounding left of the basis must not pass for something new.
        whole = self._dot(r, r)
        for _ in range(2):
            self._reduce(r, known)
            if self._negligible(r, known, whole):
                return known
        length = self._dot(r, r).sqrt()
        r.div_(length)
        image = self._product(r)
        self._largest = torch.maximum(self._largest, self._dot(image, image))
        if not self._q.full:
            self._q.append().copy_(r)
            self._w.append().copy_(image)
        return known.addcmul_(image, length)

    def _negligible(self, r: Tensor, known: Tensor, whole: Tensor) -> bool:
        """Tell whether the product of r, what is left of |d|^2 = whole, may be left out.

        One read from the device; all ranks read the same numbers, and so take the same branch.
        """
        target = torch.add(self._gradient, known, out=self._sum)
        rest, size, length, largest = torch.stack(
            [self._dot(r, r), self._dot(target, target), whole, self._largest]
        ).tolist()
        rounding = (32 * torch.finfo(r.dtype).eps) ** 2 * length
        known_enough = largest * rest <= self._tolerance**2 * size
        return bool(rest <= rounding or (self._q.count and known_enough))

    def _reduce(self, r: Tensor, known: Tensor) -> None:
        """Move the part of r inside the span to where its product is known."""
        if self._q.count:
            c = self._q.each(lambda q: self._dot(q, r))
            self._q.subtract(c, r)
            self._w.subtract(-c, known)
