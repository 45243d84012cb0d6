"""Symmetric label noise with an exact rate."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

__all__ = ["flip_labels"]


def flip_labels(labels: Tensor, rate: float, classes: int, generator: Generator) -> Tensor:
    """Return labels of which round(rate n), drawn at random, are wrong: uniform over the others.

    Args:
        labels: (n,) true labels in 0 .. classes - 1.
        rate: in [0, 1]; the exact share of wrong labels, up to rounding.
        classes: number of classes, at least 2.
        generator: where the draws come from, on the labels' device.

    Raises:
        ValueError: rate or classes is out of range.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a number in [0, 1], got {rate!r}")
    if classes < 2:
        raise ValueError(
            f"classes: expected at least 2, so that a label can be wrong, got {classes}"
        )
    device = labels.device
    chosen = torch.randperm(len(labels), generator=generator, device=device)
    chosen = chosen[: round(rate * len(labels))]
    away = torch.randint(1, classes, (len(chosen),), generator=generator, device=device)
    flipped = labels.clone()
    flipped[chosen] = (labels[chosen] + away) % classes
    return flipped
