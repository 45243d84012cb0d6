"""Linear layers against the product that torch's own double backward gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explicit import F64
from replaced import Net, check, ready

CASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "linear no bias": lambda: nn.Linear(6, 5, bias=False),
}


@pytest.mark.parametrize("name", CASES)
def test_linear_layers(name):
    net = ready(Net(CASES[name](), (3, 4, 6)))
    check(net, torch.randn(3, 4, 6, dtype=F64), value=1e-14)


def test_linear_forms_that_pass_through():
    """An input without a batch, and a weight that is a vector."""

    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.stack([F.linear(row, self.w) for row in x])
            return F.linear(torch.tanh(rows), self.v)[:, None]

    check(ready(Net(Forms(), (3, 6))), torch.randn(3, 6, dtype=F64))
