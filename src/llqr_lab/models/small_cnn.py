"""A small convolutional network for the digits."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["small_cnn"]


def small_cnn(width: int = 16, classes: int = 10) -> nn.Sequential:
    """Return three 3 x 3 convolutions and a linear layer for (n, 1, 8, 8) pictures.

    Args:
        width: channels of the first convolution; the others have twice as many (16: 15,338
            parameters).
        classes: outputs.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, width, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(2 * width * 4, classes),
        )
    )
