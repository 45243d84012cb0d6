"""Small networks of every kind with their losses, and their curvature in full."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr
from explicit import F64, gauss_newton, gradient_and_hessian, split, vector
from tiny import STRUCTURES

Y = torch.tensor([0, 2, 1, 1, 0, 2])
TARGET = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(3))


class Case:
    """A model, its outputs, and the loss as a function of them."""

    def __init__(
        self, model: nn.Module, run: Callable[[nn.Module], Any], loss: Callable[[Any], Tensor]
    ) -> None:
        self.model, self.loss = model.to(F64).eval(), loss
        with torch.no_grad():  # away from the small default initialisation
            for p in self.model.parameters():
                p.copy_(0.7 * torch.randn_like(p))
        self.outputs = lambda: run(self.model)

    def __call__(self) -> tuple[Tensor, Any]:
        z = self.outputs()
        return self.loss(z), z

    @functools.cached_property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    @functools.cached_property
    def matrices(self) -> dict[str, Tensor]:
        """g and C in full."""
        fisher = gauss_newton(self.outputs(), self.loss, self.parameters)
        with sdpa_kernel(SDPBackend.MATH):  # the attention kernel that has second derivatives
            g, hessian = gradient_and_hessian(self()[0], self.parameters)
        return {"g": g, "fisher": fisher, "newton": hessian}


def product(model: llqr.QuadraticModel, parameters: list[Tensor], d: Tensor) -> Tensor:
    return vector(model.product(split(d, parameters)))


def matrix(model: llqr.QuadraticModel, parameters: list[Tensor]) -> Tensor:
    """C, column by column."""
    n = sum(p.numel() for p in parameters)
    return torch.stack([product(model, parameters, e) for e in torch.eye(n, dtype=F64)], 1)


def cross_entropy(rows: int, classes: int = 3, **options: Any) -> Callable[[Tensor], Tensor]:
    y = torch.randint(classes, (rows,))
    return lambda z: F.cross_entropy(z.reshape(-1, classes), y, **options)


# -- networks --------------------------------------------------------------------------------------


def mlp(activation: type[nn.Module] = nn.Tanh) -> Case:
    x = torch.randn(6, 4, dtype=F64)
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))
    net = Case(model, lambda m: m(x), cross_entropy(6))
    net.x = x
    return net


def conv_net() -> Case:
    x = torch.randn(4, 2, 5, 5, dtype=F64)
    norm = nn.BatchNorm2d(3)
    norm.running_mean = 0.3 * torch.randn(3)
    norm.running_var = 0.5 + torch.rand(3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), norm, nn.GELU(), nn.Flatten(), nn.Linear(27, 3)
    )
    return Case(model, lambda m: m(x), cross_entropy(4))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def attention() -> Case:
    x = torch.randn(2, 3, 4, dtype=F64)
    return Case(SelfAttention(), lambda m: m(x), cross_entropy(6))


def encoder() -> Case:
    x = torch.randn(2, 3, 4, dtype=F64)
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True, norm_first=True)
    return Case(nn.Sequential(layer, nn.Linear(4, 3)), lambda m: m(x), cross_entropy(6))


def embedding() -> Case:
    tokens = torch.randint(7, (3, 4))
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3))
    return Case(model, lambda m: m(tokens), cross_entropy(3))


class Tied(nn.Module):
    """The embedding is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


def tied() -> Case:
    tokens = torch.randint(6, (2, 4))
    return Case(Tied(), lambda m: m(tokens), cross_entropy(8, 6))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def gru() -> Case:
    x = torch.randn(3, 4, 3, dtype=F64)
    return Case(Recurrent(), lambda m: m(x), cross_entropy(3))


NETS: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "mlp-relu": lambda: mlp(nn.ReLU),
    "conv-bn": conv_net,
    "attention": attention,
    "encoder": encoder,
    "embedding": embedding,
    "tied": tied,
    "gru": gru,
}


@functools.cache
def case(name: str) -> Case:
    with torch.random.fork_rng([]):
        torch.manual_seed(sorted(NETS).index(name))
        return NETS[name]()


def with_loss(loss: Callable[[Any], Tensor]) -> Case:
    x = torch.randn(6, 4, dtype=F64)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Case(model, lambda m: m(x), loss)


# -- all kinds of parameters -----------------------------------------------------------------------


class Zoo(nn.Module):
    """A class token, a position table, a number, convolutions both ways, an embedding, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.empty(1, 1, 4))
        self.position = nn.Parameter(torch.empty(1, 7, 4))
        self.temperature = nn.Parameter(torch.empty(()))
        self.conv = nn.Conv2d(2, 4, 2, stride=2)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        features = self.conv(images)
        parts = [self.cls.expand(len(images), 1, 4), features.flatten(2).mT, self.embed(words)]
        h = torch.tanh(self.norm(torch.cat(parts, 1) + self.position)).mean(1)
        return self.temperature * self.head(h) + self.up(torch.tanh(features)).mean((2, 3))


def zoo() -> Case:
    images, words = torch.randn(5, 2, 4, 4, dtype=F64), torch.randint(5, (5, 2))
    return Case(Zoo(), lambda m: m(images, words), cross_entropy(5))


class Trio(nn.Module):
    """As few parameters as show a table, a transposed convolution, a matrix and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, 3, 2))
        self.up = nn.ConvTranspose1d(2, 3, 2)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(torch.tanh(x + self.position).mT)).mean(-1))


def trio() -> Case:
    x = torch.randn(6, 3, 2, dtype=F64)
    return Case(Trio(), lambda m: m(x), cross_entropy(6))


# -- geometries on them ----------------------------------------------------------------------------

LEARNED = [s for s in STRUCTURES if s != "identity"]


def bound(problem, structure="diagonal", **settings) -> llqr.LLQR:
    """A geometry on a problem in evaluation mode, ready to refresh."""
    geometry = llqr.LLQR(structure, **settings)
    problem.model.eval()
    geometry.bind(problem.model)
    return geometry


def copied(geometry: llqr.LLQR) -> dict[str, dict[str, Tensor]]:
    return {n: {k: v.clone() for k, v in e.items()} for n, e in geometry.state().items()}


def entries(geometry: llqr.LLQR) -> Tensor:
    return vector(v for e in geometry.state().values() for v in e.values())
