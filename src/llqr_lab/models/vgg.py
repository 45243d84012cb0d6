"""VGG16 with batch normalisation (Simonyan and Zisserman, 2015) and one linear layer, for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ._layers import PooledHead, he_init, norm_relu

__all__ = ["vgg16_bn"]

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16_bn(
    classes: int, *, channels: int = 3, stages: Sequence[Sequence[int]] = VGG16
) -> nn.Sequential:
    """Return stages of convolution, norm, ReLU, each ended by a pooling that halves the size.

    Args:
        classes: number of classes (10 on CIFAR-10: 14,728,266 parameters).
        channels: of the images.
        stages: outputs of each convolution, stage by stage; the side of the images is at least
            2 to the number of stages.

    Example:
        >>> import torch
        >>> model = vgg16_bn(10, stages=[(4,), (8, 8)])
        >>> model(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    inputs = channels
    for stage in stages:
        for width in stage:
            # The convolutions keep their (redundant) biases, as in the usual parameter count.
            layers += [nn.Conv2d(inputs, width, 3, padding=1), norm_relu(width)]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, PooledHead(inputs, classes))
    he_init(model)
    return model
