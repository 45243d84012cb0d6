"""Augmentation of a whole batch against one image after the other, with the same draws."""

import pytest
import torch
from torch import Generator, Tensor

from llqr_lab.data.augment import Augment, cutout, normalise, random_crop, random_flip


def draws() -> Generator:
    return Generator().manual_seed(3)


def pictures(n: int = 40, height: int = 6, width: int = 5) -> Tensor:
    generator = Generator().manual_seed(1)
    return torch.randint(1, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def test_random_crop():
    x = pictures()
    top, left = torch.randint(5, (2, len(x), 1), generator=draws())[..., 0]
    expected = torch.zeros_like(x)
    for i in range(len(x)):
        canvas = torch.zeros(3, 10, 9, dtype=torch.uint8)
        canvas[:, 2:8, 2:7] = x[i]
        expected[i] = canvas[:, top[i] : top[i] + 6, left[i] : left[i] + 5]
    torch.testing.assert_close(random_crop(x, 2, draws()), expected, rtol=0, atol=0)
    assert set(top.tolist()) == set(left.tolist()) == set(range(5))


def test_random_flip():
    x = pictures()
    chosen = torch.rand(len(x), generator=draws()) < 0.5
    flipped = random_flip(x, draws())
    for i in range(len(x)):
        expected = x[i, :, :, torch.arange(4, -1, -1)] if chosen[i] else x[i]
        assert torch.equal(flipped[i], expected)
    assert 0 < int(chosen.sum()) < len(x)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 16])
def test_cutout(side: int):
    x = torch.rand(300, 3, 6, 5) + 1
    generator = draws()
    rows = torch.randint(6, (len(x), 1), generator=generator)[:, 0].tolist()
    columns = torch.randint(5, (len(x), 1), generator=generator)[:, 0].tolist()
    expected = x.clone()
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        top, left = row - side // 2, column - side // 2
        expected[i, :, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    assert torch.equal(cutout(x, side, draws()), expected)


def test_normalise():
    x = pictures()
    mean, std = (0.1, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = torch.stack(
        [(x[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], dim=1
    ).float()
    torch.testing.assert_close(normalise(x, mean, std), expected, rtol=1e-6, atol=1e-6)


def test_all_in_their_order():
    x = pictures()
    augment = Augment((0.1, 0.5, 0.6), (0.2, 0.25, 0.3), padding=2, hole=3)
    generator = draws()
    expected = random_flip(random_crop(x, 2, generator), generator)
    expected = cutout(augment.without_augmentation(expected), 3, generator)
    assert torch.equal(augment(x, draws()), expected)
    off = Augment((0.1, 0.5, 0.6), (0.2, 0.25, 0.3), padding=0, flip=False)
    assert torch.equal(off(x, draws()), augment.without_augmentation(x))


def test_its_draws_are_its_own():
    x, augment = pictures(), Augment((0.5,) * 3, (0.5,) * 3, hole=2)
    before = torch.get_rng_state()
    first = augment(x, draws())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(augment(x, draws()), first)
