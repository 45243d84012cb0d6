"""Hugging Face Accelerate: the second pass of an accumulated step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..curvature import split_loss_and_outputs
from ._micro_batches import MicroBatches, find_optimizer

__all__ = ["TwoPasses"]


class TwoPasses:
    """Run the micro-batches of ``accelerator.accumulate``, and all of them again at the last.

    Args:
        accelerator: the accelerate.Accelerator.
        optimizer: a llqr.Optimizer that ``accelerator.prepare`` returned.

    In place of ``accelerator.backward(loss)``, in the usual loop::

        two_passes = TwoPasses(accelerator, optimizer)
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = two_passes.backward(lambda: (criterion(z := model(x), y), z))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    A micro-batch whose forward or backward raises is not run again. If the loop goes on after it,
    clear the gradients, as in any loop: what was run before is then left out as well.
    """

    def __init__(self, accelerator: Any, optimizer: Any) -> None:
        """Take both as they were prepared."""
        self._accelerator, self._optimizer = accelerator, find_optimizer(optimizer)
        self._micro_batches = MicroBatches()

    def backward(self, forward: Callable[[], Any]) -> Tensor:
        """Run the clean pass of a micro-batch and, at the last one, the second pass of them all.

        Args:
            forward: returns the loss, or (loss, outputs), which a refresh in the Fisher needs.

        Returns:
            The clean loss, detached.
        """

        def run_again() -> None:
            self._accelerator.backward(split_loss_and_outputs(forward())[0])

        self._micro_batches.start(self._optimizer, run_again, forward)
        loss, _outputs = split_loss_and_outputs(forward())
        with self._micro_batches.clean_backward():
            self._accelerator.backward(loss)
        if self._accelerator.sync_gradients:
            self._micro_batches.finish(self._optimizer, self._accelerator.scaler)
        return loss.detach()
