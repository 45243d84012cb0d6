"""Hugging Face Trainer: the second pass of its training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._micro_batches import MicroBatches, find_optimizer

__all__ = ["TwoPasses"]

# Nothing of transformers is imported: the mixin stands before a Trainer.
if TYPE_CHECKING:
    Trainer = Any
else:
    Trainer = object


class TwoPasses(Trainer):  # type: ignore[misc]
    """Give a transformers.Trainer its refresh and its second pass (mixin).

    It stands before Trainer, which is handed a llqr.Optimizer::

        class LLQRTrainer(TwoPasses, transformers.Trainer): ...

        trainer = LLQRTrainer(model, args, ..., optimizers=(optimizer, None))

    With ``gradient_accumulation_steps`` the step is that of the joined batch. Gradient clipping
    acts on the gradients of the second pass. A refresh takes the loss and ``outputs.logits``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin as the Trainer does."""
        super().__init__(*args, **kwargs)
        self._micro_batches = MicroBatches()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch and, at the last one of a step, all of them again at theta + eps."""
        optimizer, clean = find_optimizer(self.optimizer), super().training_step

        def backward() -> Tensor:
            loss: Tensor = clean(model, inputs, num_items_in_batch)
            return loss

        self._micro_batches.record(
            optimizer, backward, lambda: self.refresh_step(model, inputs, num_items_in_batch)
        )
        loss = backward()
        if self.accelerator.sync_gradients:
            self._micro_batches.finish(optimizer, self.accelerator.scaler)
        return loss

    def refresh_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Return (loss, logits) of a micro-batch, for a refresh.

        A refresh takes the mean over micro-batches. Where the Trainer adds their losses up, since
        each is divided by the number of items in all of them, the loss is scaled to that.
        """
        inputs = self._prepare_inputs(inputs)
        loss, outputs = self.compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        added = self.loss_is_scaled_for_ga
        if added is None:
            divided = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            added = divided or self.compute_loss_func is not None
        factor = self.current_gradient_accumulation_steps if added else 1
        return loss * factor, outputs.logits
