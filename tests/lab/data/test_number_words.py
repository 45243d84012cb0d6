"""Number words in both languages."""

import pytest

from llqr_lab.data.number_words import LIMIT, english_words, german_words, number_words

SAID = {
    0: ("null", "zero"),
    1: ("eins", "one"),
    16: ("sechzehn", "sixteen"),
    17: ("siebzehn", "seventeen"),
    21: ("einundzwanzig", "twenty-one"),
    30: ("dreißig", "thirty"),
    100: ("einhundert", "one hundred"),
    101: ("einhunderteins", "one hundred one"),
    1001: ("eintausendeins", "one thousand one"),
    1011: ("eintausendelf", "one thousand eleven"),
    31_416: ("einunddreißigtausendvierhundertsechzehn", "thirty-one thousand four hundred sixteen"),
    99_999: (
        "neunundneunzigtausendneunhundertneunundneunzig",
        "ninety-nine thousand nine hundred ninety-nine",
    ),
}


@pytest.mark.parametrize("number", SAID)
def test_words(number):
    assert (german_words(number), english_words(number)) == SAID[number]


def test_no_two_numbers_have_the_same_words():
    assert (
        len({german_words(n) for n in range(LIMIT)})
        == len({english_words(n) for n in range(LIMIT)})
        == LIMIT
    )


def test_the_parts_are_apart_and_always_the_same():
    pairs = number_words(50, 10, 10)
    everything = [*pairs.train, *pairs.valid, *pairs.test]
    assert len(set(everything)) == 70 and number_words(50, 10, 10) == pairs
