"""The deep autoencoder of the literature on second-order methods."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

__all__ = ["autoencoder"]


def autoencoder(pixels: int, *, widths: Sequence[int] = (1000, 500, 250, 30)) -> nn.Sequential:
    """Return an encoder of sigmoid layers to a linear code, and its mirror image as decoder.

    The outputs are logits of the pixels. J. Martens (Deep learning via Hessian-free optimization,
    ICML 2010) and G. Hinton and R. Salakhutdinov (Science, 2006) have these widths for MNIST.

    Args:
        pixels: of an image.
        widths: of the encoder's layers, the code last.

    Example:
        >>> [layer.out_features for layer in autoencoder(64, widths=(32, 4)) if layer._parameters]
        [32, 4, 32, 64]
    """
    sides = [pixels, *widths]
    layers: list[nn.Module] = []
    for inputs, outputs in [*pairwise(sides), *pairwise(sides[::-1])]:
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    layers.pop()  # the outputs are logits
    del layers[2 * len(widths) - 1]  # the code is linear
    return nn.Sequential(*layers)
