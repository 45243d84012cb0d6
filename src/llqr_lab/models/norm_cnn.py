"""A small convolutional network with batch norm."""

from __future__ import annotations

from torch import nn

from ._layers import conv_3x3, norm_relu

__all__ = ["norm_cnn"]


def norm_cnn(classes: int = 10, *, width: int = 16, image: int = 14) -> nn.Sequential:
    """Return two convolutions with batch norm and pooling, and two linear layers.

    Args:
        classes: outputs.
        width: channels of the first convolution; the second has twice as many (16, images of
            14 x 14: 23,994 parameters).
        image: side of the pictures, which have one channel.

    Example:
        >>> sum(p.numel() for p in norm_cnn().parameters())
        23994
    """
    side = image // 4  # two poolings by 2
    return nn.Sequential(
        conv_3x3(1, width), norm_relu(width), nn.MaxPool2d(2),
        conv_3x3(width, 2 * width), norm_relu(2 * width), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * side**2, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip
