"""Hugging Face Trainer: the second pass of its training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .._optimizer import Optimizer
from .._warnings import warn_caller
from ._logs import log_refreshes as _log_refreshes
from ._micro_batches import MicroBatches, find_optimizer
from ._once import refuse_late_mixin, silenced

__all__ = ["TwoPasses", "log_refreshes"]

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
    acts on the gradients of the second pass, in which ``self.log`` does nothing. A refresh takes
    the loss and the logits, from a model output, a dict or a tuple.

    The Trainer uses ``learning_rate``, ``weight_decay``, ``optim`` and ``adam_*`` of its arguments
    only for an optimizer that it makes itself. With a finished one the base's own count, and a
    warning names what was set in vain; the schedule (``lr_scheduler_type``, ``warmup_steps``) acts.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class in which the mixin would do nothing."""
        super().__init_subclass__(**kwargs)
        refuse_late_mixin(cls, TwoPasses, ("transformers",))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin as the Trainer does."""
        super().__init__(*args, **kwargs)
        self._micro_batches = MicroBatches()
        if isinstance(self.optimizer, Optimizer):
            unused = _unused_arguments(self.args, self.optimizer)
            if unused:
                warn_caller(
                    f"TrainingArguments: {' and '.join(unused)}; the Trainer does not use these "
                    "with a finished optimizer: set them in the base optimizer"
                )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch and, at the last one of a step, all of them again at theta + eps."""
        optimizer, clean = find_optimizer(self.optimizer), super().training_step
        self._micro_batches.start(
            optimizer,
            lambda: clean(model, inputs, num_items_in_batch),
            lambda: self.refresh_step(model, inputs, num_items_in_batch),
        )
        with self._micro_batches.clean_backward():
            loss: Tensor = clean(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            with silenced(self, "log"):
                self._micro_batches.finish(optimizer, self.accelerator.scaler)
        return loss

    def refresh_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Return (loss, logits) of a micro-batch, for a refresh; the loss alone without logits.

        Override it if the loss is computed from something else than the logits.

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
        loss = loss * (self.current_gradient_accumulation_steps if added else 1)
        logits = _logits_of(outputs)
        return loss if logits is None else (loss, logits)


def log_refreshes(trainer: Any, *, prefix: str = "llqr/") -> RemovableHandle:
    """Log the numbers of every refresh by ``trainer.log``: ``report_to``, and ``log_history``.

    Call it after the Trainer was made and before ``train()``.

    Args:
        trainer: a Trainer with :class:`TwoPasses`, which was handed a llqr.Optimizer.
        prefix: as in :func:`llqr.integrations.numbers_of`.
    """
    log = trainer.log  # the method itself: the name is silenced while a refresh runs
    return _log_refreshes(trainer.optimizer, lambda numbers, step: log(numbers), prefix=prefix)


#: What the Trainer would give an optimizer of its own: {argument: key of a parameter group}.
_GROUP_KEYS = {"learning_rate": "lr", "weight_decay": "weight_decay"}


def _unused_arguments(arguments: Any, optimizer: Optimizer) -> list[str]:
    """Return what was set by hand and is the value of no parameter group, in words."""
    defaults = {f.name: f.default for f in fields(arguments)}
    unused = []
    for name, key in _GROUP_KEYS.items():
        asked = getattr(arguments, name)
        # A scheduler may have changed lr already.
        used = {
            value
            for group in optimizer.param_groups
            for value in (group.get(key), group.get(f"initial_{key}"))
            if value is not None
        }
        if asked != defaults[name] and asked not in used:
            has = ", ".join(f"{value:g}" for value in sorted(used)) or f"no {key}"
            unused.append(f"{name}={asked:g}, but the base optimizer has {has}")
    return unused


def _logits_of(outputs: Any) -> Any:
    """Return what a model's outputs hold besides the loss, as the Trainer's evaluation reads them.

    Args:
        outputs: a dict or object with ``logits`` or with entries that end so (``start_logits``), a
            tuple (loss, logits, ...) or, if the loss is computed outside the model, (logits, ...)
            or the logits themselves.

    Returns:
        A tensor, or several in a list or dict; None if there are no logits.
    """
    if isinstance(outputs, Tensor):
        return outputs if outputs.dim() > 0 else None
    if isinstance(outputs, (tuple, list)) and not hasattr(outputs, "_fields"):
        after_loss = isinstance(outputs[0], Tensor) and outputs[0].dim() == 0
        return next(iter(outputs[1:] if after_loss else outputs), None)
    if hasattr(outputs, "_asdict"):  # a named tuple
        outputs = outputs._asdict()
    entries = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    if entries.get("logits") is not None:
        return entries["logits"]
    found = {k: v for k, v in entries.items() if str(k).endswith("logits") and v is not None}
    return found or None
