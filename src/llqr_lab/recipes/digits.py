"""The demo's task: digits of which a share of the training labels is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.digits import CLASSES, VALIDATION, digits, digits_generator
from .build import network_of
from .digest import describe_data
from .task import Forward
from .workers import Workers

__all__ = ["NoisyDigits"]

Batch = tuple[Tensor, Tensor]  # pictures and labels


class NoisyDigits:
    """The digits in memory, normalised, without augmentation.

    Each purpose has one stream of random numbers per seed, as in the search that found the demo's
    settings; an epoch's or a refresh's draw is reached by making the earlier ones again.

    Args:
        config: of the run; ``input.holdout`` is 0 or the number of validation pictures.
        workers: the processes.

    Raises:
        ValueError: another number of pictures was to be held out.
    """

    metric = "test_accuracy"
    keys = frozenset(
        {"noise", "train.batch", "train.label_smoothing", "input.holdout", "refresh.batch"}
    )

    def __init__(self, config: DictConfig, workers: Workers) -> None:
        """Load the data and build the network."""
        self.config, self.workers = config, workers
        if (held := config.input.holdout) not in (0, VALIDATION):
            raise ValueError(f"input.holdout: expected 0 or {VALIDATION}, got {held}")
        data = digits(config.seed, noise=config.noise, validation=bool(held))
        self.train = data.train_x.to(workers.device), data.train_y.to(workers.device)
        self.test = data.test_x.to(workers.device), data.test_y.to(workers.device)
        self.count = len(data.train_y)
        # The seed draws the wrong labels and what is held out; the digest is that of all seeds.
        true = digits(0, noise=0.0, validation=bool(held))
        self.data_about = describe_data(
            f"{self.count:,} and {len(data.test_y):,} digits",
            *(true.train_x, true.true_y, true.test_x, true.test_y),
        )
        weights_seed = digits_generator(config.seed, "initialisation").initial_seed()
        sizes = {"channels": 1, "image": data.train_x.shape[-1]}
        self.network = network_of(
            config, workers.device, CLASSES, weights_seed=weights_seed, **sizes
        )
        self.steps = -(-self.count // config.train.batch)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this process's part of every batch of an epoch, from number ``first`` on."""
        order = self._draw_permutation("order", epoch)
        for chosen in order.split(self.config.train.batch)[first:]:
            yield self._pictures_at(chosen)

    def forward(self, model: nn.Module, batch: Batch, step: int) -> Forward:
        """Return the pass of a batch."""
        x, y = batch
        smoothing = self.config.train.label_smoothing

        def loss_and_logits() -> tuple[Tensor, Tensor]:
            logits = model(x)
            return F.cross_entropy(logits, y, label_smoothing=smoothing), logits

        return loss_and_logits

    def refresh(self, model: nn.Module, step: int) -> Forward:
        """Return the pass of a minibatch of its own."""
        # Refreshes that are due every llqr.every steps from step 0 on are numbered in turn; where
        # no interval is given, the gap grows, and the step itself is the number.
        number = step // (self.config.llqr.every or 1)
        chosen = self._draw_permutation("refresh", number)
        return self.forward(model, self._pictures_at(chosen[: self.config.refresh.batch]), step)

    def evaluate(self) -> dict[str, float]:
        """Return the accuracy (percent) on the pictures to evaluate on."""
        return {"test_accuracy": self._accuracy_on(*self.test)}

    def finish(self) -> dict[str, float]:
        """Return the accuracy (percent) on the labels that were trained on, wrong ones included."""
        return {"train_accuracy": self._accuracy_on(*self.train)}

    def _draw_permutation(self, purpose: str, number: int) -> Tensor:
        """Return the permutation of that number in a purpose's stream."""
        draws = digits_generator(self.config.seed, purpose)
        for _ in range(number):
            torch.randperm(self.count, generator=draws)
        return torch.randperm(self.count, generator=draws)

    def _pictures_at(self, chosen: Tensor) -> Batch:
        x, y = self.train
        mine = self.workers.own_part(chosen)
        return x[mine], y[mine]

    @torch.no_grad()
    def _accuracy_on(self, x: Tensor, y: Tensor) -> float:
        self.network.eval()
        return 100.0 * float((self.network(x).argmax(1) == y).double().mean())
