"""Means and paired differences against naive computations."""

import math

import pytest

from llqr_lab.common.output import difference_text
from llqr_lab.common.statistics import paired_by_seed, paired_difference


def test_paired_difference_against_a_naive_computation():
    a, b = [90.0, 92.5, 91.0, 95.5], [89.0, 93.0, 90.0, 92.0]
    d = [1.0, -0.5, 1.0, 3.5]
    mean = sum(d) / 4
    error = math.sqrt(sum((x - mean) ** 2 for x in d) / 3) / math.sqrt(4)
    found = paired_difference(a, b)
    assert found["mean"] == pytest.approx(mean, rel=1e-12)
    assert found["standard_error"] == pytest.approx(error, rel=1e-12)


def test_what_all_seeds_share_leaves_the_paired_error():
    """Unpaired, the spread over seeds would hide a constant difference."""
    found = paired_difference([81.0, 91.0, 71.0], [80.0, 90.0, 70.0])
    assert found == {"mean": 1.0, "standard_error": 0.0, "range": None}


def test_one_pair_has_no_error_and_of_two_both_are_said():
    assert paired_difference([3.0], [1.0]) == {"mean": 2.0, "standard_error": None, "range": None}
    found = paired_difference([3.0, 9.0], [1.0, 8.0])
    assert found == {"mean": 1.5, "standard_error": None, "range": [1.0, 2.0]}
    assert difference_text(found) == "+1.50 [+1.00, +2.00]"


def test_seeds_that_one_lacks_are_left_out():
    found = paired_by_seed({0: 3.0, 1: 5.0, 7: 100.0}, {1: 3.0, 0: 2.0, 2: -9.0})
    assert found == {"mean": 1.5, "standard_error": None, "range": [1.0, 2.0], "seeds": [0, 1]}
    assert paired_by_seed({0: 1.0}, {1: 1.0}) is None
