"""Lightning's Trainer: the optimizer as it steps there, and the second pass of its loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from .. import _optimizer
from ._logs import log_refreshes as _log_refreshes
from ._micro_batches import MicroBatches, find_optimizer
from ._once import refuse_late_mixin, replace_attribute, silenced

__all__ = ["Optimizer", "TwoPasses", "log_refreshes"]

# Nothing of Lightning is imported: the mixin stands before a LightningModule.
if TYPE_CHECKING:
    Module = Any
else:
    Module = object


class Optimizer(_optimizer.Optimizer):
    """llqr.Optimizer for Lightning's Trainer; arguments and behaviour are the same but for one.

    Lightning hands a closure to every ``step``: the whole clean pass with automatic optimization,
    nothing at all with manual optimization. It is run once, and the second pass belongs to
    :class:`TwoPasses` or, with manual optimization, to ``passes`` in the training step.

    Example:
        >>> import torch, llqr.integrations.lightning
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.integrations.lightning.Optimizer(base, model)
        >>> optimizer.step(lambda: model(torch.ones(3, 2)).sum().backward())
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, if there is one, and update the parameters from ``p.grad``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_parameters()
        return loss


class TwoPasses(Module):  # type: ignore[misc]
    """Give automatic optimization its refresh and its second pass (mixin).

    It stands before LightningModule, and ``configure_optimizers`` returns an :class:`Optimizer`::

        class Net(TwoPasses, lightning.LightningModule): ...

    With ``accumulate_grad_batches`` the step is that of the joined batch. Gradient clipping and
    ``on_before_optimizer_step`` see the gradients of the second pass, unscaled. In the second pass
    ``self.log`` does nothing, and metrics (submodules or attributes with ``update``, ``compute``
    and ``reset``) are put back after it, so they count each batch once, at the clean weights. A
    batch whose ``training_step`` returns None is not run again. A class that overrides
    ``on_train_batch_start`` or ``optimizer_step`` calls ``super()``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class in which the mixin would do nothing."""
        super().__init_subclass__(**kwargs)
        refuse_late_mixin(cls, TwoPasses, ("lightning", "pytorch_lightning"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin as the LightningModule does."""
        super().__init__(*args, **kwargs)
        self._micro_batches = MicroBatches()
        self._unwatch: Callable[[], None] | None = None

    def refresh_step(self, batch: Any, batch_idx: int) -> Any:
        """Return (loss, outputs) of a batch, for a refresh; override it for the Fisher curvature.

        By default the loss of ``training_step`` alone, which the Newton curvature takes.
        """
        return self._loss(batch, batch_idx, self.training_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Remember the batch, until its step is done."""
        if self.automatic_optimization:
            if "dataloader_iter" in inspect.signature(self.training_step).parameters:
                raise TypeError(
                    "training_step(dataloader_iter): its batches cannot be run a second time; "
                    "take (batch, batch_idx), or use manual optimization with passes()"
                )
            optimizer = find_optimizer(self.optimizers())
            self._micro_batches.start(
                optimizer,
                lambda: self._backward(batch, batch_idx, optimizer),
                lambda: self.refresh_step(batch, batch_idx),
            )
            self._watch_backward()
        return super().on_train_batch_start(batch, batch_idx)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Run the second pass after the clean one, before unscaling, clipping and the update."""
        ours = find_optimizer(optimizer)
        if not isinstance(ours, Optimizer):
            raise TypeError(
                "configure_optimizers: TwoPasses needs llqr.integrations.lightning.Optimizer, "
                f"got {type(ours).__module__}.{type(ours).__name__}"
            )

        def closure() -> Any:
            loss = optimizer_closure()
            self._stop_watching()  # if this batch was skipped
            with silenced(self, "log"):
                scaler = getattr(self.trainer.precision_plugin, "scaler", None)
                self._micro_batches.finish(ours, scaler, self)
            return loss

        optimizer.step(closure=closure)

    def _watch_backward(self) -> None:
        """Let the next call of ``backward``, that of the clean pass, complete the micro-batch.

        Lightning calls it once, or not at all if the batch is skipped, and clears the gradients
        just before it. A hook that subclasses override without ``super()`` would not do.
        """
        self._stop_watching()  # if the last batch was skipped
        backward = self.backward

        def watched(*args: Any, **kwargs: Any) -> None:
            self._stop_watching()
            with self._micro_batches.clean_backward():
                backward(*args, **kwargs)

        self._unwatch = replace_attribute(self, "backward", watched)

    def _stop_watching(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the watch behind, as Lightning does the Trainer."""
        state: dict[str, Any] = {**super().__getstate__()}
        if state["_unwatch"] is not None:  # a copy would call the original's backward
            del state["backward"]
        return {**state, "_unwatch": None}

    def _backward(self, batch: Any, batch_idx: int, optimizer: Any) -> None:
        strategy = self.trainer.strategy
        loss = self._loss(batch, batch_idx, strategy.training_step)
        if loss is not None:
            strategy.backward(loss / self.trainer.accumulate_grad_batches, optimizer)

    def _loss(self, batch: Any, batch_idx: int, training_step: Callable[..., Any]) -> Any:
        """Return the loss of a training step, called as Lightning calls it."""
        takes_index = len(inspect.signature(self.training_step).parameters) > 1
        output = training_step(batch, batch_idx) if takes_index else training_step(batch)
        return output.get("loss") if isinstance(output, Mapping) else output


def log_refreshes(module: Any, *, prefix: str = "llqr/") -> RemovableHandle:
    """Log the numbers of every refresh with the loggers of the Trainer, at the optimizer's step.

    Call it in ``on_train_start`` of the module, with automatic or manual optimization::

        def on_train_start(self):
            log_refreshes(self)

    ``self.log`` is no help there: a refresh runs between the hooks in which it may be called.

    Args:
        module: the LightningModule, with one optimizer.
        prefix: as in :func:`llqr.integrations.numbers_of`.
    """

    def log(numbers: dict[str, float], step: int) -> None:
        for logger in module.trainer.loggers:
            logger.log_metrics(numbers, step=step)

    return _log_refreshes(module.optimizers(), log, prefix=prefix)
