"""Hugging Face Accelerate: the second pass of an accumulated step."""

from __future__ import annotations

import dis
from collections.abc import Callable
from types import CellType
from typing import Any

from torch import Tensor

from .._checks import short_repr
from ..curvature import split_loss_and_outputs
from ..curvature._forwards import tensors_in
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

            def forward(x=x, y=y):  # binds the batch: it is called again at the last micro-batch
                logits = model(x)
                return criterion(logits, y), logits

            with accelerator.accumulate(model):
                loss = two_passes.backward(forward)
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
            forward: returns the loss, or (loss, outputs), which a refresh in the Fisher needs. It
                is called again at the last micro-batch, and must then see the same batch.

        Returns:
            The clean loss, detached.

        Raises:
            ValueError: a variable that ``forward`` reads holds another batch by then.
        """
        if not callable(forward):
            raise TypeError(
                f"forward: expected a function that returns the loss, got {short_repr(forward)}"
            )
        read = _tensors_read_by(forward)

        def forward_again() -> Any:
            now = _tensors_read_by(forward)
            for name, tensors in read.items():
                if not _same_objects(tensors, now.get(name, [])):
                    raise ValueError(
                        f"forward: {name!r} is no longer what it was when this micro-batch ran; "
                        f"bind it, as in def forward({name}={name})"
                    )
            return forward()

        def run_again() -> None:
            self._accelerator.backward(split_loss_and_outputs(forward_again())[0])

        self._micro_batches.start(self._optimizer, run_again, forward_again)
        loss, _outputs = split_loss_and_outputs(forward())
        with self._micro_batches.clean_backward():
            self._accelerator.backward(loss)
        if self._accelerator.sync_gradients:
            self._micro_batches.finish(self._optimizer, self._accelerator.scaler)
        return loss.detach()


def _tensors_read_by(function: Callable[..., Any]) -> dict[str, list[Tensor]]:
    """Return {variable: its tensors} of what a function reads from outside when it is called."""
    code = getattr(function, "__code__", None)
    if code is None:  # functools.partial and objects hold what they were given
        return {}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    values = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    used = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    # By their instructions: code.co_names has the names of attributes as well.
    known = function.__globals__
    values |= {name: known[name] for op, name in used if op == "LOAD_GLOBAL" and name in known}
    written = {name for op, name in used if op in ("STORE_DEREF", "STORE_GLOBAL")}
    return {
        name: found
        for name, value in values.items()
        if name not in written and (found := tensors_in(value))
    }


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _same_objects(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
