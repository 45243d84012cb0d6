"""A loss without curvature: linear in its outputs, or saturated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._forwards import differentiable_in, split_loss_and_outputs
from .._moved_parameters import parameters_moved
from .._output_hessian import LinearLoss, Objective, OutputHessian, SaturatedLoss

__all__ = ["saturation_told"]


@contextmanager
def saturation_told(
    forward: Callable[[], Any], parameters: Sequence[Tensor], objective: Objective
) -> Iterator[None]:
    """Raise SaturatedLoss in place of the body's LinearLoss if that is what it is.

    A loss that is linear in the outputs is so everywhere; a softmax that is certain of every answer
    has a curvature that underflows, and at logits of zero has its largest.
    """
    try:
        yield
    except LinearLoss as error:
        if _bends_at_smaller_outputs(forward, parameters, objective):
            raise SaturatedLoss(str(error)) from None
        raise


def _bends_at_smaller_outputs(
    forward: Callable[[], Any], parameters: Sequence[Tensor], objective: Objective
) -> bool:
    """Tell whether H is not zero where the parameters, and so the outputs, are smaller."""
    values = [p.detach().clone() for p in parameters]
    for part in (0.9, 0.999, 1.0):
        with torch.enable_grad(), parameters_moved(parameters, values, -part):
            loss, outputs = split_loss_and_outputs(forward())
            zs = differentiable_in(outputs)
            if OutputHessian(objective, loss, outputs, zs, check=False).bends():
                return True
    return False
