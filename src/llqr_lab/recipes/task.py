"""What a training loop asks of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

__all__ = ["Forward", "Task"]

Forward = Callable[[], tuple[Tensor, Tensor]]  # to the loss and the outputs


class Task(Protocol):
    """Data and a network.

    Attributes:
        network: to train, on the device; the loop wraps it for several processes.
        metric: the entry of :meth:`evaluate` that a table shows; the higher the better.
        steps: batches of an epoch.
        keys: what it reads of the configuration besides the optimizer's and the loop's keys.
        data_about: of :func:`~llqr_lab.recipes.digest.describe_data`.
    """

    network: nn.Module
    metric: str
    steps: int
    keys: ClassVar[frozenset[str]]
    data_about: Mapping[str, str]

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Yield this process's part of every batch of an epoch, from number ``first`` on."""

    def forward(self, model: nn.Module, batch: Any, step: int) -> Forward:
        """Return the pass of a training batch; the same inputs each time it is called."""

    def refresh(self, model: nn.Module, step: int) -> Forward:
        """Return the pass of the refresh minibatch of a step."""

    def evaluate(self) -> dict[str, float]:
        """Return what the network does on the data to evaluate on."""

    def finish(self) -> dict[str, float]:
        """Return what is measured once, at the end."""
