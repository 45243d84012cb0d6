"""Every kind of convolution against the product that torch's own double backward gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explicit import F64
from replaced import Net, check, ready


def conv(dim: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: [nn.Conv1d, nn.Conv2d, nn.Conv3d][dim - 1](4, 6, 3, **options)


def turned(dim: int, **options: Any) -> Callable[[], nn.Module]:
    kinds = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    return lambda: kinds[dim - 1](4, 6, 3, **options)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2, "padding": 1},
    "all at once": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
}
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}
for dim, shape in enumerate([(3, 4, 6), (2, 4, 6, 5), (2, 4, 5, 5, 5)], 1):
    for form, options in FORMS.items():
        CONVOLUTIONS[f"conv{dim}d {form}"] = (conv(dim, **options), shape)
        CONVOLUTIONS[f"conv_transpose{dim}d {form}"] = (turned(dim, **options), shape)
    for padding in ("same", "valid"):
        CONVOLUTIONS[f"conv{dim}d padding={padding}"] = (conv(dim, padding=padding), shape)
    CONVOLUTIONS[f"conv{dim}d circular"] = (conv(dim, padding=1, padding_mode="circular"), shape)
    CONVOLUTIONS[f"conv_transpose{dim}d output_padding"] = (
        turned(dim, stride=2, output_padding=1),
        shape,
    )
CONVOLUTIONS["conv2d same dilated"] = (conv(2, padding="same", dilation=2), (2, 4, 6, 5))
CONVOLUTIONS["conv2d uneven"] = (
    lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
    (2, 4, 6, 5),
)
CONVOLUTIONS["conv_transpose2d uneven"] = (
    lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(3, 2), padding=(0, 1), output_padding=(2, 0)),
    (2, 4, 6, 5),
)
CONVOLUTIONS["conv2d depthwise"] = (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 5))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    make, shape = CONVOLUTIONS[name]
    net = ready(Net(make(), shape))
    check(net, torch.randn(shape, dtype=F64))


class Unbatched(nn.Module):
    """Convolutions of one image, without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.turn = nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.turn(torch.tanh(self.conv(image))) for image in x])


def test_unbatched_inputs():
    x = torch.randn(2, 4, 5, 4, dtype=F64)
    check(ready(Net(Unbatched(), x.shape)), x)
