"""A small convolutional network for the digits."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["small_cnn"]


def small_cnn(
    classes: int = 10, *, width: int = 16, channels: int = 1, image: int = 8
) -> nn.Sequential:
    """Return three 3 x 3 convolutions and a linear layer for square pictures.

    Group norm lets it train at large learning rates and radii, and needs no running statistics.

    Args:
        classes: outputs.
        width: channels of the first convolution, a multiple of 4; the others have twice as many
            (16: 15,418 parameters for the digits).
        channels: of the pictures.
        image: their side.
    """
    wide, side = 2 * width, -(-image // 4)  # two strides of 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, width, 3, padding=1, bias=False),
            norm1=nn.GroupNorm(4, width),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width, wide, 3, stride=2, padding=1, bias=False),
            norm2=nn.GroupNorm(4, wide),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(wide, wide, 3, stride=2, padding=1, bias=False),
            norm3=nn.GroupNorm(4, wide),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(side * side * wide, classes),
        )
    )
