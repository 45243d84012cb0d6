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
    "GaussNewton",
    "GaussNewtonByDifferences",
    "GaussNewtonByDoubleBackward",
    "GaussNewtonByForwardMode",
    "GaussNewtonByReplacedOperations",
]


class GaussNewton(Expansion):
    """C = J' H J: a Jacobian of the outputs around a second derivative in the outputs (base class).

    It is equation (9) with the dynamics (8) put in: delta-x_N = J delta-theta, Q_N = H, and no
    other cost.
    """

    #: The way that J d is computed.
    jacobian_class: ClassVar[type[OutputJacobian]]

    def _differentiate(
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


class GaussNewtonByReplacedOperations(GaussNewton):
    """By double backward of a forward whose costly operations are replaced: about 1.3 steps."""

    way = "replaced operations"
    cost = "fastest"
    jacobian_class = JacobianByDoubleBackward

    def _run_forward(self, forward: RepeatableForward) -> tuple[Tensor, Any]:
        with ReplacedOperations():
            loss, outputs = split_loss_and_outputs(forward())
        # H is taken between the outputs and the loss, where the operations' inputs do move.
        if replaced_above(loss, tensors_in(outputs)):
            return split_loss_and_outputs(forward())
        return loss, outputs


class GaussNewtonByDoubleBackward(GaussNewton):
    """By torch's own double backward."""

    way = "double backward"
    cost = "about as fast"
    jacobian_class = JacobianByDoubleBackward


class GaussNewtonByForwardMode(GaussNewton):
    """J d by forward-mode differentiation, one more forward per product; J' by backward."""

    way = "forward-mode differentiation"
    cost = "about half as fast again"
    jacobian_class = JacobianByForwardMode


class GaussNewtonByDifferences(GaussNewton):
    """J d by central differences, two more forwards per product; J' exactly, by backward."""

    way = "central differences"
    cost = "slower and accurate to a few digits only"
    by_differences = True
    jacobian_class = JacobianByDifferences
