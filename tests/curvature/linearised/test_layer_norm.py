"""Layer norm against the product that torch's own double backward gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from explicit import F64
from replaced import Net, check, ready

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer_norm": (lambda: nn.LayerNorm(5), (3, 4, 5)),
    "layer_norm of two dimensions": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer_norm not affine": (lambda: nn.LayerNorm(5, elementwise_affine=False), (3, 4, 5)),
    "layer_norm no bias": (lambda: nn.LayerNorm(5, bias=False), (3, 4, 5)),
    "layer_norm eps": (lambda: nn.LayerNorm(5, eps=0.3), (3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    make, shape = NORMS[name]
    check(ready(Net(make(), shape)), torch.randn(shape, dtype=F64))
