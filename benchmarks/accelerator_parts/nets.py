"""Small networks of every kind, the same on every device, and the language model of the timings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Classifier
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETS", "Autocast", "Dropped", "GPT", "net"]


class Autocast(Classifier):
    """A classifier whose forward runs under autocast."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, device: str, dtype: Any) -> None:
        super().__init__(model, x, y, device)
        self.device, self.dtype = device, dtype

    def __call__(self) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device, self.dtype):
            z = self.model(self.x)
            return F.cross_entropy(z.flatten(0, -2).float(), self.y.flatten()), z


class Recurrent(nn.Module):
    """The last output of a recurrent cell, and a head."""

    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Tied(nn.Module):
    """The embedding is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


class Dropped(nn.Module):
    """Keeps what its dropout let through, so that masks can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 64), nn.Linear(64, 3)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        dropped = F.dropout(h, 0.5, self.training)
        self.masks.append(dropped.detach() != 0)
        return self.head(dropped)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))


def _conv_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU()),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(72, 3)),
    )


def _conv_transpose() -> nn.Module:
    up = nn.ConvTranspose2d(2, 4, 3, stride=2)
    return nn.Sequential(up, nn.Tanh(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _attention() -> nn.Module:
    # torch's own block: attention, LayerNorm, GELU.
    block = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.Sequential(block, nn.LayerNorm(8), nn.Linear(8, 3))


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Tanh(), nn.Linear(24, 3))


#: name: the model, the shape of its input (integers below 11 if it reads tokens), its classes.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (_mlp, (6,), 3),
    "conv-bn": (_conv_norm, (2, 8, 8), 3),
    "attention": (_attention, (5, 8), 3),
    "embedding": (_embedding, (4,), 3),
    "lstm": (lambda: Recurrent(nn.LSTM(5, 8, 2, batch_first=True), 8), (6, 5), 3),
    "gru": (
        lambda: Recurrent(nn.GRU(5, 8, batch_first=True, bidirectional=True), 16),
        (6, 5),
        3,
    ),
    "conv-transpose": (_conv_transpose, (2, 5, 5), 3),
    "tied": (Tied, (4,), 11),
    "dropout": (Dropped, (6,), 3),
}
TOKENS = ("embedding", "tied")


def net(
    name: str,
    device: str,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
    rows: int = 16,
) -> Classifier:
    """Return a network with its batch: drawn in float64 on the CPU, so the same everywhere."""
    make, shape, classes = NETS[name]
    torch.manual_seed(sorted(NETS).index(name))
    model = make().double()
    if name in TOKENS:
        x = torch.randint(11, (rows, *shape))
    else:
        x = torch.randn(rows, *shape, dtype=torch.float64).to(dtype)
    # Attention and the tied net answer for every token.
    answers = (rows, shape[0]) if name in ("attention", "tied") else (rows,)
    y = torch.randint(classes, answers)
    with torch.no_grad():  # away from the small default initialisation
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model = model.to(dtype)
    if autocast is not None:
        return Autocast(model, x, y, device, autocast)
    return Classifier(model, x, y, device)


class GPTBlock(nn.Module):
    """Norm, causal attention, norm, two layers; with skip connections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (3, batch, heads, tokens, width of a head)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019), by default in its smallest size, without dropout."""

    def __init__(
        self,
        vocabulary: int = 50257,
        context: int = 1024,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.words(tokens) + self.places(places))))
