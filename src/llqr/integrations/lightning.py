"""Lightning's Trainer: the optimizer as it steps there, and the second pass of its loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .. import _optimizer
from ._micro_batches import MicroBatches, find_optimizer

__all__ = ["Optimizer", "TwoPasses"]

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
    ``on_before_optimizer_step`` see the gradients of the second pass, unscaled; in the second pass
    ``self.log`` does nothing. A class that overrides ``on_train_batch_start`` or
    ``optimizer_step`` calls ``super()``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin as the LightningModule does."""
        super().__init__(*args, **kwargs)
        self._micro_batches = MicroBatches()

    def refresh_step(self, batch: Any, batch_idx: int) -> Any:
        """Return (loss, outputs) of a batch, for a refresh; override it for the Fisher curvature.

        By default the loss of ``training_step`` alone, which the Newton curvature takes.
        """
        return self._loss(batch, batch_idx, self.training_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Remember the batch, until its step is done."""
        if self.automatic_optimization:
            optimizer = find_optimizer(self.optimizers())
            self._micro_batches.record(
                optimizer,
                lambda: self._backward(batch, batch_idx, optimizer),
                lambda: self.refresh_step(batch, batch_idx),
            )
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
            with self._not_logging():
                scaler = getattr(self.trainer.precision_plugin, "scaler", None)
                self._micro_batches.finish(ours, scaler)
            return loss

        optimizer.step(closure=closure)

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

    @contextmanager
    def _not_logging(self) -> Iterator[None]:
        self.__dict__["log"] = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del self.__dict__["log"]
