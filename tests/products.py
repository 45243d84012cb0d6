"""Curvature as a matrix, column by column, against the explicit one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import llqr
from explicit import F64, agree, gauss_newton, split, vector


def curvature_matrix(model: Any, parameters: Sequence[Tensor]) -> Tensor:
    """C of a quadratic model in full."""
    size = sum(p.numel() for p in parameters)
    columns = [vector(model.product(split(e, parameters))) for e in torch.eye(size, dtype=F64)]
    return torch.stack(columns, 1)


def check_fisher(
    forward: Callable[[], tuple[Tensor, Any]],
    scalar: Callable[[Any], Tensor],
    parameters: Sequence[Tensor],
    tolerance: float = 1e-9,
) -> None:
    """Compare g and all of C with rows of the Jacobian of plain torch.

    ``scalar`` is the loss as a function of the outputs.
    """
    model = llqr.quadratic_model(forward, parameters)
    loss, outputs = forward()
    g = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    agree(vector(model.gradient), vector(g), tolerance)
    expected = gauss_newton(outputs, scalar, parameters)
    assert expected.any()
    agree(curvature_matrix(model, parameters), expected, tolerance)
