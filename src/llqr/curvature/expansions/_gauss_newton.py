"""C = J' H J, the Gauss-Newton and Fisher metrics of the paper's equation (7), in four ways."""

from __future__ import annotations

import logging
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
from .._graphs import custom_functions_in
from .._missing_derivative import MissingDerivative, ReplacementsDisagree
from .._output_hessian import OutputHessian
from ..linearised import ReplacedOperations, replaced_above
from ._base import Expansion, checked_kinds
from ._compare_replacements import PlainDerivatives
from ._differences import central_difference, differ_too_much, random_direction
from ._linear_maps import are_transposes, is_homogeneous, random_cotangents
from ._output_jacobian import (
    JacobianByDifferences,
    JacobianByDoubleBackward,
    JacobianByForwardMode,
    OutputJacobian,
)
from ._saturation import saturation_told

__all__ = [
    "GaussNewtonExpansion",
    "GaussNewtonByDifferences",
    "GaussNewtonByDoubleBackward",
    "GaussNewtonByForwardMode",
    "GaussNewtonByReplacedOperations",
]

log = logging.getLogger("llqr")


class GaussNewtonExpansion(Expansion):
    """C = J' H J: a Jacobian of the outputs around a second derivative in the outputs (base class).

    This is the paper's equation (9) with Q_N = H and no other cost: along the dynamics (8)
    delta-x_N = J delta-theta, so that the cost is delta-theta' J' H J delta-theta / 2.
    """

    #: The way that J d is computed.
    jacobian_class: ClassVar[type[OutputJacobian]]
    #: Whether no other way is tried if J' has no transpose, and nothing is known that explains it.
    refuses_unseen: ClassVar[bool] = True

    def _prepare_products(
        self, forward: RepeatableForward, loss: Tensor, outputs: Any, curvature: Curvature
    ) -> None:
        zs = differentiable_in(outputs)
        self._repeat = RepeatedOutputs(forward, outputs)
        self._jacobian = self.jacobian_class(loss, zs, self._parameters, self._repeat)
        self._keep_gradient(self._jacobian.loss_gradient)
        with saturation_told(forward, self._parameters, curvature.objective):
            self._hessian = OutputHessian(curvature.objective, loss, outputs, zs)
        self._hessian.warn_if_indefinite()
        hidden = self._hessian.of_loss and custom_functions_in([loss], above=zs)
        self._slope = RepeatedOutputs(forward, outputs, slope=True) if hidden else None

    def take_gradient(self) -> list[Tensor | None]:
        """Return the gradient, and let go of it: a vector of the parameters' size."""
        gradient = self.gradient
        if not self._unchecked:  # or a check with the first product compares it
            self.gradient = self._jacobian.loss_gradient = []
        return gradient

    def _curvature_product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        # d -> J d -> H J d -> J' H J d
        jd = self._jacobian.product(d)
        hjd = self._hessian.product(jd)
        return self._jacobian.transposed_product(hjd)

    def _check_backward(self, loss: Tensor) -> None:
        if not self._can_be_judged:
            return
        # J' is the backward pass that trains the network, be it the derivative of the forward or a
        # surrogate: straight through a rounding, reversed. J must be its transpose: then C is the
        # curvature of that surrogate, and symmetric. Differences are of the forward itself.
        v, jacobian = random_cotangents(self._jacobian.outputs), self._jacobian
        maps = jacobian.transposed_product, jacobian.product
        if not is_homogeneous(jacobian.transposed_product, v):
            self._refuse_custom_functions("J'v is not linear in v")
        # Without a suspicion, an error of differences comes from kinks.
        if self.by_differences and not (self._unchecked or self._suspect):
            return
        if are_transposes(v, *maps, self._parameters, self.by_differences):
            return
        if self.by_differences or (self.refuses_unseen and not self._unchecked):
            self._refuse_custom_functions("J' is not the transpose of a linear map J")
        raise MissingDerivative(self._suspects)

    def _check_custom_functions(self) -> None:
        self._check_backward(self.loss)
        # With J and J' transposes of each other, C is as symmetric as H, which torch computes
        # unless a Function stands in the loss. (Of a saturated H, which is rounding, ask nothing.)
        if self._slope is not None:
            if not self.by_differences:
                self._check_symmetry()
            self._check_output_hessian(self._slope)

    def _check_output_hessian(self, slope: RepeatedOutputs) -> None:
        """Compare H J d with differences of dL/dz: fused losses keep it as a constant."""
        d = random_direction(self._parameters)
        found = self._hessian.product(self._jacobian.product(d))
        if differ_too_much(found, central_difference(slope, self._parameters, d)):
            self._refuse_custom_functions("the second derivative of the loss is hidden")


class GaussNewtonByReplacedOperations(GaussNewtonExpansion):
    """By double backward of a forward whose costly operations are replaced: about 1.3 steps."""

    name = "replaced operations"
    cost = "fastest"
    exact = refuses_unseen = False
    jacobian_class = JacobianByDoubleBackward

    def _run_forward(self, forward: RepeatableForward) -> tuple[Tensor, Any]:
        with ReplacedOperations() as mode:
            loss, outputs = split_loss_and_outputs(forward())
        self._replaced = frozenset(mode.kinds)
        # H is taken between the outputs and the loss, where the operations' inputs do move.
        if replaced_above(loss, tensors_in(outputs)):
            self._replaced = frozenset()
            del loss, outputs  # not two graphs at a time
            return split_loss_and_outputs(forward())
        return loss, outputs

    def _kind_of_forward(self, loss: Tensor, outputs: Any) -> tuple[Any, ...]:
        return *super()._kind_of_forward(loss, outputs), self._replaced

    def _prepare_products(
        self, forward: RepeatableForward, loss: Tensor, outputs: Any, curvature: Curvature
    ) -> None:
        if checked_kinds.get(self._kind) is False:
            raise ReplacementsDisagree
        unknown = self._kind not in checked_kinds
        self._plain = (
            PlainDerivatives(forward, self._parameters, loss)
            if self._replaced and unknown
            else None
        )
        super()._prepare_products(forward, loss, outputs, curvature)

    def _check_backward(self, loss: Tensor) -> None:
        try:
            super()._check_backward(loss)
            if self._plain is not None and not self._plain.agree_with(self._jacobian):
                raise ReplacementsDisagree
        except MissingDerivative:
            if self._unchecked:
                raise
            checked_kinds[self._kind] = False
            raise ReplacementsDisagree from None
        finally:
            self._plain = None


class GaussNewtonByDoubleBackward(GaussNewtonExpansion):
    """By torch's own double backward."""

    name = "double backward"
    cost = "about as fast"
    jacobian_class = JacobianByDoubleBackward

    def _check_backward(self, loss: Tensor) -> None:
        super()._check_backward(loss)
        if self._suspect and not self._unchecked:
            log.warning(
                "operations replaced for a refresh gave other derivatives than torch's own, which "
                "are used instead; please report the model"
            )


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
