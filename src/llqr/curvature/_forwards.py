"""A forward: running it again, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._random_state import RandomState
from ._graphs import gradients_of

__all__ = [
    "Forward",
    "RepeatableForward",
    "RepeatedOutputs",
    "count_nonzero_rows",
    "differentiable_in",
    "split_loss_and_outputs",
    "tensors_in",
]

#: A function without arguments that returns the loss, or (loss, outputs).
Forward = Callable[[], Any]


class RepeatableForward:
    """A forward that runs again as it ran first: with the random numbers of its first call.

    Only the first call advances the caller's random state.
    """

    def __init__(self, forward: Forward, parameters: Sequence[Tensor]) -> None:
        self._forward = forward
        self._device = parameters[0].device if parameters else None
        self._first: RandomState | None = None

    def __call__(self) -> Any:
        """Return what the forward returns."""
        if self._first is None:
            self._first = RandomState(self._device)
            return self._forward()
        now = RandomState(self._device)
        self._first.restore()
        try:
            return self._forward()
        finally:
            now.restore()


class RepeatedOutputs:
    """The differentiable outputs, computed again at the parameters' present values.

    Args:
        forward: what computes them.
        outputs: what it returned first.
        slope: compute the loss's derivatives in them instead.
    """

    def __init__(self, forward: RepeatableForward, outputs: Any, slope: bool = False) -> None:
        self._forward, self._slope = forward, slope
        # By position, because a forward that runs again need not record a graph.
        self._positions = [i for i, z in enumerate(tensors_in(outputs)) if z.requires_grad]

    def __call__(self) -> list[Tensor]:
        """Return them, in the order of ``differentiable_in``."""
        if not self._slope:
            tensors = tensors_in(self._forward()[1])
            return [tensors[i] for i in self._positions]
        with torch.enable_grad():  # differences are taken without a graph; this one is local
            loss, outputs = split_loss_and_outputs(self._forward())
            zs = [tensors_in(outputs)[i] for i in self._positions]
            slopes = gradients_of([loss], zs)
        return [torch.zeros_like(z) if v is None else v for z, v in zip(zs, slopes, strict=True)]


def split_loss_and_outputs(result: Any) -> tuple[Tensor, Any]:
    """Split what a forward returned into (loss, outputs or None), or say what is wrong with it."""
    loss, outputs = result, None
    if isinstance(result, (tuple, list)):
        if len(result) != 2:
            raise ValueError(
                f"forward: expected a loss or (loss, outputs), got {len(result)} values"
            )
        loss, outputs = result
    if not isinstance(loss, Tensor):
        raise ValueError(f"forward: expected the loss as a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"forward: expected a scalar loss, got shape {tuple(loss.shape)}; "
            "reduce it, for example with .mean()"
        )
    if not loss.requires_grad:
        raise ValueError(
            "forward: the loss has no graph (it does not require grad); compute it from the "
            "model's parameters, without torch.no_grad() or .detach()"
        )
    return loss, outputs


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors of a nest of tuples, lists and dicts, in a fixed order."""
    return [z for z in pytree.tree_leaves(outputs) if isinstance(z, Tensor)]


def differentiable_in(outputs: Any) -> list[Tensor]:
    """Return the tensors of ``outputs`` that carry a graph, of which there must be one."""
    zs = [z for z in tensors_in(outputs) if z.requires_grad]
    if not zs:
        raise ValueError(
            "forward: no tensor in `outputs` has a graph; return the logits themselves, "
            "not a detached copy"
        )
    return zs


def count_nonzero_rows(loss: Tensor, zs: list[Tensor]) -> int:
    """Count the output rows whose loss gradient is not zero (several outputs: the largest count).

    The authors' code sums the curvature over these rows, so that an ignored label or a masked
    token does not count.
    """
    gz = gradients_of([loss], zs)
    rows = [g.reshape(-1, g.shape[-1] if g.dim() > 1 else 1) for g in gz if g is not None]
    return max([1, *(int(r.any(1).sum()) for r in rows)])
