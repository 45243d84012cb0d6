"""Curvature products, recycled: the directions of an inner solve span very little."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._devices import widen
from ..._vectors import dots
from ._rows import Rows, append_border

__all__ = ["RecycledProduct", "longest_negligible"]

TINY = torch.finfo(torch.float64).tiny


def longest_negligible(tolerance: float, a: Tensor, gram: Tensor, largest: float) -> float:
    """Return how long the part of a direction outside a basis may be, to be left out.

    Its image is at most ``largest`` times as long, and is what the residual sum_j a_j F_j lacks.

    Args:
        tolerance: relative error allowed in the residual.
        a: (k,) coefficients of the residual.
        gram: (k, k) inner products of the F_j.
        largest: length of the longest image of a direction of length one.
    """
    size = max(float(a @ gram @ a), 0.0)  # rounding may leave less where the terms cancel
    return tolerance * math.sqrt(size) / max(largest, TINY)


class RecycledProduct:
    r"""Answer C d from earlier products where that is accurate enough.

    Keep orthonormal :math:`q_i` with :math:`w_i = C q_i`. For a new direction
    :math:`d = Qc + r`,

    .. math:: C d = W c + |r| C(r / |r|),

    and the last term, one real product, is dropped when
    :math:`\lambda |r| \le \text{tolerance} \cdot |g + W c|` with :math:`\lambda` the largest
    :math:`|w_i|` seen (an estimate of the norm of C, from below). A real product extends the basis,
    so none is ever repeated. In float32 nothing is told from zero below 32 eps of d, so that a
    residual smaller than 32 eps / tolerance of C d is less exact than that.

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
        self._product, self._tolerance, self._dot = product, tolerance, dot
        #: The q_i, and the w_i.
        self.directions, self.images = Rows(gradient, capacity), Rows(gradient, capacity)
        self._gradient, self._eps = gradient, torch.finfo(gradient.dtype).eps
        self._largest = 0.0
        #: How many real products were computed.
        self.computed = 0
        # Inner products of g and the w_i: on the host, and the newest, which the next answer reads.
        self._gram = gradient.new_zeros(0, 0, device="cpu", dtype=torch.float64)
        self._newest = dot(gradient, gradient)[None]
        # Fresh memory for every answer would cost more than the arithmetic. A product gets it.
        self._known: Tensor | None = None
        self._rest: Tensor | None = None

    @property
    def full(self) -> bool:
        """True when no direction can be kept."""
        return self.directions.full

    def __call__(self, d: Tensor) -> Tensor:
        """Return C d, exactly if a real product was spent, else within the tolerance.

        The result is the caller's to change, and lasts until the next call.
        """
        whole, c = self._dot(d, d), self._coefficients_in_basis(d)
        known = self._combine_images(c)
        square, *host = self._read_from_device(whole, c)
        if not math.isfinite(square):  # nothing to be divided by, nor remembered
            return known.copy_(self._product(d))
        # From the coefficients alone first: most directions lie in the span by far.
        # What the vectors' rounding may hide in that difference counts as outside.
        outside = max(square - sum(x * x for x in host), 0.0) + 4 * self._eps * square
        if self.directions.count and math.sqrt(outside) <= self._allowed_outside(host):
            return known
        r = self._rest = (torch.empty_like(d) if self._rest is None else self._rest).copy_(d)
        self.directions.subtract_combination(c, r)
        # A second pass before a product is spent: in float32 one leaves the residual visibly
        # oblique to the basis, and what rounding left of the basis must not pass for something new.
        again = self._coefficients_in_basis(r)
        self.directions.subtract_combination(again, r)
        self.images.subtract_combination(-again, known)
        c = c + again
        outside, *host = self._read_from_device(self._dot(r, r), c)
        rest, rounding = math.sqrt(outside), 32 * self._eps * math.sqrt(square)
        if rest <= rounding or (self.directions.count and rest <= self._allowed_outside(host)):
            return known
        r.div_(rest)
        del known
        self.release_answer()
        image = self._product(r)
        self.computed += 1
        known = self._combine_images(c).add_(image, alpha=rest)
        self._append_direction(r, image)
        return known

    def remember(self, d: Tensor, image: Tensor) -> None:
        """Begin with a direction whose product C d is known; d is not zero."""
        square = self._read_from_device(self._dot(d, d), self._coefficients_in_basis(d))[0]
        self._append_direction(d / math.sqrt(square), image / math.sqrt(square))

    def keep_first(self, count: int) -> None:
        """Forget all but the first directions, whose memory others get."""
        self._read_from_device(self._newest.new_zeros(()), self._newest[:0])
        self.directions.keep_first(count)
        self.images.keep_first(count)
        self._gram = self._gram[: 1 + count, : 1 + count]
        self.release_answer()

    def release_answer(self) -> None:
        """Let go of the memory of the last answer."""
        self._rest = self._known = None

    def append_image(self) -> None:
        """Compute the product of the newest direction, which the caller wrote.

        It has length one and is orthogonal to those before it.
        """
        image = self._product(self.directions.matrices()[-1][-1])
        self.computed += 1
        self._read_from_device(self._newest.new_zeros(()), self._newest[:0])
        self._append_inner_products(image)
        self.images.take(image)

    def _combine_images(self, c: Tensor) -> Tensor:
        """Return W c, in the memory of the last answer."""
        known = self._known = (
            torch.empty_like(self._gradient) if self._known is None else self._known
        )
        self.images.subtract_combination(-c, known.zero_())
        return known

    def _coefficients_in_basis(self, v: Tensor) -> Tensor:
        """Return Q'v."""
        if not self.directions.count:
            return widen(v.new_zeros(0))
        return self.directions.map_matrices(lambda q: self._dot(q, v))

    def _allowed_outside(self, c: Sequence[float]) -> float:
        """Return how long the part of d outside the span may be.

        From numbers that all ranks read alike, so that all take the same branch.
        """
        a = self._gram.new_tensor([1.0, *c])
        return longest_negligible(self._tolerance, a, self._gram, self._largest)

    def _append_direction(self, q: Tensor, image: Tensor) -> None:
        """Remember a direction with its image, while there is room."""
        if self.directions.full:
            self._newest = self._dot(image, image)[None]
            return
        self._append_inner_products(image)
        self.directions.take(q)
        self.images.take(image)

    def _append_inner_products(self, image: Tensor) -> None:
        """Compute those of an image with g, the images so far and itself; read with the next."""
        w = self.images
        known = [w.map_matrices(lambda rows: self._dot(rows, image))] if w.count else []
        self._newest = torch.cat([
            self._dot(self._gradient, image)[None], *known, self._dot(image, image)[None]
        ])  # fmt: skip

    def _read_from_device(self, first: Tensor, others: Tensor) -> list[float]:
        """Return numbers of the device, and take in the newest inner products with them."""
        new = len(self._newest)
        values = torch.cat([self._newest, first[None], others]).cpu()
        if new > len(self._gram):
            self._gram = append_border(self._gram, values[:new])
        if new and self.directions.count:
            self._largest = max(self._largest, math.sqrt(float(values[new - 1])))
        self._newest = self._newest[:0]
        return values[new:].tolist()
