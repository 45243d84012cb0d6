"""The data of the problems: whole sets in memory, from which each seed draws what it trains on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import fashion_mnist as fashion_files
from ..data import libreoffice as help_files
from ..data.digits import digit_images
from ..data.errors import DataError
from ..data.noise import flip_labels
from ..data.number_words import number_words
from ..data.pairs import Pair, Pairs
from ..data.token_batches import Sentences
from ..data.tokens import PAD
from ..data.vocabulary import Bpe
from ..recipes.draws import generator_for

__all__ = ["Data", "Examples", "image_set", "pair_set", "seed_data", "text_set", "vocabulary_of"]

#: Folders of the data on a machine without the Debian packages, in the environment.
FASHION_MNIST, LIBREOFFICE_HELP = "FASHION_MNIST", "LIBREOFFICE_HELP"
RARE = 0  # the token of the characters that are not among the most frequent


class Examples(NamedTuple):
    """Inputs and targets, one of each per example."""

    inputs: Tensor
    targets: Tensor

    def at(self, rows: Tensor | slice) -> Examples:
        """Return some of the examples."""
        return Examples(self.inputs[rows], self.targets[rows])

    def to(self, device: torch.device) -> Examples:
        """Return the same on a device."""
        return Examples(self.inputs.to(device), self.targets.to(device))


class Data(NamedTuple):
    """What a seed trains on, what tuning looks at, and what the results are measured on."""

    train: Examples
    validation: Examples
    test: Examples


@cache
def image_set(source: str, side: int, pool: int, validation: int, test: int) -> Data:
    """Return images (n, 1, side, side), standardised by those of the pool, and their labels.

    Args:
        source: "fashion-mnist" or "digits".
        side: in pixels; what the images have, or half of it.
        pool: number of images that seeds draw from.
        validation: number of other training images.
        test: number of test images.

    Raises:
        DataError: the data are missing.
    """
    if source == "fashion-mnist":
        folder = os.environ.get(FASHION_MNIST, fashion_files.DEBIAN)
        split = fashion_files.fashion_mnist(folder)
    else:
        split = digit_images()
    part = split.train.pixels[: pool + validation], split.test.pixels[:test]
    train_x, test_x = (_shrink(x.float() / 255, side) for x in part)
    mean, std = train_x[:pool].mean(), train_x[:pool].std()
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    labels = split.train.labels
    return Data(
        Examples(train_x[:pool], labels[:pool]),
        Examples(train_x[pool:], labels[pool : pool + validation]),
        Examples(test_x, split.test.labels[:test]),
    )


def _shrink(images: Tensor, side: int) -> Tensor:
    factor = images.shape[-1] // side
    return F.avg_pool2d(images, factor) if factor > 1 else images


@cache
def text_set(source: str, length: int, tokens: int, pool: int, validation: int, test: int) -> Data:
    """Return English text as numbered characters, in pieces of ``length``; targets are the next.

    Args:
        source: "help-texts" (LibreOffice's help) or "number-words".
        length: characters of a piece.
        tokens: size of the vocabulary: the most frequent characters, and one for all others.
        pool: number of pieces that seeds draw from.
        validation: number of pieces from other pages.
        test: number of pieces from yet other pages.

    Raises:
        DataError: the data are missing.
    """
    pairs = _pairs_of(source)
    texts = ["\n".join(b for _, b in part) for part in (pairs.train, pairs.valid, pairs.test)]
    frequent = [c for c, _ in Counter(texts[0]).most_common(tokens - 1)]
    numbers = {character: 1 + i for i, character in enumerate(frequent)}
    parts = zip(texts, (pool, validation, test), strict=True)
    return Data(*(_pieces(text, numbers, length, count) for text, count in parts))


def _pairs_of(source: str) -> Pairs:
    if source == "number-words":
        return number_words()
    return help_files.libreoffice_help(os.environ.get(LIBREOFFICE_HELP, help_files.DEBIAN))


def _pieces(text: str, numbers: dict[str, int], length: int, count: int) -> Examples:
    coded = [numbers.get(character, RARE) for character in text[: count * length + 1]]
    stream = torch.tensor(coded)
    whole = (len(stream) - 1) // length * length
    return Examples(stream[:whole].view(-1, length), stream[1 : whole + 1].view(-1, length))


@cache
def vocabulary_of(source: str, tokens: int) -> Bpe:
    """Return a BPE of both languages of a source, learned from its training pairs.

    Raises:
        DataError: a package or the data are missing.
    """
    for package in ("tokenizers", "sacrebleu"):
        if find_spec(package) is None:
            raise DataError(f"{package}: not installed; pip install 'llqr[translation]'")
    return Bpe.learn(chain.from_iterable(_pairs_of(source).train), tokens)


@cache
def pair_set(source: str, longest: int, tokens: int, pool: int, validation: int, test: int) -> Data:
    """Return the sentence pairs of a source that are short in both languages, German to English.

    Inputs (n, 2, longest) are the German tokens and what the decoder sees of the English ones;
    targets (n, longest) are the English tokens. All are padded.

    Args:
        source: "help-texts" (LibreOffice's help) or "number-words".
        longest: tokens of a sentence, its end included; pairs with a longer one are left out.
        tokens: size of the vocabulary of both languages.
        pool: number of pairs that seeds draw from, at most.
        validation: number of pairs from other pages, at most.
        test: number of pairs from yet other pages, at most.

    Raises:
        DataError: the data are missing.
    """
    pairs, vocabulary = _pairs_of(source), vocabulary_of(source, tokens)

    def short(part: Sequence[Pair], count: int) -> Examples:
        known = Sentences(part, vocabulary, vocabulary)
        chosen = [i for i, pair in enumerate(known.lengths()) if max(pair) <= longest][:count]
        batch = known.batch(chosen)
        source, prefix, target = (
            F.pad(x, (0, longest - x.shape[1]), value=PAD)
            for x in (batch.source, batch.prefix, batch.target)
        )
        return Examples(torch.stack([source, prefix], 1), target)

    return Data(short(pairs.train, pool), short(pairs.valid, validation), short(pairs.test, test))


def seed_data(whole: Data, seed: int, train: int, noise: float, device: torch.device) -> Data:
    """Return the data of a seed: its own training examples, some with wrong labels.

    Args:
        whole: of the problem.
        seed: of the choice and of the wrong labels.
        train: number of training examples, drawn from the pool.
        noise: share of the training labels that are one of the nine others.
        device: of the data.
    """
    rows = torch.randperm(len(whole.train.inputs), generator=generator_for(seed, "subset"))[:train]
    drawn = whole.train.at(rows)
    if noise:
        wrong = flip_labels(drawn.targets, noise, 10, generator_for(seed, "noise"))
        drawn = Examples(drawn.inputs, wrong)
    return Data(*(part.to(device) for part in (drawn, whole.validation, whole.test)))
