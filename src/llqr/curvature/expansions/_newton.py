"""C = the Hessian of the whole loss, Newton's choice in the paper's equation (7), in two ways."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._curvatures import Curvature
from .._forwards import RepeatableForward, split_loss_and_outputs
from .._graphs import gradients_of
from .._missing_derivative import MissingDerivative
from ._base import Expansion
from ._differences import central_difference, differ_too_much
from ._linear_maps import direction_along, inner_product, is_homogeneous, nearly_equal

__all__ = ["NewtonExpansion", "NewtonByDifferences", "NewtonByDoubleBackward"]

#: Nodes of a graph that torch differentiates wrongly twice.
THIRD_DERIVATIVE_WRONG = {
    "NativeLayerNormBackwardBackward0",
    "NativeBatchNormBackwardBackward0",
    "CudnnBatchNormBackwardBackward0",
}


class _RepeatedLoss:
    """The loss and its gradient, computed again at the parameters' present values."""

    def __init__(self, forward: RepeatableForward, parameters: list[Tensor]) -> None:
        self._forward, self._parameters = forward, parameters

    def __call__(self) -> list[Tensor]:
        # Differences are taken without a graph; this one is local.
        with torch.enable_grad():
            loss, _ = split_loss_and_outputs(self._forward())
            gradient = gradients_of([loss], self._parameters)
            return [
                loss,
                *(
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(self._parameters, gradient, strict=True)
                ),
            ]


class NewtonExpansion(Expansion):
    """C = the second derivative of the loss in the parameters (base class).

    Here the paper's equation (9) has all its stage costs: Q_i, R_i and M_i are the second
    derivatives of the layers, weighted by the gradient in their outputs.
    """

    def _prepare_products(
        self, forward: RepeatableForward, loss: Tensor, outputs: Any, curvature: Curvature
    ) -> None:
        self._repeat = _RepeatedLoss(forward, self._parameters)
        self._keep_gradient(self._differentiate_loss(loss))

    def _check_backward(self, loss: Tensor) -> None:
        def backward(v: Sequence[Tensor]) -> list[Tensor | None]:
            return gradients_of([loss], self._parameters, v)

        if self._can_be_judged and not is_homogeneous(backward, [torch.ones_like(loss)]):
            self._refuse_custom_functions("g is not linear in the loss")

    @abstractmethod
    def _differentiate_loss(self, loss: Tensor) -> list[Tensor | None]:
        """Return the gradient, and keep what a product needs of it."""

    def _differences(self, d: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return g'd and C d from two runs, to either side of the parameters."""
        slope, *image = central_difference(self._repeat, self._parameters, d)
        return float(slope), image


class NewtonByDoubleBackward(NewtonExpansion):
    """Differentiate the gradient, whose graph is kept."""

    name = "double backward"
    cost = "about as fast"

    def _differentiate_loss(self, loss: Tensor) -> list[Tensor | None]:
        # In the reach of function modes these were replaced; in TorchScript they are not.
        if self._names & THIRD_DERIVATIVE_WRONG:
            raise MissingDerivative("a derivative of a layer norm or batch norm in TorchScript")
        gradient = gradients_of([loss], self._parameters, create_graph=True)
        # A gradient without a graph is constant: its row of C is zero.
        self._rows = [(i, g) for i, g in enumerate(gradient) if g is not None and g.requires_grad]
        return gradient

    def _check_custom_functions(self) -> None:
        d = direction_along(self.gradient, self._parameters)
        found = self._curvature_product(d)
        slope, image = self._differences(d)
        # If backward computes the derivative of the forward, differences of it are sure. If it
        # computes a surrogate, straight through a rounding, then C is the derivative of that, and
        # differences would mix the two; it need not be symmetric.
        derivative = nearly_equal(inner_product(self.gradient, d), slope, d, by_differences=True)
        if derivative and differ_too_much(found, image):
            raise MissingDerivative(self._suspects)
        self._check_symmetry()

    def _curvature_product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return C d as the gradient of d'g, C being symmetric."""
        # d -> d'g -> its gradient in the parameters
        if not self._rows:
            return [None] * len(self._parameters)
        gradient = [g for _, g in self._rows]
        return gradients_of(gradient, self._parameters, [d[i] for i, _ in self._rows])


class NewtonByDifferences(NewtonExpansion):
    """Run forward and backward twice more for every product, to either side of the parameters."""

    name = "central differences"
    cost = "slower and accurate to a few digits only"
    by_differences = True

    def _differentiate_loss(self, loss: Tensor) -> list[Tensor | None]:
        return gradients_of([loss], self._parameters)

    def _check_custom_functions(self) -> None:
        d = direction_along(self.gradient, self._parameters)
        slope, _ = self._differences(d)
        if not nearly_equal(inner_product(self.gradient, d), slope, d, by_differences=True):
            self._refuse_custom_functions("g is not the derivative of the loss, C not that of g")
        self._check_symmetry()

    def _curvature_product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return C d as (g(p + e d) - g(p - e d)) / 2e."""
        # The graph of each gradient goes as soon as it is taken: nothing is kept.
        return [*self._differences(d)[1]]
