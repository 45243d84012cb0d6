"""Residual networks (He et al., 2016): ResNet-18 for CIFAR, ResNet-50 for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ._layers import PooledHead, conv_3x3, he_init, norm_relu

__all__ = ["ResNet", "resnet18", "resnet50"]


class Residual(nn.Module):
    """relu(shortcut(x) + branch(x)); the shortcut is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return self.relu(self.shortcut(x) + self.branch(x))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """Return a block of two 3 x 3 convolutions with ``width`` outputs."""
    branch = nn.Sequential(
        conv_3x3(inputs, width, stride),
        norm_relu(width),
        conv_3x3(width, width),
        nn.BatchNorm2d(width),
    )
    return Residual(inputs, width, stride, branch)


def bottleneck_block(inputs: int, width: int, stride: int) -> Residual:
    """Return a block 1 x 1, 3 x 3 (with the stride), 1 x 1, of 4 ``width`` outputs."""
    branch = nn.Sequential(
        nn.Conv2d(inputs, width, 1, bias=False),
        norm_relu(width),
        conv_3x3(width, width, stride),
        norm_relu(width),
        nn.Conv2d(width, 4 * width, 1, bias=False),
        nn.BatchNorm2d(4 * width),
    )
    return Residual(inputs, 4 * width, stride, branch)


class ResNet(nn.Module):
    """A stem, stages of residual blocks that halve the size and double the width, a head.

    Args:
        stem: the layers before the first stage; ``width`` outputs.
        block: ``"basic"`` or ``"bottleneck"`` (whose outputs are 4 times as wide).
        blocks: number of blocks of each stage.
        width: of the first stage.
        classes: number of classes.
    """

    def __init__(
        self, stem: nn.Module, *, block: str, blocks: Sequence[int], width: int, classes: int
    ) -> None:
        """Make the layers; convolutions drawn as He et al. do."""
        super().__init__()
        make, expansion = {"basic": (basic_block, 1), "bottleneck": (bottleneck_block, 4)}[block]
        widths = [width * 2**stage for stage in range(len(blocks))]
        outputs = [width, *(expansion * w for w in widths)]
        self.stem = stem
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    make(inputs, w, 1 if w == width else 2),
                    *(make(out, w, 1) for _ in range(count - 1)),
                )
                for (inputs, out), w, count in zip(pairwise(outputs), widths, blocks, strict=True)
            )
        )
        self.head = PooledHead(outputs[-1], classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, classes) of images (batch, channels, height, width)."""
        return self.head(self.stages(self.stem(images)))


def resnet18(
    classes: int, *, channels: int = 3, width: int = 64, blocks: Sequence[int] = (2, 2, 2, 2)
) -> ResNet:
    """Return ResNet-18 as CIFAR uses it: a 3 x 3 stem at full size, no pooling before the head.

    Args:
        classes: number of classes (10 on CIFAR-10: 11,173,962 parameters).
        channels: of the images.
        width: of the first stage.
        blocks: of each stage.

    Example:
        >>> import torch
        >>> model = resnet18(10, width=4, blocks=(1, 1))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    stem = nn.Sequential(conv_3x3(channels, width), norm_relu(width))
    return ResNet(stem, block="basic", blocks=blocks, width=width, classes=classes)


def resnet50(
    classes: int, *, channels: int = 3, width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3)
) -> ResNet:
    """Return ResNet-50 for ImageNet: a 7 x 7 stem that divides the size by 4, bottleneck blocks.

    The stride is on the 3 x 3 convolutions (version 1.5, as in torchvision).

    Args:
        classes: number of classes (1000 on ImageNet: 25,557,032 parameters).
        channels: of the images.
        width: of the first stage.
        blocks: of each stage.
    """
    stem = nn.Sequential(
        nn.Conv2d(channels, width, 7, 2, padding=3, bias=False),
        norm_relu(width),
        nn.MaxPool2d(3, 2, padding=1),
    )
    return ResNet(stem, block="bottleneck", blocks=blocks, width=width, classes=classes)
