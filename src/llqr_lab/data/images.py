"""Labelled images that fit in memory: bytes as they lie on disk, and their statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Images", "Split"]


@dataclass(frozen=True)
class Images:
    """Images and their labels.

    Attributes:
        pixels: (n, channels, height, width), uint8.
        labels: (n,), int64, in 0 .. classes - 1.
        classes: number of classes.

    Raises:
        ValueError: the shapes, dtypes or labels do not fit.
    """

    pixels: Tensor
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        """Check what every later step relies on."""
        x, y = self.pixels, self.labels
        if x.dtype != torch.uint8 or x.dim() != 4:
            raise ValueError(
                f"pixels: expected uint8 (n, channels, height, width), got {x.dtype} "
                f"{tuple(x.shape)}"
            )
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise ValueError(f"labels: expected int64 ({len(x)},), got {y.dtype} {tuple(y.shape)}")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.classes:
            raise ValueError(
                f"labels: expected 0 .. {self.classes - 1}, got {int(y.min())} .. {int(y.max())}"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """Return the same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel, of values in [0, 1]."""
        # By value counts: exact sums without a float copy of all pixels.
        values = torch.arange(256, dtype=torch.float64) / 255
        means, deviations = [], []
        for channel in self.pixels.unbind(1):
            weights = torch.bincount(channel.flatten().int(), minlength=256).double().cpu()
            weights /= weights.sum()
            mean = (weights * values).sum()
            means.append(float(mean))
            deviations.append(float((weights * (values - mean) ** 2).sum().sqrt()))
        return tuple(means), tuple(deviations)


@dataclass(frozen=True)
class Split:
    """What to train on and what to evaluate on."""

    train: Images
    test: Images
