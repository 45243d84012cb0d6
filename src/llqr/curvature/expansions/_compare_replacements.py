"""Replaced operations against torch's own, once for each kind of forward."""

from __future__ import annotations

import torch
from torch import Tensor

from .._forwards import RepeatableForward, differentiable_in, split_loss_and_outputs
from .._graphs import gradients_of
from ._linear_maps import nearly_equal, norm, random_cotangents
from ._output_jacobian import OutputJacobian

__all__ = ["PlainDerivatives"]

#: Relative to machine precision, how far the loss of a forward that repeats itself may move.
REPEATED = 1e3


class PlainDerivatives:
    """g + J'v for one random v, by torch's own operations.

    Args:
        forward: run once more, with nothing replaced.
        parameters: the tensors to differentiate by.
        loss: the loss that the forward gave first.
    """

    def __init__(self, forward: RepeatableForward, parameters: list[Tensor], loss: Tensor) -> None:
        self._parameters = parameters
        again, outputs = split_loss_and_outputs(forward())
        zs = differentiable_in(outputs)
        self._v = random_cotangents(zs)
        self._sum = gradients_of([again, *zs], parameters, [torch.ones_like(again), *self._v])
        # A forward that does not repeat itself (it reads what it wrote) cannot be judged.
        before, now = float(loss.detach()), float(again.detach())
        self._repeats = abs(before - now) <= REPEATED * torch.finfo(loss.dtype).eps * abs(now)

    def agree_with(self, jacobian: OutputJacobian) -> bool:
        """Tell whether every entry of g + J'v is that of a forward with replaced operations."""
        g, jv = jacobian.loss_gradient, jacobian.transposed_product(self._v)
        error = [_difference(p, a, b) for p, a, b in zip(self._sum, g, jv, strict=True)]
        size = norm(self._sum)
        close = nearly_equal(size, size + norm(error), self._parameters)
        return close or not self._repeats


def _difference(whole: Tensor | None, *parts: Tensor | None) -> Tensor | None:
    """Return a tensor less others, of which None is zero."""
    known = [part for part in parts if part is not None]
    if whole is None:
        return sum(known[1:], known[0]) if known else None
    return whole - sum(known) if known else whole
