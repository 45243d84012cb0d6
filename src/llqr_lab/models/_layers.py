"""What several convolutional networks share."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["PooledHead", "conv_3x3", "he_init", "norm_relu"]


def conv_3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the size (over stride), without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def norm_relu(channels: int) -> nn.Sequential:
    """Return batch normalisation and ReLU."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def he_init(model: nn.Module) -> None:
    """Draw convolutions as He et al. (2015) do for ReLU: variance 2 / (out * kernel); no biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PooledHead(nn.Module):
    """Average over positions, then a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, classes) of features (batch, channels, height, width)."""
        return self.linear(x.mean((2, 3)))
