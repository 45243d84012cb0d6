"""What holds what: a model that is dropped frees its graphs at once, without the collector."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr
from explicit import F64
from llqr.curvature.expansions import _table
from replaced import Heads, Net, ready

WAYS = [("fisher", w) for w in _table.GAUSS_NEWTON_WAYS] + [
    ("newton", w) for w in _table.NEWTON_WAYS
]


@pytest.fixture(autouse=True, scope="module")
def compiled_by_torch() -> None:
    """At its first use in a process torch compiles derivatives of forward mode.

    The frames of that, ours among them, are left to the collector.
    """
    dual = torch.autograd.forward_ad
    with warnings.catch_warnings(), dual.dual_level(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        probed()(dual.make_dual(torch.randn(4, 2, 5, dtype=F64), torch.randn(4, 2, 5, dtype=F64)))


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(params=WAYS, ids=lambda way: way[1].__name__)
def curvature(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A curvature, whose first way is the one under test."""
    name, way = request.param
    table = "NEWTON_WAYS" if name == "newton" else "GAUSS_NEWTON_WAYS"
    ways = getattr(_table, table)
    monkeypatch.setattr(_table, table, ways[ways.index(way) :])
    return name


class Probed(nn.Module):
    """Every replaced operation; weak references to what its forwards make."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.body, self.after = nn.Linear(4, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        self.alive: list[weakref.ref[Any]] = []
        self.breaks = ""

    def note(self, *tensors: Tensor) -> None:
        for t in tensors:
            self.alive.append(weakref.ref(t))
            if t.grad_fn is not None:
                # Held by the graph only: the node is freed with it, and takes this along.
                token = Token()
                t.grad_fn.metadata["token"] = token
                self.alive.append(weakref.ref(token))

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self.conv(x)).tanh().mT
        b = Breakable.apply(F.gelu(self.after(self.body(a))), self)
        c = F.scaled_dot_product_attention(b, b, b)
        z = self.head(c.mean(1))
        self.note(a, b, c, z)
        if self.breaks == "forward":
            raise ValueError("on purpose")
        return z

    def count(self) -> int:
        return sum(r() is not None for r in self.alive)


class Token:
    """Something that a weak reference can point to."""


class Breakable(torch.autograd.Function):
    """The identity, with all derivatives; its backward raises when asked to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net: Probed) -> Tensor:
        ctx.net = net
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.net.breaks == "backward":
            raise ValueError("on purpose")
        return 1 * g, None

    @staticmethod
    def jvp(ctx: Any, d: Tensor, _: None) -> Tensor:
        return 1 * d


def fails(call: Callable[..., Any], *arguments: Any) -> None:
    """See that a call fails, and keep nothing of the error."""
    try:
        call(*arguments)
    except ValueError as error:
        assert str(error) == "on purpose"
    else:
        pytest.fail("no error")


def forward_of(net: Probed, rows: int = 4) -> Callable[[], tuple[Tensor, Tensor]]:
    x, y = torch.randn(rows, 2, 5, dtype=F64), torch.randint(3, (rows,))

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return F.cross_entropy(z, y), z

    return forward


def probed() -> Probed:
    return Probed().to(F64).eval()


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_dropped_model_frees_its_graphs(curvature: str, micro_batch: int | None) -> None:
    net = probed()
    forwards = [forward_of(net), forward_of(net)]
    parameters = list(net.parameters())
    model = llqr.quadratic_model(forwards, parameters, curvature, micro_batch=micro_batch)
    for _ in range(2):
        model.product(model.gradient)
    model.value(model.gradient)
    assert net.alive
    assert (net.count() == 0) or micro_batch is None
    gradient, image = model.gradient, model.product(model.gradient)
    expansions = [weakref.ref(t._expansion) for _, t in model._terms if t._expansion is not None]
    assert len(expansions) == (2 if micro_batch is None else 0)
    del model
    assert net.count() == 0
    assert all(e() is None for e in expansions)
    assert all(v.grad_fn is None for v in [*gradient, *image])


