"""The encoder-decoder of fairseq's IWSLT14 recipe (transformer_iwslt_de_en), norms after the sum.

As there: sinusoidal positions, embeddings times sqrt(width), ReLU, dropout on every branch and on
the embeddings, none inside the attention, and the last linear layer is the decoder's embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.tokens import PAD
from .attention import Attention, KeysValues

__all__ = ["Cache", "Translator", "translation_model"]

# One entry a layer: its keys and values of the encoder's output, and of the tokens so far.
Cache = list[tuple[KeysValues, KeysValues | None]]


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer network, each added and then normalised."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.network = Attention(width, heads), FeedForward(width, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the layer's output, shaped as x; ``mask`` is False at padding."""
        x = self.norm1(x + self.drop(self.attention(x, mask)))
        return self.norm2(x + self.drop(self.network(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, a two-layer network."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.cross = Attention(width, heads), Attention(width, heads)
        self.network = FeedForward(width, hidden)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: KeysValues, mask: Tensor, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Return the output, and the keys and values of all target tokens so far.

        Args:
            x: (batch, tokens, width): the whole target, or with ``past`` its newest token.
            memory: keys and values of the encoder's output.
            mask: False where the source is padding.
            past: keys and values of the tokens before x.
        """
        so_far = self.attention.keys_values(x)
        if past is not None:
            so_far = torch.cat([past[0], so_far[0]], 2), torch.cat([past[1], so_far[1]], 2)
        x = self.norm1(x + self.drop(self.attention.attend(x, so_far, causal=past is None)))
        x = self.norm2(x + self.drop(self.cross.attend(x, memory, mask)))
        return self.norm3(x + self.drop(self.network(x))), so_far


class Translator(nn.Module):
    """Translate by an encoder and a decoder; the decoder's embedding is also the last layer.

    Args:
        source: size of the source vocabulary.
        target: size of the target vocabulary.
        width: of the tokens, d.
        hidden: of the two-layer networks.
        heads: of each attention.
        layers: of the encoder, and of the decoder.
        dropout: probability on every branch and on the embeddings.

    Example:
        >>> import torch
        >>> model = Translator(11, 13, width=8, hidden=16, heads=2, layers=1)
        >>> model(torch.tensor([[5, 6, 1]]), torch.tensor([[1, 7]])).shape
        torch.Size([1, 2, 13])
    """

    def __init__(
        self,
        source: int,
        target: int,
        *,
        width: int = 512,
        hidden: int = 1024,
        heads: int = 4,
        layers: int = 6,
        dropout: float = 0.3,
    ) -> None:
        """Make and initialise the layers: Xavier weights, embeddings of variance 1 / width."""
        super().__init__()
        if width % 2:
            raise ValueError(f"width: expected an even number, for sines and cosines, got {width}")
        sizes = (width, hidden, heads, dropout)
        self.embed_source = nn.Embedding(source, width, padding_idx=PAD)
        self.embed_target = nn.Embedding(target, width, padding_idx=PAD)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(layers))
        self.drop = nn.Dropout(dropout)
        self._initialise_weights()

    def _initialise_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
                nn.init.zeros_(module.weight[PAD].data)
            elif isinstance(module, Attention):
                # Three layers that act as one of three times as many outputs.
                for layer in (module.q, module.k, module.v):
                    nn.init.xavier_uniform_(layer.weight, gain=1 / math.sqrt(2))

    def _embed_tokens(self, embedding: nn.Embedding, tokens: Tensor, start: int = 0) -> Tensor:
        width = embedding.embedding_dim
        x = math.sqrt(width) * embedding(tokens)
        return self.drop(x + sine_positions(start, tokens.shape[1], width, x))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's output (batch, tokens, width), and a mask that is False at padding.

        Args:
            source: tokens (batch, tokens), each row ended by ``</s>`` and then padded.
        """
        mask = (source != PAD)[:, None, None, :]
        x = self._embed_tokens(self.embed_source, source)
        for layer in self.encoder:
            x = layer(x, mask)
        return x, mask

    def forward(self, source: Tensor, prefix: Tensor) -> Tensor:
        """Return the logits (batch, tokens, target) of the token after each token of the prefix.

        Args:
            source: tokens (batch, tokens), ended by ``</s>``.
            prefix: the target's tokens (batch, tokens), shifted: it starts with ``</s>``.
        """
        memory, mask = self.encode(source)
        return self.decode(prefix, self.empty_cache(memory), mask)[0]

    def empty_cache(self, memory: Tensor) -> Cache:
        """Return the cache of an empty target."""
        return [(layer.cross.keys_values(memory), None) for layer in self.decoder]

    def decode(
        self, tokens: Tensor, cache: Cache, mask: Tensor, start: int = 0
    ) -> tuple[Tensor, Cache]:
        """Return the logits after each of ``tokens``, and the cache with them in it.

        Args:
            tokens: the first tokens of the target (batch, tokens); or, if the cache holds
                earlier ones, one more (batch, 1).
            cache: from :meth:`empty_cache` or from the call before.
            mask: False where the source is padding.
            start: how many tokens came before.
        """
        x = self._embed_tokens(self.embed_target, tokens, start)
        grown: Cache = []
        for layer, (memory, past) in zip(self.decoder, cache, strict=True):
            x, so_far = layer(x, memory, mask, past)
            grown.append((memory, so_far))
        return F.linear(x, self.embed_target.weight), grown


def sine_positions(start: int, count: int, width: int, like: Tensor) -> Tensor:
    """Return sines and cosines (count, width) of the positions from ``start`` on.

    Frequencies fall geometrically from 1 to 1 / 10000; sines fill the first half of the width.
    """
    half = width // 2
    where = torch.arange(start, start + count, device=like.device, dtype=torch.float32)
    falls = torch.arange(half, device=like.device, dtype=torch.float32) / max(half - 1, 1)
    angles = where[:, None] * torch.exp(-math.log(10000.0) * falls)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


def translation_model(classes: int, *, source: int, **settings: float) -> Translator:
    """Return the translation model; ``classes`` is the size of the target vocabulary.

    Args:
        classes: size of the target vocabulary.
        source: size of the source vocabulary. With fairseq's 8,848 German and 6,632 English
            tokens the model has 39,469,056 parameters.
        **settings: see :class:`Translator`.
    """
    return Translator(source, classes, **settings)  # type: ignore[arg-type]
