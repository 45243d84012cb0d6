"""The micro-batches of a step, kept until the second pass has run them again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._module_state import ForwardState
from .._optimizer import Optimizer
from .._random_state import RandomState
from ..distributed._sharded import local
from ._once import metrics_put_back

__all__ = ["MicroBatches", "find_optimizer"]


class _MicroBatch(NamedTuple):
    optimizer: Optimizer
    backward: Callable[[], Any]
    forward: Callable[[], Any]
    random: RandomState


class MicroBatches:
    """Micro-batches whose clean backward a framework runs one by one.

    Gradient accumulation is the step of the joined batch: after the last clean backward ``p.grad``
    holds g, and :meth:`finish` adds up g~ from all micro-batches again, each with the random
    numbers of its first run. Until then they are held, with what their functions refer to.

    What is held is what ``p.grad`` is made of. A micro-batch counts once its clean backward has
    completed, so one that failed or was skipped never does; and all are dropped if the gradients
    were cleared meanwhile, a step was taken, or another optimizer came.
    """

    def __init__(self) -> None:
        self._started: _MicroBatch | None = None
        self._start: ForwardState | None = None  # before the first micro-batch of the step
        self._seen: list[_MicroBatch] = []
        self._left = _Traces()

    def start(
        self, optimizer: Optimizer, backward: Callable[[], Any], forward: Callable[[], Any]
    ) -> None:
        """Take note of a micro-batch that is about to run; :meth:`clean_backward` completes it.

        Args:
            optimizer: whose step this is.
            backward: runs forward and backward, as the framework does (scaled, and divided by the
                number of micro-batches).
            forward: returns (loss, outputs) or the loss, for a refresh.
        """
        if self._begins_step(optimizer):
            probes = optimizer._probing.displaces
            self._start = optimizer._passes.keep_start() if probes else None
        random = RandomState(*optimizer._parameters.devices)
        self._started = _MicroBatch(optimizer, backward, forward, random)

    @contextmanager
    def clean_backward(self) -> Iterator[None]:
        """Count the micro-batch that was started, unless its clean backward in the body raises."""
        micro_batch, self._started = self._started, None
        assert micro_batch is not None
        optimizer = micro_batch.optimizer
        if self._begins_step(optimizer):
            self._seen = []
        yield
        self._seen.append(micro_batch)
        self._left = _Traces(optimizer)

    def _begins_step(self, optimizer: Optimizer) -> bool:
        """Tell whether nothing that is held is in the gradients of this optimizer."""
        if not self._seen:
            return True
        return self._seen[-1].optimizer is not optimizer or self._left.outdated(optimizer)

    def finish(
        self, optimizer: Optimizer, scaler: Any = None, module: nn.Module | None = None
    ) -> None:
        """Refresh the geometry if that is due, and run the second pass if one is needed.

        Nothing is done if no micro-batch counts.

        Args:
            optimizer: p.grad of its parameters holds g of all micro-batches.
            scaler: the GradScaler that scaled them.
            module: whose metrics count once; default: the optimizer's model.
        """
        seen, self._seen, self._left = self._seen, [], _Traces()
        start, self._start = self._start, None
        if not seen:
            return
        now = RandomState(*optimizer._parameters.devices)
        with torch.enable_grad(), metrics_put_back(optimizer.model if module is None else module):
            optimizer.refresh_if_due([m.forward for m in seen])
            # Also MSAM needs it here: the framework has run the first pass at theta.
            if optimizer._probing.displaces:
                try:
                    # As optimizer.perturbed(scaler), from the state before the first micro-batch.
                    with optimizer._passes.run_perturbed(scaler, start):
                        for m in seen:
                            m.random.restore()
                            m.backward()
                finally:
                    now.restore()

    def __reduce__(self) -> tuple[Any, ...]:
        # Batches and gradients stay behind in copies.
        return type(self), ()


class _Traces:
    """What tells later whether the gradients are still there.

    Args:
        optimizer: whose gradients a backward has just added to, or None.
    """

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self._counts = None if optimizer is None else _step_counts(optimizer)
        gradient = None if optimizer is None else next(_gradients_of(optimizer), None)
        # Weak: a gradient that was cleared must be free.
        self._first = None if gradient is None else weakref.ref(gradient)
        self._version = 0 if gradient is None else gradient._version

    def outdated(self, optimizer: Optimizer) -> bool:
        """Tell whether a step was taken or the gradients were cleared."""
        if self._counts != _step_counts(optimizer):
            return True
        gradient = next(_gradients_of(optimizer), None)
        if gradient is None:
            return True
        first = None if self._first is None else self._first()
        if gradient is first and gradient._version == self._version:
            return False  # without a look at values, for which a device would have to wait
        return not any(bool(local(g).any()) for g in _gradients_of(optimizer))


def _step_counts(optimizer: Optimizer) -> tuple[int, int]:
    return optimizer._progress.step, optimizer._progress.skipped_steps


def _gradients_of(optimizer: Optimizer) -> Iterator[Tensor]:
    parameters = optimizer._parameters.named.values()
    return (p.grad for p in parameters if p.grad is not None)


def find_optimizer(optimizer: Any) -> Optimizer:
    """Return the llqr.Optimizer inside a framework's wrapper."""
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer: expected a llqr.Optimizer, got {type(inner).__name__}")
    return inner
