"""Attention with several heads, for the vision transformer and for translation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Attention", "KeysValues"]

KeysValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Attend with several heads; q, k and v are layers of their own, so U has a block for each.

    Args:
        width: of the tokens.
        heads: number of heads, a divisor of ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Make the four projections."""
        super().__init__()
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads = {heads}, got {width}")
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Return k and v (batch, heads, tokens, width / heads) of memory (batch, tokens, width)."""
        return self._split_heads(self.k(memory)), self._split_heads(self.v(memory))

    def attend(
        self, x: Tensor, memory: KeysValues, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Return the attention of x (batch, tokens, width) to keys and values.

        Args:
            x: who asks.
            memory: from :meth:`keys_values`.
            mask: True where attention is allowed, broadcast to (batch, heads, asking, asked).
            causal: let token i see only the tokens up to i.
        """
        y = F.scaled_dot_product_attention(
            self._split_heads(self.q(x)), *memory, attn_mask=mask, is_causal=causal
        )
        return self.out(y.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention of x (batch, tokens, width) to itself."""
        return self.attend(x, self.keys_values(x), mask)
