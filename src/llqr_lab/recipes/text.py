"""Translation, German to English."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.errors import DataError
from ..data.iwslt14 import iwslt14_raw, iwslt14_tokenised
from ..data.libreoffice import libreoffice_help
from ..data.number_words import number_words
from ..data.pairs import Pairs
from ..data.token_batches import Sentences, TokenBatch, token_batches
from ..data.tokens import PAD
from ..data.vocabulary import Bpe, Vocabulary, Words
from .build import network_of
from .config import source_of
from .digest import describe_data
from .draws import generator_for
from .task import Forward
from .translate import corpus_bleu, token_error, translate_all
from .workers import Workers

__all__ = ["Translation", "read_pairs"]


def read_pairs(config: DictConfig) -> tuple[Pairs, Vocabulary, Vocabulary]:
    """Load the pairs and the vocabularies of both languages.

    Raises:
        ValueError: there is no such data set.
        DataError: the data are missing or damaged.
    """
    for package in ("tokenizers", "sacrebleu"):
        if find_spec(package) is None:
            raise DataError(f"{package}: not installed; pip install 'llqr[translation]'")
    name = source_of(config).lower()
    if name == "number-words":
        pairs = number_words()
    elif name == "help-texts":
        pairs = libreoffice_help(*([config.data] if config.data else []))
    elif name != "iwslt14":
        raise ValueError(f"read: expected iwslt14, help-texts or number-words, got {name!r}")
    elif config.data is None:
        raise DataError(
            "data: iwslt14 needs data=FOLDER (the documentation's page Data says where it comes "
            "from); scale=small and scale=smoke need none"
        )
    elif (Path(config.data) / "train.tags.de-en.de").exists():
        pairs = iwslt14_raw(config.data)
    else:
        pairs = iwslt14_tokenised(config.data)
        sides = ([pair[side] for pair in pairs.train] for side in (0, 1))
        source, target = (Words(side) for side in sides)
        return _limit_pairs(pairs, config), source, target
    bpe = Bpe.learn(chain.from_iterable(pairs.train), config.input.bpe)
    return _limit_pairs(pairs, config), bpe, bpe


def _limit_pairs(pairs: Pairs, config: DictConfig) -> Pairs:
    """Return the first pairs of each part; a tenth of the limit to validate and to test."""
    limit = config.input.limit
    few = limit and -(-limit // 10)
    return Pairs(pairs.train[:limit], pairs.valid[:few], pairs.test[:few])


class Translation:
    """Pairs of sentences in batches of tokens.

    Args:
        config: of the run.
        workers: the processes.
    """

    metric = "bleu"
    keys = frozenset(
        {"read", "data", "train.tokens", "train.label_smoothing", "refresh.batch"}
        | {"input.limit", "input.bpe", "report.beam", "report.length_penalty"}
    )

    def __init__(self, config: DictConfig, workers: Workers) -> None:
        """Load the data and build the network."""
        self.config, self.workers = config, workers
        pairs, source, self.target = read_pairs(config)
        how = "raw text, joint BPE" if isinstance(source, Bpe) else "tokenised files, their words"
        self.data_about = describe_data(
            f"{len(pairs.train):,} pairs, {how}: {len(source):,} and {len(self.target):,} tokens",
            *chain.from_iterable(chain(pairs.train, pairs.valid, pairs.test)),
        )
        # Search and BLEU take long: each process translates its part.
        mine = slice(workers.rank, None, workers.size)  # of what is evaluated
        parts = (pairs.train, pairs.valid[mine], pairs.test[mine])
        self.train, self.valid, self.test = (Sentences(p, source, self.target) for p in parts)
        self.lengths = self.train.lengths()
        sizes = {"classes": len(self.target), "source": len(source)}
        self.network = network_of(config, workers.device, **sizes)
        self.steps = len(self.epoch_batches(0))

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch; those that have no pair for some process are left out."""
        draws = generator_for(self.config.seed, "order", epoch)
        found = token_batches(self.lengths, self.config.train.tokens, draws)
        return [batch for batch in found if len(batch) >= self.workers.size]

    def batches(self, epoch: int, first: int) -> Iterator[tuple[TokenBatch, float]]:
        """Yield this process's part of every batch of an epoch, from number ``first`` on."""
        for batch in self.epoch_batches(epoch)[first:]:
            yield self._weighted_part(batch)

    def _weighted_part(self, batch: Sequence[int]) -> tuple[TokenBatch, float]:
        """Return a part, and its share of the batch's tokens times the number of processes."""
        rank, size = self.workers.rank, self.workers.size
        mine = batch[rank::size]
        share = sum(self.lengths[i][1] for i in mine) / sum(self.lengths[i][1] for i in batch)
        return self.train.batch(mine).to(self.workers.device), size * share

    def forward(self, model: nn.Module, batch: tuple[TokenBatch, float], step: int) -> Forward:
        """Return the pass of a batch: the loss is the mean over its tokens."""
        tokens, weight = batch
        smoothing = self.config.train.label_smoothing

        def forward() -> tuple[Tensor, Tensor]:
            logits = model(tokens.source, tokens.prefix)
            loss = F.cross_entropy(
                logits.flatten(0, 1),
                tokens.target.flatten(),
                ignore_index=PAD,
                label_smoothing=smoothing,
            )
            return (loss if weight == 1 else weight * loss), logits

        return forward

    def refresh(self, model: nn.Module, step: int) -> Forward:
        """Return the pass of a minibatch of sentences of its own."""
        draws = generator_for(self.config.seed, "refresh", step)
        chosen = torch.randperm(len(self.train), generator=draws)[: self.config.refresh.batch]
        return self.forward(model, self._weighted_part(chosen.tolist()), step)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return BLEU, the token error (percent) and the loss a token, of the validation pairs."""
        self.network.eval()
        loss = 0.0
        wrong = count = 0
        for chosen in token_batches(self.valid.lengths(), self.config.train.tokens):
            batch = self.valid.batch(chosen).to(self.workers.device)
            logits = self.network(batch.source, batch.prefix).float()
            targets = batch.target.flatten()
            loss += float(
                F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=PAD, reduction="sum")
            )
            errors, tokens = token_error(logits, batch.target)
            wrong, count = wrong + errors, count + tokens
        loss, wrong, count = self.workers.sum_over_processes([loss, wrong, count])
        return {
            "validation_loss": loss / count,
            "token_error": 100 * wrong / count,
            "bleu": self.bleu_of(self.valid),
        }

    def finish(self) -> dict[str, float]:
        """Return the BLEU of the test pairs, of the last epoch's network."""
        return {"test_bleu": self.bleu_of(self.test)}

    def bleu_of(self, sentences: Sentences) -> float:
        """Return the BLEU of the beam's best translations."""
        texts = translate_all(
            self.network,
            sentences,
            self.target,
            beam=self.config.report.beam,
            penalty=self.config.report.length_penalty,
            tokens=self.config.train.tokens,
        )
        references = [b for _, b in sentences.pairs]
        return corpus_bleu(self.workers.gather_lists(texts), self.workers.gather_lists(references))
