"""Sentences and their translations: the splits, and reading them from lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError, explain_errors, required_path

__all__ = ["Pair", "Pairs", "parallel_lines"]

Pair = tuple[str, str]  # source sentence, target sentence


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs to train on, to choose by, and to report on."""

    train: Sequence[Pair]
    valid: Sequence[Pair]
    test: Sequence[Pair]


def parallel_lines(source: Path, target: Path, how: str) -> list[Pair]:
    """Return the pairs of two files with a sentence a line; pairs with an empty side are left out.

    Raises:
        DataError: a file is missing, no UTF-8, or they differ in their number of lines.
    """
    texts = []
    for path in (source, target):
        with explain_errors(required_path(path, how), how):
            # Not splitlines(): it also splits at separators that occur inside sentences.
            texts.append(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    if len(texts[0]) != len(texts[1]):
        raise DataError(
            f"{source}: {len(texts[0])} lines, but {target} has {len(texts[1])}; line by line they "
            f"are translations of each other. {how}"
        )
    stripped = ((a.strip(), b.strip()) for a, b in zip(*texts, strict=True))
    return [(a, b) for a, b in stripped if a and b]
