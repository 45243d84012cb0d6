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
from torch.overrides import TorchFunctionMode

from ._autograd import is_replaced, value_with_graph
from ._table import OPERATIONS

__all__ = ["ReplacedOperations", "replaced_above"]


class ReplacedOperations(TorchFunctionMode):
    """Run the functions in the table of operations through their replacements.

    Active during the one forward of an expansion. A call that carries no gradient, or whose
    arguments are in a form not covered, passes through to torch. So does every call under
    saved-tensor hooks of the forward's own, since those may be activation checkpointing's: it runs
    the forward again after this mode has ended, and must meet the same operations.
    """

    def __enter__(self) -> ReplacedOperations:
        """Begin, and count the saved-tensor hooks that are on."""
        hooks, self._hooks = torch.autograd.graph.saved_tensors_hooks, 0
        enter, leave = self._original = hooks.__enter__, hooks.__exit__

        def counted_enter(hook: Any) -> None:
            self._hooks += 1
            return enter(hook)

        def counted_exit(hook: Any, *error: object) -> None:
            self._hooks -= 1
            return leave(hook, *error)

        hooks.__enter__, hooks.__exit__ = (  # type: ignore[method-assign]
            counted_enter,
            counted_exit,
        )
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        hooks = torch.autograd.graph.saved_tensors_hooks
        hooks.__enter__, hooks.__exit__ = self._original  # type: ignore[method-assign]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace a call to one of the functions in the table."""
        kwargs = kwargs or {}
        from_call = None if self._hooks else OPERATIONS.get(func)
        op = None if from_call is None else from_call(*args, **kwargs)
        if op is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if not any(t is not None and t.requires_grad for t in op.tensors):
            return op.value  # computed already, and constant
        return value_with_graph(op)


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
