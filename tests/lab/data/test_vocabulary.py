"""BPE and word vocabularies, there and back."""

from pathlib import Path

import pytest

from llqr_lab.data.tokens import EOS, PAD, SPECIAL, UNKNOWN
from llqr_lab.data.vocabulary import Bpe, Words

LINES = ["der kleine hund, der bellt", "die kleine katze", "the little dog", "Größe: 3 x 4!"] * 3


@pytest.fixture
def bpe() -> Bpe:
    pytest.importorskip("tokenizers", reason="the extra 'translation' is not installed")
    return Bpe.learn(LINES, 60)


def test_bpe_there_and_back(bpe: Bpe):
    assert [bpe.tokenizer.token_to_id(t) for t in SPECIAL] == [PAD, EOS, UNKNOWN]
    assert 40 < len(bpe) <= 60
    for line in LINES:
        tokens = bpe.encode(line)
        assert tokens[-1] == EOS and not {PAD, EOS, UNKNOWN} & set(tokens[:-1])
        assert bpe.decode(tokens) == line
    assert len(bpe.encode("die kleine katze")) < len("die kleine katze")
    assert bpe.decode(bpe.encode("der  hund ")) == "der  hund "
    assert UNKNOWN in bpe.encode("hund ß € q")


def test_bpe_is_the_same_again_and_from_its_file(bpe: Bpe, tmp_path: Path):
    bpe.save(tmp_path / "bpe.json")
    for other in (Bpe.learn(LINES, 60), Bpe.load(tmp_path / "bpe.json")):
        assert other.tokenizer.get_vocab() == bpe.tokenizer.get_vocab()
        assert other.encode("katzen bellen") == bpe.encode("katzen bellen")


def test_words():
    words = Words(["wor@@ t wor@@ t a", "b a </s>"])
    assert words.tokens == [*SPECIAL, "a", "t", "wor@@", "b"]
    assert len(words) == 7
    assert words.encode("a neu wor@@ t") == [3, UNKNOWN, 5, 4, EOS]
    assert words.decode([5, 5, 4, 3, EOS, PAD]) == "worwort a"
