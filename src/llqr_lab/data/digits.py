"""scikit-learn's handwritten digits (1,797 pictures of 8 x 8) with noise on the training labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .images import Images, Split
from .noise import flip_labels

__all__ = ["CLASSES", "Dataset", "TEST", "VALIDATION", "digit_images", "digits", "digits_generator"]

CLASSES = 10
TEST = 500  # pictures that no training and no search sees
VALIDATION = 297  # of the other 1,297, when settings are searched
PURPOSES = ("order", "noise", "initialisation", "refresh", "split")


@dataclass(frozen=True)
class Dataset:
    """Pictures (n, 1, 8, 8) and labels (n,).

    Attributes:
        train_x: training pictures.
        train_y: the labels to train on, some of them wrong.
        true_y: the true labels of the training pictures.
        test_x: pictures to evaluate on.
        test_y: their true labels.
    """

    train_x: Tensor
    train_y: Tensor
    true_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits_generator(seed: int, purpose: str) -> torch.Generator:
    """Return a generator of its own for each purpose, so that no use of one disturbs another."""
    return torch.Generator().manual_seed(len(PURPOSES) * seed + PURPOSES.index(purpose))


def digits(seed: int, *, noise: float = 0.4, validation: bool = False) -> Dataset:
    """Load the digits, split them, and give a share of the training labels wrong values.

    The 500 test pictures are the same for every seed. With ``validation`` they are left out: the
    other 1,297 are split by the seed into 1,000 to train on and 297 to evaluate on.

    Args:
        seed: of the noise and of the validation split.
        noise: share of training labels that are wrong, in [0, 1].
        validation: evaluate on a part of the training pictures.
    """
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pictures).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[TEST:], order[:TEST]
    if validation:
        train = train[torch.randperm(len(train), generator=digits_generator(seed, "split"))]
        train, test = train[VALIDATION:], train[:VALIDATION]
    mean, std = x[train].mean(), x[train].std()
    x = (x - mean) / std
    noisy = flip_labels(y[train], noise, CLASSES, digits_generator(seed, "noise"))
    return Dataset(x[train], noisy, y[train], x[test], y[test])


def digit_images() -> Split:
    """Load the digits as images (1, 8, 8) of bytes, 0 to 240: the same 1,297 and 500 pictures."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(15 * pictures).to(torch.uint8).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = order[TEST:], order[:TEST]
    train, test = (Images(x[part], y[part], CLASSES) for part in parts)
    return Split(train, test)
