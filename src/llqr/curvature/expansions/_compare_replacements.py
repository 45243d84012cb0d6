"""Replaced operations against torch's own, once for each kind of forward."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .._forwards import RepeatableForward, differentiable_in, split_loss_and_outputs
from .._graphs import gradients_of
from .._missing_derivative import ReplacementsDisagree
from ._linear_maps import direction_along, inner_product, nearly_equal, norm, random_cotangents
from ._output_jacobian import OutputJacobian

__all__ = ["PlainDerivatives", "derivatives_to_compare"]

log = logging.getLogger("llqr")

#: Whether the operations were found right: by the shapes of the parameters and what was replaced.
_verdicts: dict[Any, bool] = {}


class PlainDerivatives:
    """g + J'v for one random v, by torch's own operations.

    Args:
        forward: run once more, with nothing replaced.
        parameters: the tensors to differentiate by.
        key: where the verdict is kept.
        loss: the loss that the forward gave first.
    """

    def __init__(
        self, forward: RepeatableForward, parameters: list[Tensor], key: Any, loss: Tensor
    ) -> None:
        self._parameters, self._key = parameters, key
        again, outputs = split_loss_and_outputs(forward())
        zs = differentiable_in(outputs)
        self._v = random_cotangents(zs)
        self._sum = gradients_of([again, *zs], parameters, [torch.ones_like(again), *self._v])
        # A forward that does not repeat itself (it reads what it wrote) cannot be judged.
        self._repeats = nearly_equal(float(loss.detach()), float(again.detach()), zs)

    def compare(self, jacobian: OutputJacobian, forward_too: bool) -> None:
        """Compare with g + J'v and with J of the replaced operations; keep the verdict.

        Args:
            jacobian: of the forward with replaced operations.
            forward_too: whether to compare J; users' own backward passes may spoil it as well.

        Raises:
            ReplacementsDisagree: they are wrong in this forward.
        """
        right = not self._repeats or self._agrees_with(jacobian, forward_too)
        _verdicts[self._key] = right
        if not right:
            log.warning(
                "operations replaced for a refresh gave other derivatives than torch's own, which "
                "are used instead; please report the model"
            )
            raise ReplacementsDisagree

    def _agrees_with(self, jacobian: OutputJacobian, forward_too: bool) -> bool:
        g, jv = jacobian.loss_gradient, jacobian.transposed_product(self._v)
        d = direction_along(self._sum, self._parameters)
        # Every entry of g + J'v; and <g + J'v, d> = <g, d> + <v, J d>.
        sure = inner_product(self._sum, d)
        error = [_difference(p, a, b) for p, a, b in zip(self._sum, g, jv, strict=True)]
        small = nearly_equal(norm(self._sum), norm(self._sum) + norm(error), d)
        if not forward_too or not small:
            return small
        found = inner_product(g, d) + inner_product(self._v, jacobian.product(d))
        return nearly_equal(sure, found, d)


def derivatives_to_compare(
    forward: RepeatableForward, parameters: list[Tensor], kinds: set[Any], loss: Tensor
) -> PlainDerivatives | None:
    """Return what replaced operations must give, or None if they are known to give it.

    Raises:
        ReplacementsDisagree: they are known not to.
    """
    key = (tuple(p.shape for p in parameters), frozenset(kinds))
    verdict = _verdicts.get(key)
    if verdict is False:
        raise ReplacementsDisagree
    return None if verdict else PlainDerivatives(forward, parameters, key, loss)


def _difference(whole: Tensor | None, *parts: Tensor | None) -> Tensor | None:
    """Return a tensor less others, of which None is zero."""
    known = [part for part in parts if part is not None]
    if whole is None:
        return sum(known[1:], known[0]) if known else None
    return whole - sum(known) if known else whole
