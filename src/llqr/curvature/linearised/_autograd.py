"""The two autograd Functions through which a replaced operation enters the graph.

Differentiating the value once runs ``vjp``; differentiating that by its cotangent runs ``jvp``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._base import LinearisedOperation, Values

__all__ = ["is_replaced", "value_with_graph"]


class _OperationValue(torch.autograd.Function):
    """The value; its backward is the vjp."""

    @staticmethod
    def forward(ctx: Any, op: LinearisedOperation, *tensors: Tensor | None) -> Tensor:
        ctx.op = op
        # The output's own node must not hold it: such a circle through autograd is never freed.
        value, op.value = op.value, op.value.detach()
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_OperationVjp.apply(ctx.op, needed, g)  # type: ignore[no-untyped-call]
        return None, *ctx.op.vjp(g, needed)


class _OperationVjp(torch.autograd.Function):
    """J'g, linear in g; its backward is the jvp."""

    @staticmethod
    def forward(ctx: Any, op: LinearisedOperation, needed: tuple[bool, ...], g: Tensor) -> Values:
        ctx.op = op
        # A tangent that is zero stays None, so that jvp can leave its part out.
        ctx.set_materialize_grads(False)
        return op.vjp(g, needed)

    @staticmethod
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Any, ...]:
        # The derivative of g -> J'g, applied to d, is J d; inputs and weights are constants here.
        return None, None, ctx.op.jvp(d)


def value_with_graph(op: LinearisedOperation) -> Tensor:
    """Return the operation's value, as a function of its tensors in autograd's graph."""
    value: Tensor = _OperationValue.apply(op, *op.tensors)  # type: ignore[no-untyped-call]
    return value


def is_replaced(node: Any) -> bool:
    """Tell whether a node of a graph belongs to a replaced operation."""
    return isinstance(node, (_OperationValue._backward_cls, _OperationVjp._backward_cls))
