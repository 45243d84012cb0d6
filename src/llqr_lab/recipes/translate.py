"""Beam search, BLEU and the token error of a translation model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.token_batches import Sentences, token_batches
from ..data.tokens import EOS, PAD
from ..data.vocabulary import Vocabulary
from ..models.translation import Cache, Translator

__all__ = ["beam_search", "corpus_bleu", "token_error", "translate_all"]


@torch.no_grad()
def beam_search(
    model: Translator,
    source: Tensor,
    *,
    beam: int = 5,
    factor: float = 1.2,
    extra: int = 10,
    penalty: float = 1.0,
) -> list[list[int]]:
    r"""Search the best translation of each sentence, scored by the mean log-probability.

    .. math:: s(y) = \frac{1}{|y|^{\alpha}} \sum_t \log p(y_t \mid y_{<t}, x)

    where :math:`|y|` counts ``</s>``. The ``beam`` best open prefixes are kept, and the ``beam``
    best ended ones. A sentence is done when no open prefix has a better score than the worst of
    ``beam`` ended ones (fairseq stops at the first ``beam``, which with few words ends on poor
    ones), and at the latest after ``factor`` times the length of the source plus ``extra`` tokens,
    where every prefix must end.

    Args:
        model: in evaluation mode.
        source: tokens (batch, tokens), padded.
        beam: width of the search.
        factor: of the greatest length.
        extra: of the greatest length.
        penalty: the exponent alpha.

    Returns:
        The tokens of each translation, without ``</s>``.
    """
    device, count = source.device, len(source)
    limits = (factor * ((source != PAD).sum(1) - 1) + extra).long()
    memory, mask = model.encode(source)
    first = beam * torch.arange(count, device=device)[:, None]  # the row of each sentence's beam
    rows = torch.arange(count, device=device).repeat_interleave(beam)
    cache, mask = _cache_rows(model.empty_cache(memory), rows), mask[rows]
    tokens = torch.full((count * beam, 1), EOS, device=device)
    # All beams of a sentence are equal at first: only one of them counts.
    scores = torch.full((count, beam), -torch.inf, device=device)
    scores[:, 0] = 0
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(count)]
    done = [False] * count
    for length in range(1, int(limits.max()) + 1):
        logits, cache = model.decode(tokens[:, -1:], cache, mask, start=length - 1)
        steps = _next_log_probabilities(logits[:, -1], (limits <= length).repeat_interleave(beam))
        size = steps.shape[1]
        totals = (scores[:, :, None] + steps.view(count, beam, size)).flatten(1)
        # Twice the beam: even if half of them end, the beam stays full.
        best, where = totals.topk(2 * beam)
        parents, words = where // size, where % size
        ends = words == EOS
        for b, k in (ends[:, :beam] & best[:, :beam].isfinite()).nonzero().tolist():
            if not done[b]:
                prefix = tokens[b * beam + int(parents[b, k]), 1:].tolist()
                ended[b].append((float(best[b, k]) / length**penalty, prefix))
        scores, kept = best.masked_fill(ends, -torch.inf).topk(beam)
        for b, hope in enumerate((scores[:, 0] / length**penalty).tolist()):
            ended[b] = sorted(ended[b], reverse=True)[:beam]
            full = len(ended[b]) == beam and ended[b][-1][0] >= hope
            done[b] = done[b] or full or hope == -torch.inf
        if all(done):
            break
        rows = (first + parents.gather(1, kept)).flatten()
        tokens = torch.cat([tokens[rows], words.gather(1, kept).view(-1, 1)], dim=1)
        cache = _cache_rows(cache, rows)
    return [best_first[0][1] for best_first in ended]


def _next_log_probabilities(logits: Tensor, last: Tensor) -> Tensor:
    """Return the log-probabilities of the next token: never padding, at the limit ``</s>``."""
    logs = logits.float().log_softmax(-1)
    logs[:, PAD] = -torch.inf
    others = torch.arange(logs.shape[1], device=logs.device) != EOS
    return logs.masked_fill(last[:, None] & others, -torch.inf)


def _cache_rows(cache: Cache, rows: Tensor) -> Cache:
    return [
        (
            (memory[0][rows], memory[1][rows]),
            None if past is None else (past[0][rows], past[1][rows]),
        )
        for memory, past in cache
    ]


def translate_all(
    model: Translator,
    sentences: Sentences,
    vocabulary: Vocabulary,
    *,
    beam: int = 5,
    penalty: float = 1.0,
    tokens: int = 4096,
) -> list[str]:
    """Return the translation of every sentence, in their order.

    Args:
        model: left in evaluation mode.
        sentences: whose source sides are translated.
        vocabulary: of the target language.
        beam: width of the search.
        penalty: the exponent of the length, see :func:`beam_search`.
        tokens: of a batch, at most.
    """
    model.eval()
    device = next(model.parameters()).device
    texts = [""] * len(sentences)
    for chosen in token_batches(sentences.lengths(), tokens):
        source = sentences.batch(chosen).source.to(device)
        best = beam_search(model, source, beam=beam, penalty=penalty)
        for i, found in zip(chosen, best, strict=True):
            texts[i] = vocabulary.decode(found)
    return texts


def corpus_bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Return the corpus BLEU of sacrebleu (13a tokens, as they are written), 0 to 100."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(translations), [list(references)]).score)


def token_error(logits: Tensor, target: Tensor) -> tuple[int, int]:
    """Return how many tokens of the target are not the likeliest, and how many there are.

    Args:
        logits: (batch, tokens, classes), of the true prefixes.
        target: (batch, tokens); padding does not count.
    """
    real = target != PAD
    wrong = (logits.argmax(-1) != target) & real
    return int(wrong.sum()), int(real.sum())
