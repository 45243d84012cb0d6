"""The micro-batches of a step, kept until the second pass has run them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .._module_state import RandomState
from .._optimizer import Optimizer

__all__ = ["MicroBatches", "find_optimizer"]


class _Seen(NamedTuple):
    backward: Callable[[], Any]
    forward: Callable[[], Any]
    random: RandomState


class MicroBatches:
    """Micro-batches whose clean backward a framework runs one by one.

    Gradient accumulation is the step of the joined batch: after the last clean backward ``p.grad``
    holds g, and :meth:`finish` adds up g~ from all micro-batches again, each with the random
    numbers of its first run. Until then they are held, with what their functions refer to.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def record(
        self, optimizer: Optimizer, backward: Callable[[], Any], forward: Callable[[], Any]
    ) -> None:
        """Remember a micro-batch that is about to run.

        Args:
            optimizer: whose step this is.
            backward: runs forward and backward, as the framework does (scaled, and divided by the
                number of micro-batches).
            forward: returns (loss, outputs) or the loss, for a refresh.
        """
        random = RandomState(optimizer._parameters.device)
        self._seen.append(_Seen(backward, forward, random))

    def finish(self, optimizer: Optimizer, scaler: Any = None) -> None:
        """Refresh the geometry if that is due, and run the second pass if one is needed.

        Args:
            optimizer: p.grad of its parameters holds g of all micro-batches.
            scaler: the GradScaler that scaled them.
        """
        seen, self._seen = self._seen, []
        now = RandomState(optimizer._parameters.device)
        with torch.enable_grad():
            optimizer.refresh_if_due([s.forward for s in seen])
            if optimizer.needs_second_pass:
                with optimizer.perturbed(scaler):
                    for s in seen:
                        s.random.restore()
                        s.backward()
                now.restore()


def find_optimizer(optimizer: Any) -> Optimizer:
    """Return the llqr.Optimizer inside a framework's wrapper."""
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer: expected a llqr.Optimizer, got {type(inner).__name__}")
    return inner
