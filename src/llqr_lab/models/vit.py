"""The vision transformer of Table 9, with separate query, key and value projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["VisionTransformer"]


class Attention(nn.Module):
    """Attend with several heads; q, k and v are layers of their own, so U has a block for each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention of x (batch, tokens, width) to itself."""
        heads = [
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        ]
        y = F.scaled_dot_product_attention(*heads)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Norm, attention, norm, two-layer network; each pair with a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shaped as x."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Classify images by attention over patches (Dosovitskiy et al., 2021).

    Args:
        width: of the tokens, d.
        depth: number of blocks.
        heads: of the attention; width must be a multiple of it.
        patch: side of a patch in pixels.
        image: side of the image in pixels, a multiple of ``patch``.
        classes: number of classes.

    Example:
        >>> import torch
        >>> model = VisionTransformer(width=8, depth=1, heads=2, patch=4, image=8, classes=3)
        >>> model(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, *, width: int, depth: int, heads: int, patch: int, image: int, classes: int
    ) -> None:
        """Make the layers, initialized as torch does."""
        super().__init__()
        if image % patch:
            raise ValueError(f"image: expected a multiple of patch = {patch}, got {image}")
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads = {heads}, got {width}")
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, classes) of images (batch, 3, image, image)."""
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])
