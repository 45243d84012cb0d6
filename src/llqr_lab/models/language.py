"""A decoder-only transformer that predicts the next token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention

__all__ = ["LanguageModel"]


class CausalBlock(nn.Module):
    """Norm, causal attention, norm, two-layer network; each pair with a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shaped as x; token i sees the tokens up to i."""
        y = self.norm1(x)
        x = x + self.attention.attend(y, self.attention.keys_values(y), causal=True)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class LanguageModel(nn.Module):
    """Predict each token from those before it, with learned positions (as GPT-2).

    Args:
        tokens: size of the vocabulary.
        length: most tokens of a text.
        width: of the tokens' vectors.
        depth: number of blocks.
        heads: of the attention, a divisor of ``width``.

    Example:
        >>> import torch
        >>> model = LanguageModel(10, 6, width=8, depth=1, heads=2)
        >>> model(torch.zeros(3, 6, dtype=torch.long)).shape
        torch.Size([3, 6, 10])
    """

    def __init__(self, tokens: int, length: int, *, width: int, depth: int, heads: int) -> None:
        """Make the layers; linear ones and embeddings as normals of standard deviation 0.02."""
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(CausalBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, length, vocabulary) of tokens (batch, length)."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))
