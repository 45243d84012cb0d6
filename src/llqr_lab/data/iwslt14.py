"""IWSLT14 German to English: the archive's raw text, or the files of fairseq's preparation."""

from __future__ import annotations

import html
import re
from pathlib import Path

from .errors import explain_errors, required_path
from .pairs import Pair, Pairs, parallel_lines

__all__ = ["iwslt14_raw", "iwslt14_tokenised"]

TOKENISED = (
    "Run examples/translation/prepare-iwslt14.sh of fairseq and pass the folder "
    "iwslt14.tokenized.de-en that it makes (train.de, train.en, valid.de, ...)."
)
RAW = (
    "Get the German-English texts of IWSLT 2014 (de-en.tgz, from https://wit3.fbk.eu), unpack "
    "them, and pass the folder de-en (train.tags.de-en.de, IWSLT14.TED.tst2010.de-en.de.xml, ...)."
)
# The sets that fairseq's preparation joins to the test set.
TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
SEGMENT = re.compile(r"<seg\b[^>]*>(.*?)</seg>", re.DOTALL)
# Lines of the training text that are no sentences; titles and descriptions are kept as such.
METADATA = re.compile(r"^\s*</?(url|talkid|keywords|speaker|reviewer|translator|doc|transcript)\b")
TAG = re.compile(r"</?(title|description)>")


def iwslt14_tokenised(root: str | Path) -> Pairs:
    """Load what fairseq's preparation leaves: lower-case tokens cut by BPE, separated by spaces.

    Args:
        root: the folder iwslt14.tokenized.de-en.

    Raises:
        DataError: a file is missing or damaged; says which and how to get it.
    """
    root = Path(root)
    parts = ("train", "valid", "test")
    return Pairs(*(parallel_lines(root / f"{p}.de", root / f"{p}.en", TOKENISED) for p in parts))


def iwslt14_raw(root: str | Path) -> Pairs:
    """Load the archive's raw text, split and filtered as fairseq does, in lower case.

    Every 23rd training pair is for validation; training and validation pairs have 1 to 175 words a
    side, and neither side has more than 1.5 times as many as the other. The test set joins
    dev2010, TEDX dev2012, tst2010, tst2011 and tst2012, unfiltered. Words are counted at spaces,
    since the text is not tokenised: fairseq counts after BPE.

    Args:
        root: the folder de-en.

    Raises:
        DataError: a file is missing or damaged; says which and how to get it.
    """
    root = Path(root)
    lines = _parallel_pairs(root / "train.tags.de-en.de", root / "train.tags.de-en.en")
    fitting = [pair for pair in lines if _length_fits(pair)]
    test: list[Pair] = []
    for name in TESTS:
        files = [root / f"IWSLT14.{name}.de-en.{language}.xml" for language in ("de", "en")]
        sides = [_read_segments(file) for file in files]
        with explain_errors(files[1], RAW):
            test += [(a, b) for a, b in zip(*sides, strict=True) if a and b]
    return Pairs(
        train=[pair for i, pair in enumerate(fitting) if i % 23],
        valid=fitting[::23],
        test=test,
    )


def _parallel_pairs(source: Path, target: Path) -> list[Pair]:
    pairs = parallel_lines(source, target, RAW)
    clean = [
        (TAG.sub("", a).strip().lower(), TAG.sub("", b).strip().lower())
        for a, b in pairs
        if not METADATA.match(a)
    ]
    return [(a, b) for a, b in clean if a and b]


def _length_fits(pair: Pair) -> bool:
    a, b = (len(side.split()) for side in pair)
    return 1 <= a <= 175 and 1 <= b <= 175 and max(a, b) <= 1.5 * min(a, b)


def _read_segments(path: Path) -> list[str]:
    with explain_errors(required_path(path, RAW), RAW):
        found = SEGMENT.findall(path.read_text(encoding="utf-8"))
        if not found:
            raise ValueError("there is no <seg> in it")
        return [" ".join(html.unescape(text).lower().split()) for text in found]
