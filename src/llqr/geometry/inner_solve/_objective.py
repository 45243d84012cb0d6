"""What the inner solve minimises: J as a function of the state of U."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..._vectors import quadratic_value
from ..structures import BlockDiagonal, States

__all__ = ["Objective"]


class Objective:
    r"""J as a function of the state of U, for one gradient and one curvature.

    .. math:: J(U) = g^\top u + \tfrac12 u^\top (C + \lambda I) u, \qquad u = -U g

    Equation (9) of the paper with :math:`\delta x` eliminated; :math:`\lambda` is the damping.

    Args:
        blocks: U.
        gradient: g, flat.
        product: d -> C d, a vector that may be changed.
        damping: lambda.
        is_spent: tells whether a solve should end where it would need another product.
    """

    def __init__(
        self,
        blocks: BlockDiagonal,
        gradient: Tensor,
        product: Callable[[Tensor], Tensor],
        damping: float,
        is_spent: Callable[[], bool] = lambda: False,
    ) -> None:
        self.blocks, self.gradient, self.product, self.damping = blocks, gradient, product, damping
        self.is_spent = is_spent

    def value(self, states: States) -> Tensor:
        """Return J(U), a device scalar."""
        return self.value_and_rounding(states)[0]

    def value_and_rounding(self, states: States) -> tuple[Tensor, Tensor]:
        """Return J(U) and the rounding error to expect in it."""
        u, image = self.control_and_image(states)
        dot = self.blocks.space.dot
        # The terms of J cancel near its minimum; what rounding leaves is of the size of the terms.
        size = (dot(u, u) * (dot(self.gradient, self.gradient) + dot(image, image))).sqrt()
        value = quadratic_value(u, self.gradient, image, dot, out=image)
        return value, self.blocks.space.rounding * size

    def value_and_gradient(self, states: States) -> tuple[Tensor, States]:
        """Return J(U) and dJ/dstate, the pullback of u -> r = dJ/du = g + (C + damping) u."""
        u, image = self.control_and_image(states)
        # J = g'u + u'(C + damping)u / 2, equation (9) with delta-x eliminated.
        value = quadratic_value(u, self.gradient, image, self.blocks.space.dot)
        # u = -U g, so that dJ/dstate is the gradient of <-r, U g>; in the memory of the image.
        r = image.add_(self.gradient).neg_()
        return value, self.blocks.pullback(states, self.gradient, r)

    def control_and_image(self, states: States) -> tuple[Tensor, Tensor]:
        """Return u = -U g and (C + damping) u."""
        u = self.blocks.apply(states, self.gradient).neg_()
        return u, self.damped_product(u)

    def damped_product(self, d: Tensor) -> Tensor:
        """Return (C + damping) d, in the memory of the product."""
        image = self.product(d)
        return image.add_(d, alpha=self.damping) if self.damping else image
