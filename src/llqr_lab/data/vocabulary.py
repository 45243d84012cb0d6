"""From text to token numbers and back: a BPE learned here, or the words of a tokenised text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .tokens import EOS, SPECIAL, UNKNOWN

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Bpe", "Vocabulary", "Words"]


class Vocabulary(Protocol):
    """What both kinds do."""

    def __len__(self) -> int:
        """Return the number of tokens, the special ones included."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a sentence, ended by ``</s>``."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; special ones are left out."""


class Bpe:
    """Byte-pair encoding (Sennrich et al., 2016), by the package tokenizers.

    A space is a part of the word after it, so that decoding gives the text back (in Unicode's
    normal form C); characters that the training text lacks become ``<unk>``.

    Args:
        tokenizer: from :meth:`learn` or :meth:`load`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Keep the tokenizer."""
        self.tokenizer = tokenizer

    @classmethod
    def learn(cls, lines: Iterable[str], size: int) -> Bpe:
        """Learn at most ``size`` tokens from the lines of all languages together."""
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        )
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SPECIAL), show_progress=False
        )
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> Bpe:
        """Return what :meth:`save` has written."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: str | Path) -> None:
        """Write one JSON file."""
        self.tokenizer.save(str(path))

    def __len__(self) -> int:
        """Return the number of tokens, the special ones included."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a sentence, ended by ``</s>``."""
        return [*self.tokenizer.encode(text).ids, EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; special ones are left out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


class Words:
    """The tokens of a text that is tokenised already, the most frequent first.

    Args:
        lines: sentences, tokens separated by spaces.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        """Count the tokens and number them."""
        counts = Counter(token for line in lines for token in line.split())
        by_count = sorted(counts, key=lambda token: (-counts[token], token))
        self.tokens = [*SPECIAL, *(t for t in by_count if t not in SPECIAL)]
        self.numbers = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        """Return the number of tokens, the special ones included."""
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a sentence, ended by ``</s>``."""
        return [*(self.numbers.get(token, UNKNOWN) for token in text.split()), EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, pieces ended by ``@@`` joined to the next."""
        words = (self.tokens[i] for i in tokens if i >= len(SPECIAL))
        return (" ".join(words) + " ").replace("@@ ", "").strip()
