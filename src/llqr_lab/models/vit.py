"""The vision transformer (Dosovitskiy et al., 2021), with separate query, key and value layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention

__all__ = ["SIZES", "VisionTransformer", "vit"]

SIZES = {
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
}
EPS = 1e-6  # of the norms, as in the original


class Block(nn.Module):
    """Norm, attention, norm, two-layer network; each pair with a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shaped as x."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Classify images by attention over patches.

    Weights start as truncated normals of standard deviation 0.02, biases and the class token at
    zero.

    Args:
        width: of the tokens, d.
        depth: number of blocks.
        heads: of the attention; width must be a multiple of it.
        patch: side of a patch in pixels.
        image: side of the image in pixels, a multiple of ``patch``.
        classes: number of classes.
        channels: of the images.

    Raises:
        ValueError: image or width is no multiple of what it is cut into.

    Example:
        >>> import torch
        >>> model = VisionTransformer(width=8, depth=1, heads=2, patch=4, image=8, classes=3)
        >>> model(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        image: int,
        classes: int,
        channels: int = 3,
    ) -> None:
        """Make and initialise the layers."""
        super().__init__()
        if image % patch:
            raise ValueError(f"image: expected a multiple of patch = {patch}, got {image}")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, EPS)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, classes) of images (batch, channels, image, image)."""
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(
    classes: int,
    *,
    size: str = "Ti",
    patch: int = 16,
    image: int = 224,
    channels: int = 3,
    **sizes: int,
) -> VisionTransformer:
    """Return a vision transformer by the name of its size.

    Args:
        classes: number of classes.
        size: ``"Ti"``, ``"S"``, ``"B"`` or ``"L"``.
        patch: side of a patch in pixels.
        image: side of the image in pixels.
        channels: of the images.
        **sizes: width, depth or heads, in place of those that the name stands for.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    sizes = {**SIZES[size], **sizes}
    return VisionTransformer(**sizes, patch=patch, image=image, classes=classes, channels=channels)
