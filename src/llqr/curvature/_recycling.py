"""Curvature products, recycled: the directions of an inner solve span very little."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        gradient: Tensor,
        tolerance: float,
        capacity: int = 64,
    ) -> None:
        self._product, self._gradient, self._tolerance = product, gradient, tolerance
        self._capacity = capacity
        self._size = 0
        self._largest = 0.0
        self._q = gradient.new_empty(0, gradient.numel())
        self._w = gradient.new_empty(0, gradient.numel())

    def __call__(self, d: Tensor) -> Tensor:
        """Return C d, exactly if a real product was spent, else within the tolerance."""
        q, w = self._q[: self._size], self._w[: self._size]
        c = q @ d
        r = d - c @ q
        # A second pass: in float32 one leaves the residual visibly oblique to the basis.
        again = q @ r
        r, c = r - again @ q, c + again
        known = c @ w
        norm, target = torch.stack([r.norm(), (self._gradient + known).norm()]).tolist()
        if norm == 0.0 or (self._size and self._largest * norm <= self._tolerance * target):
            return known
        direction = r / norm
        image = self._product(direction)
        self._largest = max(self._largest, float(image.norm()))
        if self._size < self._capacity:
            self._append(direction, image)
        return torch.add(known, image, alpha=norm)

    def _append(self, direction: Tensor, image: Tensor) -> None:
        if self._size == len(self._q):
            room = min(self._capacity, max(4, 2 * self._size)) - self._size
            extra = self._q.new_empty(room, self._q.shape[1])
            self._q = torch.cat([self._q, extra])
            self._w = torch.cat([self._w, extra])
        self._q[self._size], self._w[self._size] = direction, image
        self._size += 1
