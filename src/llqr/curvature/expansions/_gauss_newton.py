"""C = J' H J, the Gauss-Newton and Fisher metrics of the paper's equation (7), in four ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .._curvatures import Curvature
from .._forwards import (
    RepeatableForward,
    RepeatedOutputs,
    differentiable_in,
    split_loss_and_outputs,
    tensors_in,
)
from ..linearised import ReplacedOperations, replaced_above
from ._base import Expansion
from ._differences import central_difference
from ._output_hessian import OutputHessian
from ._output_jacobian import (
    JacobianByDifferences,
    JacobianByDoubleBackward,
    JacobianByForwardMode,
    OutputJacobian,
)

__all__ = [
    "GaussNewtonExpansion",
    "GaussNewtonByDifferences",
    "GaussNewtonByDoubleBackward",
    "GaussNewtonByForwardMode",
    "GaussNewtonByReplacedOperations",
]


class GaussNewtonExpansion(Expansion):
    """C = J' H J: a Jacobian of the outputs around a second derivative in the outputs (base class).

    This is the paper's equation (9) with Q_N = H and no other cost: along the dynamics (8)
    delta-x_N = J delta-theta, so that the cost is delta-theta' J' H J delta-theta / 2.
    """

    #: The way that J d is computed.
    jacobian_class: ClassVar[type[OutputJacobian]]

    def _prepare_products(
        self, forward: RepeatableForward, loss: Tensor, outputs: Any, curvature: Curvature
    ) -> None:
        zs = differentiable_in(outputs)
        self._repeat = RepeatedOutputs(forward, outputs)
        self._jacobian = self.jacobian_class(loss, zs, self._parameters, self._repeat)
        self._keep_gradient(self._jacobian.loss_gradient)
        self._hessian = OutputHessian(curvature, loss, outputs, zs)

    def _curvature_product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        # d -> J d -> H J d -> J' H J d
        jd = self._jacobian.product(d)
        hjd = self._hessian.product(jd)
        return self._jacobian.transposed_product(hjd)

    def _first_map(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        return self._jacobian.product(d)

    def _first_map_by_differences(self, d: Sequence[Tensor]) -> list[Tensor]:
        return central_difference(self._repeat, self._parameters, d)


class GaussNewtonByReplacedOperations(GaussNewtonExpansion):
    """By double backward of a forward whose costly operations are replaced: about 1.3 steps."""

    name = "replaced operations"
    cost = "fastest"
    jacobian_class = JacobianByDoubleBackward

    def _run_forward(self, forward: RepeatableForward) -> tuple[Tensor, Any]:
        with ReplacedOperations():
            loss, outputs = split_loss_and_outputs(forward())
        # H is taken between the outputs and the loss, where the operations' inputs do move.
        if not replaced_above(loss, tensors_in(outputs)):
            return loss, outputs
        del loss, outputs  # not two graphs at a time
        return split_loss_and_outputs(forward())


class GaussNewtonByDoubleBackward(GaussNewtonExpansion):
    """By torch's own double backward."""

    name = "double backward"
    cost = "about as fast"
    jacobian_class = JacobianByDoubleBackward


class GaussNewtonByForwardMode(GaussNewtonExpansion):
    """J d by forward-mode differentiation, one more forward per product; J' by backward."""

    name = "forward-mode differentiation"
    cost = "about half as fast again"
    jacobian_class = JacobianByForwardMode


class GaussNewtonByDifferences(GaussNewtonExpansion):
    """J d by central differences, two more forwards per product; J' exactly, by backward."""

    name = "central differences"
    cost = "slower and accurate to a few digits only"
    by_differences = True
    jacobian_class = JacobianByDifferences
