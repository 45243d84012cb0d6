"""Attention against the product that torch's own double backward gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explicit import F64
from llqr.curvature import twice_differentiable
from replaced import Heads, Net, check, ready


class Fixed(nn.Module):
    """Attention of which some of (q, k, v) carry no gradient; v is wider."""

    def __init__(self, constant: str) -> None:
        super().__init__()
        self.constant, self.wide = constant, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.sin(x), torch.cos(x), self.wide(x)
        q, k, v = (
            t.detach() if n in self.constant else t for n, t in zip("qkv", (q, k, v), strict=True)
        )
        return F.scaled_dot_product_attention(q, k, v)


CASES: dict[str, Callable[[], nn.Module]] = {
    "attention": Heads,
    "attention causal": lambda: Heads(is_causal=True),
    "attention scaled": lambda: Heads(scale=0.3),
    "attention with a mask": lambda: Heads(attn_mask=torch.ones(4, 4).tril().bool()),
    "attention one constant": lambda: Fixed("q"),
    "attention two constants": lambda: Fixed("kv"),
    "attention and weights": lambda: Fixed("qk"),
    "torch's attention": lambda: nn.TransformerEncoderLayer(
        6, 2, 8, dropout=0.0, activation="gelu", batch_first=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    net = ready(Net(CASES[name](), (3, 4, 6)))
    with twice_differentiable():  # for the product that is expected
        check(net, torch.randn(3, 4, 6, dtype=F64), value=1e-14)
