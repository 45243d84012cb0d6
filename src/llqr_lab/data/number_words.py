"""German and English number words: a translation task that needs no file.

German says the unit before the ten (dreiundzwanzig, twenty-three) and writes a number as one word,
so that words must be cut, translated and put in another order.
"""

from __future__ import annotations

import torch

from .pairs import Pair, Pairs

__all__ = ["english_words", "german_words", "number_words"]

LIMIT = 100_000
UNITS = "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split()
TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
TEENS = {16: "sechzehn", 17: "siebzehn"}
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TIES = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def german_words(number: int) -> str:
    """Return the German words of a number, 0 to 99,999.

    Example:
        >>> german_words(23), german_words(40_101)
        ('dreiundzwanzig', 'vierzigtausendeinhunderteins')
    """
    # Only a last "eins" has its s.
    return _german_below(number) + ("s" if number % 100 == 1 else "")


def _german_below(number: int) -> str:
    for size, name in ((1000, "tausend"), (100, "hundert")):
        if number >= size:
            count, rest = divmod(number, size)
            return _german_below(count) + name + (_german_below(rest) if rest else "")
    if number < len(UNITS):
        return UNITS[number]
    if number < 20:
        return TEENS.get(number, UNITS[number - 10] + "zehn")
    ten, unit = divmod(number, 10)
    return (UNITS[unit] + "und" if unit else "") + TENS[ten - 2]


def english_words(number: int) -> str:
    """Return the English words of a number, 0 to 99,999.

    Example:
        >>> english_words(23), english_words(40_101)
        ('twenty-three', 'forty thousand one hundred one')
    """
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            count, rest = divmod(number, size)
            return f"{english_words(count)} {name}" + (f" {english_words(rest)}" if rest else "")
    if number < len(ONES):
        return ONES[number]
    ten, unit = divmod(number, 10)
    return TIES[ten - 2] + (f"-{ONES[unit]}" if unit else "")


def number_words(train: int = 6000, valid: int = 300, test: int = 300) -> Pairs:
    """Draw distinct numbers below 100,000, always the same, and say them in both languages."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(LIMIT, generator=generator)[: train + valid + test].tolist()
    pairs: list[Pair] = [(german_words(n), english_words(n)) for n in order]
    return Pairs(pairs[:train], pairs[train : train + valid], pairs[train + valid :])
