"""Random crops, flips and Cutout, on a whole batch at once and on its device.

Every function takes a generator of its own, on the batch's device, so that the augmentation draws
the same numbers whatever else a method draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

__all__ = ["Augment", "cutout", "normalise", "random_crop", "random_flip"]


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Pad each image with zeros on all sides and cut its size out at a random place.

    Args:
        images: (n, channels, height, width).
        padding: pixels on each side; each of the (2 padding + 1)^2 places is equally likely.
        generator: of the batch's device.
    """
    n, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, n, 1), generator=generator, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    padded = F.pad(images, (padding,) * 4)
    which = torch.arange(n, device=images.device)[:, None, None]
    # The indices around the slice put the channels last.
    cut = padded[which, :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    chosen = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def cutout(images: Tensor, side: int, generator: Generator) -> Tensor:
    """Set a square of each image to zero (DeVries and Taylor, 2017).

    Args:
        images: (n, channels, height, width), normalised, so that zero is the mean.
        side: of the square in pixels. Its centre is uniform over the image, so that a part of the
            square may lie outside.
        generator: of the batch's device.
    """
    n, _, height, width = images.shape
    inside = []
    for extent in (height, width):
        centre = torch.randint(extent, (n, 1), generator=generator, device=images.device)
        distance = torch.arange(extent, device=images.device) - centre + side // 2
        inside.append((distance >= 0) & (distance < side))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole, 0)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (pixels / 255 - mean) / std, channel by channel, as float32.

    Args:
        pixels: (n, channels, height, width), values 0 .. 255.
        mean: of each channel, of values in [0, 1].
        std: of each channel.
    """
    shape = (1, -1, 1, 1)
    scale = 255 * torch.tensor(std, device=pixels.device).view(shape)
    shift = torch.tensor(mean, device=pixels.device).view(shape) * 255
    return (pixels.float() - shift) / scale


@dataclass(frozen=True)
class Augment:
    """Crop, flip, policy, normalise, Cutout, in this order.

    Attributes:
        mean: of each channel, of values in [0, 1].
        std: of each channel.
        padding: of the random crop; 0 leaves it out.
        flip: whether to mirror.
        hole: side of the Cutout square; 0 leaves it out.
        policy: what else is done to the bytes, such as RandAugment.

    Example:
        >>> import torch
        >>> augment = Augment(mean=(0.5,), std=(0.25,), padding=1, hole=2)
        >>> pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> augment(pixels, torch.Generator().manual_seed(0)).unique().tolist()
        [-2.0, 0.0]
    """

    mean: Sequence[float]
    std: Sequence[float]
    padding: int = 4
    flip: bool = True
    hole: int = 0
    policy: Callable[[Tensor, Generator], Tensor] | None = None

    def __call__(self, pixels: Tensor, generator: Generator) -> Tensor:
        """Return the batch to train on, float32."""
        if self.padding:
            pixels = random_crop(pixels, self.padding, generator)
        if self.flip:
            pixels = random_flip(pixels, generator)
        if self.policy is not None:
            pixels = self.policy(pixels, generator)
        x = normalise(pixels, self.mean, self.std)
        return cutout(x, self.hole, generator) if self.hole else x

    def without_augmentation(self, pixels: Tensor) -> Tensor:
        """Return the batch to evaluate on: only normalised."""
        return normalise(pixels, self.mean, self.std)
