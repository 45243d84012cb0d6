"""One plain training loop for a classifier on data that fits in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import llqr

from .data.digits import Dataset

__all__ = ["History", "accuracy", "train"]

Spectrum = dict[str, tuple[float, float]]


@dataclass
class History:
    """What a run leaves behind.

    Attributes:
        loss: mean training loss of each epoch (clean passes, before the step).
        test_accuracy: after each epoch, in percent.
        train_accuracy: of the last epoch's network on the labels it was trained on, in percent.
        reports: of every refresh.
        spectra: extreme eigenvalues of each layer's block of U after every refresh.
        skipped_steps: steps whose gradients were not finite.
        seconds: wall-clock time.
    """

    loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    train_accuracy: float = float("nan")
    reports: list[llqr.RefreshReport] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)
    skipped_steps: int = 0
    seconds: float = 0.0


def train(
    model: nn.Module,
    optimizer: llqr.Optimizer,
    data: Dataset,
    *,
    epochs: int,
    batch: int,
    order: torch.Generator,
    refresh_batch: int,
    refresh_order: torch.Generator,
) -> History:
    """Train with cross-entropy and a learning rate that falls to zero along a cosine.

    Args:
        model: the network; the same that the optimizer holds.
        optimizer: any method; see :func:`llqr_lab.methods.build`.
        data: what to train and to evaluate on.
        epochs: passes over the training data.
        batch: pictures a step; the last batch of an epoch may be smaller.
        order: shuffles the training data, once an epoch.
        refresh_batch: pictures of a refresh, drawn apart from the training batches.
        refresh_order: draws them.
    """
    history, began = History(), time.perf_counter()
    n = len(data.train_y)
    steps = epochs * -(-n // batch)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)

    def note(optimizer: llqr.Optimizer, report: llqr.RefreshReport) -> None:
        assert optimizer.geometry is not None
        history.reports.append(report)
        history.spectra.append(optimizer.geometry.spectrum())

    def forward_on(chosen: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        x, y = data.train_x[chosen], data.train_y[chosen]

        def forward() -> tuple[Tensor, Tensor]:
            logits = model(x)
            return nn.functional.cross_entropy(logits, y), logits

        return forward

    remove = optimizer.register_refresh_hook(note)
    for _ in range(epochs):
        model.train()
        losses = []
        for chosen in torch.randperm(n, generator=order).split(batch):
            refresh = None
            if optimizer.refresh_due:
                drawn = torch.randperm(n, generator=refresh_order)[:refresh_batch]
                refresh = forward_on(drawn)
            losses.append(optimizer.minimize(forward_on(chosen), refresh=refresh))
            scheduler.step()
        history.loss.append(float(torch.stack(losses).mean()))
        history.test_accuracy.append(accuracy(model, data.test_x, data.test_y))
    remove()
    history.train_accuracy = accuracy(model, data.train_x, data.train_y)
    history.skipped_steps = optimizer.skipped_steps
    history.seconds = time.perf_counter() - began
    return history


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers in evaluation mode, in percent."""
    model.eval()
    return 100.0 * float((model(x).argmax(1) == y).double().mean())
