"""The loss of all batches and processes, and its gradient, at weights that are moved."""

from __future__ import annotations

import torch
from torch import Tensor

from ..curvature._forwards import RepeatableForward, split_loss_and_outputs
from ..curvature._graphs import gradients_of
from ._data import Data

__all__ = ["MeanLoss"]


class MeanLoss:
    """Evaluate the loss at w + d, d a flat vector, each time with the same random numbers.

    Args:
        data: what to measure on; it puts the weights back at the end.
    """

    def __init__(self, data: Data) -> None:
        if not all(p.is_leaf for p in data.active):
            raise ValueError(
                "parameters: one of them is computed from others, so that moving it would not move "
                "the loss; pass the tensors that the forward starts from"
            )
        self._data = data
        self._start = [p.detach().clone() for p in data.active]
        self._forwards = [RepeatableForward(f, data.active) for f in data.forwards]

    @property
    def weights(self) -> Tensor:
        """The weights w, flat."""
        return self._data.flatten(self._start)

    def losses(self, d: Tensor | None = None) -> Tensor:
        """Return the loss of each batch of this process at w + d, (B,), in float64."""
        self._move_to(d)
        with self._data.ranks.together("a forward"):
            # With grad mode on, for forwards that differentiate.
            values = [float(self._loss_of(f).detach()) for f in self._forwards]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def gradient(self, d: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the losses of this process's batches at w + d, and the mean gradient, flat."""
        data = self._data
        self._move_to(d)
        total = torch.zeros(data.dimension, dtype=data.dtype, device=data.device)
        values = []
        with data.ranks.together("a forward or a backward pass"):
            for share, forward in zip(data.shares.tolist(), self._forwards, strict=True):
                loss, gradient = self._differentiate(forward)
                values.append(loss)
                total.add_(gradient, alpha=share)
        data.ranks.sum_(total)
        return torch.tensor(values, dtype=torch.float64, device="cpu"), total

    def loss_of(self, index: int, d: Tensor | None = None) -> float:
        """Return the loss of one batch of this process at w + d."""
        self._move_to(d)
        return float(self._loss_of(self._forwards[index]).detach())

    def gradient_of(self, index: int, d: Tensor | None = None) -> tuple[float, Tensor]:
        """Return the loss of one batch of this process at w + d, and its own gradient, flat."""
        self._move_to(d)
        return self._differentiate(self._forwards[index])

    def check_start(self, losses: Tensor) -> None:
        """Refuse losses at w that are not finite."""
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if not self._data.ranks.all(not bad):
            told = f"the loss of batch {bad[0]} is {losses[bad[0]]}" if bad else "a loss is not"
            raise ValueError(f"forward: {told}; a rise is measured from a finite loss")

    def _differentiate(self, forward: RepeatableForward) -> tuple[float, Tensor]:
        with torch.enable_grad():
            loss = split_loss_and_outputs(forward())[0]
            gradient = gradients_of([loss], self._data.active)
        if all(g is None for g in gradient):
            raise ValueError(
                "forward: the loss does not depend on any of the parameters; compute it with the "
                "module whose parameters these are"
            )
        return float(loss.detach()), self._data.flatten(gradient)

    def _loss_of(self, forward: RepeatableForward) -> Tensor:
        with torch.enable_grad():
            return split_loss_and_outputs(forward())[0]

    @torch.no_grad()
    def _move_to(self, d: Tensor | None) -> None:
        """Put the weights at w + d, or at the very bits of w."""
        data = self._data
        steps = [None] * len(self._start) if d is None else data.unflatten(d)
        for p, w, step in zip(data.active, self._start, steps, strict=True):
            p.copy_(w if step is None else w + step.to(w.dtype))
