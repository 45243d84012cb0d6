"""The two autograd Functions through which a replaced operation enters the graph.

Differentiating the value once runs ``vjp``; differentiating that by its cotangent runs ``jvp``.
Once the forward is over, that is all that a Gauss-Newton product asks for. A derivative that the
forward itself takes is another matter: it is differentiated by inputs and weights as well, and gets
torch's own operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._base import LinearisedOperation, Values

__all__ = ["Call", "ForwardScope", "is_replaced", "value_with_graph"]


class ForwardScope:
    """Whether the forward in which operations are replaced still runs.

    Attributes:
        running: True until its end.
        replacing: False while torch's own operations are wanted.
    """

    def __init__(self) -> None:
        self.running, self.replacing = True, True


class Call:
    """A call that was replaced, and how torch's own operation would differentiate it."""

    def __init__(
        self,
        op: LinearisedOperation,
        scope: ForwardScope,
        func: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.op, self.scope = op, scope
        self._func, self._arguments = func, (args, kwargs)

    def plain_vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return J'g from torch's own operation, with the graph in g, inputs and weights."""
        inputs = {id(t): t for t, n in zip(self.op.tensors, needed, strict=True) if n}
        # Views: one input may be computed from another, and its gradient must not run through it.
        views = {key: t.view_as(t) for key, t in inputs.items() if t is not None}
        # The call has been made: what it writes to besides is written once.
        copies = {id(t): t.clone() for t in self.op.written if t is not None}
        taken = views | copies
        args, kwargs = pytree.tree_map(lambda x: taken.get(id(x), x), self._arguments)
        self.scope.replacing = False
        try:
            value = self._func(*args, **kwargs)
        finally:
            self.scope.replacing = True
        grads = torch.autograd.grad(
            value, list(views.values()), g, create_graph=True, allow_unused=True
        )
        found: dict[int, Tensor | None] = dict(zip(views, grads, strict=True))
        # An input given twice has one gradient.
        return tuple(found.pop(id(t), None) for t in self.op.tensors)


class _OperationValue(torch.autograd.Function):
    """The value; its backward is the vjp."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        ctx.call = call
        # The output's own node must not hold it: such a circle through autograd is never freed.
        return call.op.hand_over_value()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            with torch._C.DisableTorchFunction():
                return None, *call.op.vjp(g, needed)
        if call.scope.running:
            return None, *call.plain_vjp(g, needed)
        return None, *_OperationVjp.apply(call.op, needed, g)  # type: ignore[no-untyped-call]


class _OperationVjp(torch.autograd.Function):
    """J'g, linear in g; its backward is the jvp."""

    @staticmethod
    def forward(ctx: Any, op: LinearisedOperation, needed: tuple[bool, ...], g: Tensor) -> Values:
        ctx.op = op
        # A tangent that is zero stays None, so that jvp can leave its part out.
        ctx.set_materialize_grads(False)
        with torch._C.DisableTorchFunction():  # function modes would see every small step
            return op.vjp(g, needed)

    @staticmethod
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Any, ...]:
        # The derivative of g -> J'g, applied to d, is J d; inputs and weights are constants here.
        with torch._C.DisableTorchFunction():
            return None, None, ctx.op.jvp(d)


def value_with_graph(call: Call) -> Tensor:
    """Return the operation's value, as a function of its tensors in autograd's graph."""
    value: Tensor = _OperationValue.apply(call, *call.op.tensors)  # type: ignore[no-untyped-call]
    return value


def is_replaced(node: Any) -> bool:
    """Tell whether a node of a graph belongs to a replaced operation."""
    return isinstance(node, (_OperationValue._backward_cls, _OperationVjp._backward_cls))
