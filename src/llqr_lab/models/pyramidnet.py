"""Deep pyramidal residual networks (Han et al., 2017), with basic blocks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import PooledHead, conv_3x3, he_init, norm_relu

__all__ = ["pyramidnet"]


class Pyramid(nn.Module):
    """Norm, convolution, norm, ReLU, convolution, norm; zeros widen the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(inputs),
            conv_3x3(inputs, outputs, stride),
            norm_relu(outputs),
            conv_3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.stride, self.wider = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, with at least as many channels as x."""
        # ceil_mode: an odd side is halved as the strided convolution halves it.
        shortcut = x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True)
        return self.branch(x) + F.pad(shortcut, (0, 0, 0, 0, 0, self.wider))


def pyramidnet(
    classes: int, *, channels: int = 3, depth: int = 110, alpha: float = 270
) -> nn.Sequential:
    """Return PyramidNet-depth: 3 n blocks, whose width grows from 16 to 16 + alpha in equal steps.

    The k-th block has round(16 + k alpha / 3n) channels; n = (depth - 2) / 6.

    Args:
        classes: number of classes (depth 110, alpha 270 with 10: 28,485,477 parameters).
        channels: of the images.
        depth: 2 more than a multiple of 6.
        alpha: the widening in all.

    Raises:
        ValueError: depth is not 2 more than a multiple of 6, or alpha is negative.

    Example:
        >>> import torch
        >>> model = pyramidnet(10, depth=8, alpha=6)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth: expected 6 n + 2 with n >= 1 (8, 110), got {depth}")
    if alpha < 0:
        raise ValueError(f"alpha: expected a number >= 0, got {alpha}")
    widths = [16, *(round(16 + k * alpha / (3 * blocks)) for k in range(1, 3 * blocks + 1))]
    halving = (blocks, 2 * blocks)
    model = nn.Sequential(
        conv_3x3(channels, widths[0]),
        nn.BatchNorm2d(widths[0]),
        *(Pyramid(widths[k], widths[k + 1], 2 if k in halving else 1) for k in range(3 * blocks)),
        norm_relu(widths[-1]),
        PooledHead(widths[-1], classes),
    )
    he_init(model)
    return model
