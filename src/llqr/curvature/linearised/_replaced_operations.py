"""Replace operations by ones whose second backward costs no more than it must.

A Gauss-Newton product differentiates u -> J'u by u only: the operations' inputs and weights are
constants there. torch's double backward does not know that; for a convolution it computes four
convolutions where two are needed, and for a linear layer it keeps every cotangent. The operations
here have the pair that is needed: a backward that is the vector-Jacobian product, and a backward of
that which is the Jacobian-vector product.

They are wrong for a Hessian, in which inputs and weights are not constants, and serve only the
Gauss-Newton curvatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ._autograd import Call, ForwardScope, is_replaced, value_with_graph
from ._base import LinearisedOperation, has_subclass
from ._table import OPERATIONS

__all__ = ["ReplacedOperations", "replaced_above"]


class ReplacedOperations(TorchFunctionMode):
    """Run the functions in the table of operations through their replacements.

    Active during the one forward of an expansion. A call that carries no gradient, or whose
    arguments are in a form not covered, passes through to torch. So does every call

    - under saved-tensor hooks of the forward's own, since those may be activation checkpointing's:
      it runs the forward again after this mode has ended, and must meet the same operations;
    - within ``torch.func`` transforms and forward-mode differentiation, which look inside.

    Attributes:
        kinds: what was replaced: the operations, their dtypes, and which inputs carry gradients.
    """

    def __enter__(self) -> ReplacedOperations:
        """Begin."""
        self._scope, self._hooks_outside = ForwardScope(), _saved_tensor_hooks()
        self.kinds: set[tuple[Any, ...]] = set()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End: derivatives that are taken from now on are the library's."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._scope.running = False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace a call to one of the functions in the table."""
        kwargs = kwargs or {}
        from_call = OPERATIONS.get(func)
        # A tensor subclass with functions of its own does what it likes with the call.
        if from_call is None or has_subclass(types) or not self._may_replace():
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # other modes would see every small step
            op = from_call(*args, **kwargs)
            carries = op is not None and [t is not None and t.requires_grad for t in op.tensors]
        if op is None:
            return func(*args, **kwargs)
        if not carries or not any(carries):
            return op.value  # computed already, and constant
        self.kinds.add(_kind(op, carries))
        return value_with_graph(Call(op, self._scope, func, args, kwargs))

    def _may_replace(self) -> bool:
        if not (self._scope.replacing and torch.is_grad_enabled()):
            return False
        transformed = torch._C._functorch.maybe_current_level() is not None
        if transformed or forward_ad._current_level >= 0:
            return False
        hooks = _saved_tensor_hooks()
        return hooks is self._hooks_outside or hooks == self._hooks_outside


def _saved_tensor_hooks() -> Any:
    """Return the saved-tensor hooks that are on in this thread; None: none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _kind(op: LinearisedOperation, carries: list[bool]) -> tuple[Any, ...]:
    return type(op), op.value.dtype, op.value.dim(), tuple(carries)


def replaced_above(loss: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Tell whether a replaced operation stands between the loss and the outputs.

    There the second derivative H of the loss is taken, and a replaced operation would be wrong.
    """
    below = {z.grad_fn for z in outputs}
    pending, seen = [loss.grad_fn], set(below)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_replaced(node):
            return True
        pending.extend(parent for parent, _ in node.next_functions)
    return False
