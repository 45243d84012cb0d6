"""GELU against the product that torch's own double backward gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from explicit import F64
from replaced import Net, check, ready

CASES: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
}


@pytest.mark.parametrize("name", CASES)
def test_activations(name):
    net = ready(Net(CASES[name](), (3, 4, 6)))
    check(net, torch.randn(3, 4, 6, dtype=F64), value=1e-14)
