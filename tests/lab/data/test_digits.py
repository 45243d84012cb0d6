"""The digits: sizes, the exact rate of noise, clean test labels, and one generator a purpose."""

import pytest
import torch

from llqr_lab.data.digits import CLASSES, TEST, VALIDATION, digits, digits_generator


@pytest.mark.parametrize("seed", [0, 7])
def test_exactly_the_share_of_training_labels_is_wrong(seed):
    data = digits(seed, noise=0.4)
    assert len(data.train_y) == 1297
    assert int((data.train_y != data.true_y).sum()) == round(0.4 * 1297)
    assert int(data.train_y.min()) == 0 and int(data.train_y.max()) == CLASSES - 1


def test_pictures_and_true_labels_are_those_of_scikit_learn():
    """Every picture of the split has the label that scikit-learn gives it; none is there twice."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    truth = {tuple(picture): int(label) for picture, label in zip(pictures, labels, strict=True)}
    assert len(truth) == 1797
    data = digits(3)
    train = torch.from_numpy(pictures).float()[split_of(data)]
    mean, std = train.mean(), train.std()
    seen = set()
    for x, y in ((data.train_x, data.true_y), (data.test_x, data.test_y)):
        for picture, label in zip((x * std + mean).round().flatten(1), y.tolist(), strict=True):
            key = tuple(picture.double().tolist())
            assert truth[key] == label
            seen.add(key)
    assert len(seen) == 1797


def split_of(data):
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return order[TEST:]


def test_the_test_pictures_do_not_depend_on_the_seed():
    a, b = digits(0), digits(1)
    assert torch.equal(a.test_x, b.test_x) and torch.equal(a.test_y, b.test_y)
    assert torch.equal(a.true_y, b.true_y) and not torch.equal(a.train_y, b.train_y)


def test_the_same_seed_gives_the_same_data():
    a, b = digits(5), digits(5)
    assert torch.equal(a.train_x, b.train_x) and torch.equal(a.train_y, b.train_y)


def test_validation_never_sees_the_test_pictures():
    scale = digits(0)
    test = {tuple(v) for v in unscaled(scale.test_x, scale)}
    data = digits(4, validation=True)
    assert len(data.test_y) == VALIDATION and len(data.train_y) == 1297 - VALIDATION
    assert int((data.train_y != data.true_y).sum()) == round(0.4 * 1000)
    for x in (data.train_x, data.test_x):
        assert not test & {tuple(v) for v in unscaled(x, data)}


def unscaled(x, data):
    """Return integer pictures: 0 is the commonest value of the border, 16 the range."""
    low, high = data.train_x.min(), data.train_x.max()
    return ((x - low) * 16 / (high - low)).round().flatten(1).int().tolist()


def test_purposes_draw_apart():
    purposes = ("order", "noise", "initialisation", "refresh", "split")
    draws = {
        float(torch.rand(1, generator=digits_generator(s, p))) for s in range(20) for p in purposes
    }
    assert len(draws) == 100
