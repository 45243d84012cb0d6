"""Translation as the study sees it: padded pairs in, the logits of real tokens out, BLEU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..data.tokens import EOS, PAD
from ..models.translation import Translator
from ..recipes.translate import beam_search, corpus_bleu
from .data import Examples, vocabulary_of

__all__ = ["PairTranslator", "bleu", "token_loss"]


class PairTranslator(nn.Module):
    """A translator of padded pairs: no output is one of padding.

    A metric takes every row of the outputs for something that the loss looks at, so the rows of
    padding are left out here, not masked in the loss.

    Args:
        tokens: size of the vocabulary of both languages.
        **sizes: of :class:`llqr_lab.models.translation.Translator`.

    Example:
        >>> import torch
        >>> network = PairTranslator(11, width=8, hidden=16, heads=2, layers=1)
        >>> network(torch.tensor([[[5, 1, 0], [1, 7, 0]]])).shape
        torch.Size([2, 11])
    """

    def __init__(self, tokens: int, **sizes: Any) -> None:
        """Make the translator, without dropout unless it is asked for."""
        super().__init__()
        self.translator = Translator(tokens, tokens, **{"dropout": 0.0, **sizes})

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the logits (real tokens, vocabulary) of pairs (batch, 2, length)."""
        source, prefix = pairs.unbind(1)
        logits: Tensor = self.translator(source, prefix)
        return logits[prefix != PAD]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over the tokens that are no padding."""
    return F.cross_entropy(logits, targets[targets != PAD])


def bleu(source: str, tokens: int, network: nn.Module, examples: Examples) -> float:
    """Return the BLEU, 0 to 100, of the likeliest token after token.

    Args:
        source: of the pairs.
        tokens: size of their vocabulary.
        network: a :class:`PairTranslator` in evaluation mode.
        examples: of :func:`llqr_lab.study.data.pair_set`.
    """
    assert isinstance(network, PairTranslator)
    vocabulary = vocabulary_of(source, tokens)
    found = beam_search(network.translator, examples.inputs[:, 0], beam=1)
    wanted = [[t for t in row if t not in (PAD, EOS)] for row in examples.targets.tolist()]
    return corpus_bleu(*([vocabulary.decode(row) for row in rows] for rows in (found, wanted)))
