"""Wide residual networks (Zagoruyko and Komodakis, 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from ._layers import PooledHead, conv_3x3, he_init, norm_relu

__all__ = ["wide_resnet"]


class PreActivation(nn.Module):
    """Norm and ReLU before each of two convolutions; a 1 x 1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = norm_relu(inputs)
        self.branch = nn.Sequential(
            conv_3x3(inputs, outputs, stride), norm_relu(outputs), conv_3x3(outputs, outputs)
        )
        self.shortcut = (
            None
            if inputs == outputs and stride == 1
            else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; a shortcut that is a convolution sees the activated x."""
        activated = self.first(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.branch(activated)


def wide_resnet(
    classes: int, *, channels: int = 3, depth: int = 28, widen: int = 10
) -> nn.Sequential:
    """Return WRN-depth-widen, without dropout: three stages of (depth - 4) / 6 blocks.

    Args:
        classes: number of classes (WRN-28-10 with 10: 36,479,194 parameters).
        channels: of the images.
        depth: 4 more than a multiple of 6.
        widen: the stages have 16, 32, 64 times as many channels.

    Raises:
        ValueError: depth is not 4 more than a multiple of 6.

    Example:
        >>> import torch
        >>> model = wide_resnet(10, depth=10, widen=1)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth: expected 6 n + 4 with n >= 1 (10, 16, 28), got {depth}")
    layers: list[nn.Module] = [conv_3x3(channels, 16)]
    inputs = 16
    for stage in range(3):
        outputs = 16 * widen * 2**stage
        for block in range(blocks):
            layers.append(PreActivation(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    model = nn.Sequential(*layers, norm_relu(inputs), PooledHead(inputs, classes))
    he_init(model)
    return model
