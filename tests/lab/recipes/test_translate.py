"""Beam search against a slow search that recomputes everything, and against all translations."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from llqr_lab.data.token_batches import Sentences
from llqr_lab.data.tokens import EOS, PAD
from llqr_lab.data.vocabulary import Words
from llqr_lab.models.translation import Translator
from llqr_lab.recipes.translate import beam_search, corpus_bleu, token_error, translate_all

SOURCE = torch.tensor([[5, 6, 7, EOS], [4, 3, EOS, PAD], [3, EOS, PAD, PAD]])


def tiny(target: int = 7, seed: int = 0) -> Translator:
    torch.manual_seed(seed)
    model = Translator(9, target, width=8, hidden=16, heads=2, layers=2).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)  # so that the distributions are far from uniform
    return model


def log_probabilities(model: Translator, source: Tensor, prefix: list[int]) -> list[float]:
    row = source[source != PAD][None]
    with torch.no_grad():
        logits = model(row, torch.tensor([[EOS, *prefix]]))[0, -1]
    return logits.log_softmax(-1).tolist()


def score(model: Translator, source: Tensor, sentence: list[int]) -> float:
    tokens = [*sentence, EOS]
    parts = [log_probabilities(model, source, tokens[:t])[w] for t, w in enumerate(tokens)]
    return sum(parts) / len(tokens)


def slow_search(model: Translator, source: Tensor, beam: int, limit: int) -> list[int]:
    """The same rules with lists, one sentence at a time and without a cache."""
    open_, ended = [(0.0, [])], []
    for length in range(1, limit + 1):
        candidates = []
        for total, prefix in open_:
            for word, value in enumerate(log_probabilities(model, source, prefix)):
                if word != PAD and (length < limit or word == EOS):
                    candidates.append((total + value, prefix, word))
        candidates.sort(key=lambda c: -c[0])
        for total, prefix, word in candidates[:beam]:
            if word == EOS:
                ended.append((total / length, prefix))
        ended = sorted(ended, reverse=True)[:beam]
        open_ = [(total, [*prefix, w]) for total, prefix, w in candidates if w != EOS][:beam]
        if not open_ or (len(ended) == beam and ended[-1][0] >= open_[0][0] / length):
            break
    return ended[0][1]


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_is_the_slow_search(beam: int, seed: int):
    model = tiny(seed=seed)
    found = beam_search(model, SOURCE, beam=beam, factor=1.5, extra=2)
    for row, sentence in zip(SOURCE, found, strict=True):
        limit = int(1.5 * (int((row != PAD).sum()) - 1) + 2)
        assert sentence == slow_search(model, row, beam, limit)


def test_a_beam_that_holds_everything_finds_the_best_of_all():
    model = tiny(target=5)
    words = [w for w in range(5) if w not in (PAD, EOS)]
    every = [list(s) for n in range(4) for s in itertools.product(words, repeat=n)]
    found = beam_search(model, SOURCE[:1], beam=len(every), factor=0, extra=4)
    best = max(every, key=lambda s: score(model, SOURCE[0], s))
    assert found == [best]


def test_every_translation_ends():
    model = tiny()
    found = beam_search(model, SOURCE, beam=2, factor=0, extra=1)
    assert found == [[], [], []]


def test_a_trained_model_says_what_it_was_taught():
    torch.manual_seed(0)
    pairs = [("a b c", "d d"), ("c b", "b a c d"), ("d", "a"), ("b b d a", "c c a")]
    words = Words(["a b c d"])
    sentences = Sentences(pairs, words, words)
    size = len(words)
    model = Translator(size, size, width=16, hidden=32, heads=2, layers=1, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = sentences.batch(range(len(pairs)))
    for _ in range(60):
        optimizer.zero_grad()
        logits = model(batch.source, batch.prefix)
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.target.flatten(), ignore_index=PAD
        ).backward()
        optimizer.step()
    assert token_error(model(batch.source, batch.prefix), batch.target) == (0, 14)
    assert translate_all(model, sentences, words) == [target for _, target in pairs]


def test_translate_keeps_the_order_and_the_dropout_off():
    words = Words(["a a a a b b b c c d"])
    pairs = [("a b c", "c b"), ("d", "d"), ("c d", "a a b")]
    sentences = Sentences(pairs, words, words)
    model = tiny(target=len(words)).train()
    texts = translate_all(model, sentences, words, beam=2, tokens=8)
    assert not model.training
    for (source, _), text in zip(pairs, texts, strict=True):
        tokens = torch.tensor([words.encode(source)])
        assert text == words.decode(beam_search(model, tokens, beam=2)[0])


def test_bleu_is_the_formula():
    pytest.importorskip("sacrebleu", reason="the extra 'translation' is not installed")
    reference = "the cat sat on the red mat ."
    assert corpus_bleu([reference], [reference]) == pytest.approx(100)
    # 8 words of which 7 match, 7 pairs of which 5, 6 triples of which 3, 5 fours of which 2.
    translation = "the cat sat on the blue mat ."
    expected = 100 * math.prod([7 / 8, 5 / 7, 3 / 6, 2 / 5]) ** 0.25
    assert corpus_bleu([translation], [reference]) == pytest.approx(expected)


def test_token_error():
    target = torch.tensor([[3, 4, EOS], [4, EOS, PAD]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 3, EOS], [4, 4, 5]]), 7).double()
    assert token_error(logits, target) == (2, 5)
