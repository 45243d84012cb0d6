"""Label noise: the exact rate, uniform over the wrong classes."""

import pytest
import torch
from torch import Generator

from llqr_lab.data.noise import flip_labels


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.6, 0.7, 0.8, 1.0])
def test_the_rate_is_exact_and_all_wrong_classes_are_as_likely(rate: float):
    labels = torch.arange(100).repeat(500)
    noisy = flip_labels(labels, rate, 100, Generator().manual_seed(0))
    wrong = noisy != labels
    assert int(wrong.sum()) == round(rate * len(labels))
    if rate:
        counts = ((noisy - labels) % 100)[wrong].bincount(minlength=100)
        assert counts[0] == 0
        expected = int(wrong.sum()) / 99
        chi2 = float(((counts[1:] - expected) ** 2 / expected).sum())
        assert 50 < chi2 < 160  # 98 degrees of freedom: mean 98, standard deviation 14
    assert torch.equal(labels, torch.arange(100).repeat(500))


def test_a_seed_decides():
    labels = torch.arange(10).repeat(20)
    first, again, other = (
        flip_labels(labels, 0.4, 10, Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("rate", "classes", "name"), [(-0.1, 10, "rate"), (1.1, 10, "rate"), (0.5, 1, "classes")]
)
def test_values_out_of_range_are_refused(rate: float, classes: int, name: str):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        flip_labels(torch.zeros(4, dtype=torch.int64), rate, classes, Generator())
