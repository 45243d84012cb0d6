"""Batches by tokens: every pair once, no batch too large, padding where it belongs."""

import pytest
import torch
from torch import Generator

from llqr_lab.data.token_batches import Sentences, token_batches
from llqr_lab.data.tokens import EOS, PAD
from llqr_lab.data.vocabulary import Words


def lengths() -> list[tuple[int, int]]:
    draws = torch.randint(1, 30, (200, 2), generator=Generator().manual_seed(0))
    return [(a, b) for a, b in draws.tolist()]


@pytest.mark.parametrize("seed", [None, 0])
def test_every_pair_once_and_no_batch_too_large(seed: int | None):
    pairs = lengths()
    generator = None if seed is None else Generator().manual_seed(seed)
    batches = list(token_batches(pairs, 64, generator))
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    sizes = [len(batch) * max(max(pairs[i]) for i in batch) for batch in batches]
    assert max(sizes) <= 64
    assert sum(sizes) / sum(max(pair) for pair in pairs) < 1.15  # little padding


def test_the_generator_decides_the_order():
    first, again, other = (
        list(token_batches(lengths(), 64, Generator().manual_seed(seed))) for seed in (0, 0, 1)
    )
    assert first == again != other
    largest = [max(max(lengths()[i]) for i in batch) for batch in first]
    assert largest != sorted(largest)


def test_a_pair_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="maximum: 1 pairs are longer than 8 tokens, .* number 1"):
        list(token_batches([(3, 8), (9, 2)], 8))


def test_a_batch():
    words = Words(["a a a b b c"])
    a, b, c = words.encode("a b c")[:3]
    sentences = Sentences([("a b", "c"), ("a", "b c a")], words, words)
    assert sentences.lengths() == [(3, 2), (2, 4)]
    batch = sentences.batch([1, 0])
    assert batch.source.tolist() == [[a, EOS, PAD], [a, b, EOS]]
    assert batch.prefix.tolist() == [[EOS, b, c, a], [EOS, c, PAD, PAD]]
    assert batch.target.tolist() == [[b, c, a, EOS], [c, EOS, PAD, PAD]]
    assert batch.to("meta").target.is_meta
