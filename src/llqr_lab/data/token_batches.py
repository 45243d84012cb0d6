"""Batches of sentence pairs with a bounded number of tokens, padding included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from .pairs import Pair
from .tokens import EOS, PAD
from .vocabulary import Vocabulary

__all__ = ["Sentences", "TokenBatch", "token_batches"]


@dataclass(frozen=True)
class TokenBatch:
    """Padded token numbers.

    Attributes:
        source: (batch, tokens), each row ended by ``</s>``.
        prefix: what the decoder sees: ``</s>``, then the target without its ``</s>``.
        target: what it should say after each token of ``prefix``.
    """

    source: Tensor
    prefix: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the same on a device."""
        return TokenBatch(self.source.to(device), self.prefix.to(device), self.target.to(device))


class Sentences:
    """Sentence pairs as token numbers.

    Args:
        pairs: of text.
        source: vocabulary of the source language.
        target: vocabulary of the target language; may be the same.
    """

    def __init__(self, pairs: Sequence[Pair], source: Vocabulary, target: Vocabulary) -> None:
        """Encode all pairs."""
        self.pairs = pairs
        self.source = [source.encode(a) for a, _ in pairs]
        self.target = [target.encode(b) for _, b in pairs]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def lengths(self) -> list[tuple[int, int]]:
        """Return the tokens of each pair: source, target."""
        return [(len(a), len(b)) for a, b in zip(self.source, self.target, strict=True)]

    def batch(self, chosen: Sequence[int]) -> TokenBatch:
        """Return the chosen pairs, padded to the longest."""
        targets = [self.target[i] for i in chosen]
        return TokenBatch(
            _pad_rows([self.source[i] for i in chosen]),
            _pad_rows([[EOS, *t[:-1]] for t in targets]),
            _pad_rows(targets),
        )


def _pad_rows(rows: list[list[int]]) -> Tensor:
    return pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=PAD)


def token_batches(
    lengths: Sequence[tuple[int, int]], maximum: int, generator: Generator | None = None
) -> Iterator[list[int]]:
    """Yield lists of indices: pairs of like length, at most ``maximum`` tokens a side.

    Every pair occurs once. The tokens of a side are its pairs times the longest of them, padding
    included.

    Args:
        lengths: tokens of each pair, source and target.
        maximum: tokens a batch on either side.
        generator: draws the order of pairs of the same length, and that of the batches; None: by
            length, for evaluation.

    Raises:
        ValueError: a pair is longer than ``maximum``.
    """
    longest = [max(pair) for pair in lengths]
    too_long = [i for i, n in enumerate(longest) if n > maximum]
    if too_long:
        raise ValueError(
            f"maximum: {len(too_long)} pairs are longer than {maximum} tokens, the first is number "
            f"{too_long[0]} with {longest[too_long[0]]}; raise it or drop them"
        )
    count = len(lengths)
    order = range(count) if generator is None else torch.randperm(count, generator=generator)
    batches: list[list[int]] = []
    most = 0
    for i in sorted((int(i) for i in order), key=lambda i: (longest[i], lengths[i])):
        most = max(most, longest[i])
        if not batches or (len(batches[-1]) + 1) * most > maximum:
            batches.append([])
            most = longest[i]
        batches[-1].append(i)
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    yield from batches