def test_the_graph_lives_as_long_as_the_model(curvature: str) -> None:
    """Otherwise the test above would pass with references to what nothing keeps."""
    net = probed()
    model = llqr.quadratic_model(forward_of(net), list(net.parameters()), curvature)
    model.product(model.gradient)
    kept = net.count()
    # Newton by differences keeps no graph at all.
    by_differences = type(model._terms[0][1]._expansion).__name__ == "NewtonByDifferences"
    assert (kept == 0) if by_differences else (kept > 0)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_after_an_error_inside_a_product(curvature: str, micro_batch: int | None) -> None:
    """Raised by a backward pass, whose nodes torch's engine has in a queue by then."""
    net = probed()
    forwards, parameters = [forward_of(net), forward_of(net)], list(net.parameters())
    model = llqr.quadratic_model(forwards, parameters, curvature, micro_batch=micro_batch)
    net.breaks = "backward"
    fails(model.product, model.gradient)
    assert net.count() == 0 or micro_batch is None
    net.breaks = ""
    image = model.product(model.gradient)  # nothing is lost
    assert any(bool(v.any()) for v in image)
    net.breaks = "backward"
    fails(model.product, model.gradient)
    del model
    assert net.count() == 0


def test_after_an_error_in_the_forward(curvature: str) -> None:
    net = probed()
    parameters = list(net.parameters())
    forwards = [forward_of(net), forward_of(net)]
    model = llqr.quadratic_model(forwards, parameters, curvature, micro_batch=1)
    net.breaks = "forward"
    fails(model.product, model.gradient)
    assert net.count() == 0
    fails(llqr.quadratic_model, forwards, parameters, curvature)
    assert net.count() == 0


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_after_a_way_that_lacked_a_derivative(curvature: str) -> None:
    """The graph of the way that failed goes when the next one begins."""
    net = probed()
    inner = forward_of(net)
    bag = nn.EmbeddingBag(5, 3).to(F64)
    seen: list[int] = []

    def forward() -> tuple[Tensor, Tensor]:
        seen.append(net.count())
        loss, z = inner()
        shift = bag(torch.arange(4).view(4, 1)).tanh()
        return loss + F.cross_entropy(z + shift, torch.tensor([0, 1, 2, 1])), (z, shift)

    parameters = [*net.parameters(), *bag.parameters()]
    model = llqr.quadratic_model(forward, parameters, curvature)
    with pytest.warns(UserWarning, match="embedding_bag"):
        model.product(model.gradient)
    # What a forward meets: nothing, but for those of a product and of a comparison (of replaced
    # operations, of a Function's backward), which its own graph outlives.
    own = {"fisher": [0, 1, 0, 0, 1, 0, 1, 1, 1, 1], "newton": [0] * 10}[curvature]
    assert [min(count, 1) for count in seen] == own
    del model
    assert net.count() == 0


ONE_OPERATION: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 6, 5)),
    "batch_norm": (lambda: nn.BatchNorm2d(4), (3, 4, 3, 2)),
    "layer_norm": (lambda: nn.LayerNorm(5), (3, 4, 5)),
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "gelu": (nn.GELU, (3, 4, 6)),
    "attention": (Heads, (3, 4, 6)),
    "torch's attention": (
        lambda: nn.TransformerEncoderLayer(
            6, 2, 8, dropout=0.0, activation="gelu", batch_first=True
        ),
        (3, 4, 6),
    ),
}


@pytest.mark.parametrize("name", ONE_OPERATION)
def test_no_tensor_is_left_of_a_dropped_model(name: str) -> None:
    make, shape = ONE_OPERATION[name]
    net, x = ready(Net(make(), shape)), torch.randn(shape, dtype=F64)

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def use() -> None:
        model = llqr.quadratic_model(lambda: ((z := net(x)).square().sum(), z), net.parameters())
        model.product(model.gradient)

    use()  # what is cached once
    before = tensors()
    use()
    assert tensors() == before
