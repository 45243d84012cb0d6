"""The surroundings of the one forward whose graph is kept and differentiated twice.

Nothing here is set for the whole process: a function mode belongs to its thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ._eager_code import eager_where
from ._embeddings import consistent_embedding, refuse_scaled_bag
from ._overrides import without_look_for_modes
from .linearised import has_subclass

__all__ = ["differentiable_repeatedly", "tensor_hooks_noted", "twice_differentiable"]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Choose kernels that have a double backward, in this thread.

    Flash and memory-efficient attention, the fast path of ``nn.MultiheadAttention`` in evaluation
    mode, cuDNN's recurrent nets and compiled graphs have none: use the math attention, the slow
    path, elementary operations and eager code.
    """
    with eager_where(_TwiceDifferentiable), torch.enable_grad(), _TwiceDifferentiable():
        yield


@contextmanager
def differentiable_repeatedly() -> Iterator[None]:
    """Choose kernels that have a backward which can run several times, in this thread.

    Compiled graphs free what they keep at their first backward, and cuDNN's recurrent nets have
    none in evaluation mode; fast attention stays.
    """
    with eager_where(_TwiceDifferentiable), torch.enable_grad(), _DifferentiableRepeatedly():
        yield


def tensor_hooks_noted() -> bool:
    """Tell whether a forward within one of these surroundings put hooks on what it computed."""
    modes: list[Any] = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(isinstance(m, _TwiceDifferentiable) and m.hooks_noted for m in modes)


class _TwiceDifferentiable(TorchFunctionMode):
    """Run the functions in the table by kernels that have a double backward.

    That any function mode is on keeps ``nn.MultiheadAttention`` from its fast path.

    Attributes:
        hooks_noted: whether a hook was put on a tensor that has a graph; no graph shows it.
    """

    hooks_noted = False
    replacements: ClassVar[dict[Any, Callable[..., Any]]]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, or what takes its place."""
        replacement = self.replacements.get(func)
        # A tensor subclass with functions of its own does what it likes with the call.
        if replacement is None or has_subclass(types):
            return func(*args, **(kwargs or {}))
        return replacement(self, func, args, kwargs or {})


def _note_hook(mode: _TwiceDifferentiable, func: Any, args: Any, kwargs: Any) -> Any:
    """Note a hook; leave it out where a forward is run again without a graph, and torch raises.

    Those of ``register_multi_grad_hook`` change nothing, and fail outside of ``backward()`` if a
    parameter is among their tensors.
    """
    hook = args[1] if len(args) > 1 else kwargs.get("hook")
    only_looks = getattr(hook, "__globals__", None) is vars(torch.autograd.graph)
    if only_looks or not torch.is_grad_enabled():
        return RemovableHandle(OrderedDict())
    mode.hooks_noted = mode.hooks_noted or args[0].grad_fn is not None
    return func(*args, **kwargs)


def _seen_within(mode: TorchFunctionMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function written in Python with the mode on, which torch leaves out of its body."""
    with mode:
        return without_look_for_modes(func)(*args, **kwargs)


# -- attention -----------------------------------------------------------------------------------


def _math_attention(mode: TorchFunctionMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run the attention that torch's backend ``SDPBackend.MATH`` runs."""
    if any(t.is_nested for t in _tensors((args, kwargs))):
        return func(*args, **kwargs)
    return _call_math_attention(*args, **kwargs)


def _call_math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill_(attn_mask.logical_not(), -torch.inf)
    values: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return values[0]


# -- embeddings ----------------------------------------------------------------------------------


def _consistent_embedding(mode: TorchFunctionMode, func: Any, args: Any, kwargs: Any) -> Any:
    return consistent_embedding(*args, **kwargs)


def _unscaled_bag(mode: TorchFunctionMode, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("scale_grad_by_freq", len(args) > 5 and args[5]):
        refuse_scaled_bag()
    return func(*args, **kwargs)


# -- recurrent nets ------------------------------------------------------------------------------


def _without_cudnn(mode: TorchFunctionMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a recurrent net by elementary operations where cuDNN would take it.

    cuDNN has no double backward, and no backward at all in evaluation mode. torch's switch for it
    is one for all threads.
    """
    if not any(_cudnn_takes(t) for t in _tensors((args, kwargs))):
        return func(*args, **kwargs)
    return _elementary_form(func, args, kwargs)(*args, **kwargs)


def _cudnn_takes(t: Tensor) -> bool:
    return bool(torch.backends.cudnn.is_acceptable(t))  # type: ignore[no-untyped-call]


def _elementary_form(func: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
    """Return torch's own decomposition of ``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``."""
    from torch._decomp import decomposition_table  # takes long to load

    # The second argument is a tensor of batch sizes for packed sequences.
    packed = "batch_sizes" in kwargs or (func is torch.lstm and isinstance(args[1], Tensor))
    packed = packed or (len(args) > 3 and isinstance(args[3], (tuple, list)))
    operation = getattr(torch.ops.aten, func.__name__)
    return decomposition_table[operation.data if packed else operation.input]


class _DifferentiableRepeatedly(_TwiceDifferentiable):
    """Run them by kernels that have a backward which can run several times."""


_DifferentiableRepeatedly.replacements = {
    Tensor.register_hook: _note_hook,
    # Activation checkpointing runs parts of the forward again in the backward pass.
    torch.autograd.grad: _seen_within,
    Tensor.backward: _seen_within,
    torch.lstm: _without_cudnn,
    torch.gru: _without_cudnn,
    torch.rnn_tanh: _without_cudnn,
    torch.rnn_relu: _without_cudnn,
}
_TwiceDifferentiable.replacements = {
    **_DifferentiableRepeatedly.replacements,
    F.embedding: _consistent_embedding,
    F.embedding_bag: _unscaled_bag,
    F.scaled_dot_product_attention: _math_attention,
    F.multi_head_attention_forward: _seen_within,
}


def _tensors(nest: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(nest) if isinstance(t, Tensor)]
