"""Labelled images in memory."""

import pytest
import torch

from llqr_lab.data.images import Images


def test_statistics_are_those_of_the_floats():
    torch.manual_seed(0)
    pixels = torch.randint(256, (7, 3, 4, 5), dtype=torch.uint8)
    mean, std = Images(pixels, torch.zeros(7, dtype=torch.int64), 1).channel_statistics()
    x = pixels.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), x.mean(1))
    torch.testing.assert_close(torch.tensor(std, dtype=torch.float64), x.std(1, correction=0))


@pytest.mark.parametrize(
    ("pixels", "labels", "name"),
    [
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), "pixels"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), "pixels"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0]), "labels"),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.tensor([0, 1], dtype=torch.int32),
            "labels",
        ),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 3]), "labels"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, -1]), "labels"),
    ],
)
def test_what_does_not_fit_is_refused(pixels: torch.Tensor, labels: torch.Tensor, name: str):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Images(pixels, labels, 3)
