"""Every way of differentiating, and what it works through: against C in full, or a clear word.

The explicit C needs only first derivatives (J row by row, H of a small function), so it also
serves where an operation has no double backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import llqr
from explicit import F64, agree, gauss_newton, split, vector
from llqr.curvature import twice_differentiable
from llqr.curvature._forwards import RepeatableForward
from llqr.curvature.expansions import Expansion
from llqr.curvature.expansions._newton import NewtonExpansion
from llqr.curvature.expansions._table import GAUSS_NEWTON_WAYS, NEWTON_WAYS
from nets import NETS, case
from tiny import says

Y = torch.tensor([0, 2, 1, 1])


class Net(nn.Module):
    """Modules, a forward from them to 4 x 3 logits, and an input."""

    def __init__(self, run: Callable[..., Tensor], x: Tensor, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run, self.x = run, x
        self.to(F64).eval()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.5 * torch.randn_like(p))

    def logits(self) -> Tensor:
        return self.run(self, self.x)

    def forward(self) -> tuple[Tensor, Tensor]:
        z = self.logits()
        return F.cross_entropy(z, Y), z


def flat(n: int = 5) -> Tensor:
    return torch.randn(4, n, dtype=F64)


def image(*size: int) -> Tensor:
    return torch.randn(4, 2, *size, dtype=F64)


def pooled(z: Tensor) -> Tensor:
    """Mean over all but the batch and three channels."""
    return z.flatten(2).mean(2)


def conv(make: Callable[..., nn.Module], *size: int, **options: Any) -> Net:
    return Net(lambda m, x: pooled(m.c(x).tanh()), image(*size), c=make(2, 3, 3, **options))


def normed(norm: nn.Module, *size: int) -> Net:
    hidden = nn.Conv2d(2, 4, 1) if size else nn.Linear(5, 4)
    x = image(*size) if size else flat()
    head = nn.Linear(4, 3)

    def run(m: Net, x: Tensor) -> Tensor:
        h = m.n(m.a(x)).tanh()
        return m.h(h.flatten(2).mean(2) if size else h)

    return Net(run, x, a=hidden, n=norm, h=head)


def batch_norm() -> Net:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return normed(norm, 3, 3)


def tied() -> Net:
    def run(m: Net, x: Tensor) -> Tensor:
        return F.linear(m.e(x).mean(1).tanh(), m.e.weight)

    return Net(run, torch.randint(3, (4, 2)), e=nn.Embedding(3, 4))


def recurrent(kind: type[nn.RNNBase]) -> Net:
    x = torch.randn(4, 3, 2, dtype=F64)
    return Net(
        lambda m, x: m.h(m.r(x)[0][:, -1]), x, r=kind(2, 3, batch_first=True), h=nn.Linear(3, 3)
    )


def sampled(m: Net, x: Tensor) -> Tensor:
    grid = m.a(x).tanh().view(4, 2, 2, 2)
    return pooled(F.grid_sample(IMAGE, grid, align_corners=False))


IMAGE = torch.randn(4, 3, 5, 5, dtype=F64)


def attend(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.a(x).chunk(3, -1)
    return m.h(F.scaled_dot_product_attention(q, k, v)[:, 0])


def tokens() -> Tensor:
    return torch.randn(4, 3, 4, dtype=F64)


def encoder() -> Net:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return Net(lambda m, x: m.h(m.t(x)[:, 0]), tokens(), t=layer, h=nn.Linear(4, 3))


def multi_head() -> Net:
    return Net(
        lambda m, x: m.h(m.t(x, x, x, need_weights=False)[0][:, 0]),
        tokens(),
        t=nn.MultiheadAttention(4, 2, batch_first=True),
        h=nn.Linear(4, 3),
    )


def linears(between: Callable[[Tensor], Tensor]) -> Net:
    """Two linear layers with something between them."""
    return Net(lambda m, x: m.b(between(m.a(x))), flat(), a=nn.Linear(5, 4), b=nn.Linear(4, 3))


class Twofold(torch.autograd.Function):
    """A user's own Function, with derivatives of all orders."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class Once(Twofold):
    """The same, once differentiable: its second backward is cut off without an error."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class Cut(Twofold):
    """The same, with a backward that loses its dependence."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.detach() * ctx.saved_tensors[0].cos()


class Forward(Once):
    """The same, with a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def jvp(ctx: Any, d: Tensor) -> Tensor:
        return d * ctx.saved_tensors[0].cos()


def checkpointed(reentrant: bool) -> Net:
    def run(m: Net, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        inner = nn.Sequential(m.a, nn.Tanh(), m.n)
        return m.b(checkpoint(inner, x, use_reentrant=reentrant))

    return Net(run, flat(), a=nn.Linear(5, 4), n=nn.LayerNorm(4), b=nn.Linear(4, 3))


FINE: dict[str, Callable[[], Net]] = {
    "linear": lambda: linears(torch.tanh),
    "conv1d": lambda: conv(nn.Conv1d, 6, stride=2, padding=1),
    "conv2d": lambda: conv(nn.Conv2d, 4, 4, padding=1, bias=False),
    "conv2d-dilated": lambda: conv(nn.Conv2d, 6, 6, dilation=2),
    "conv2d-same": lambda: conv(nn.Conv2d, 4, 4, padding="same"),
    "conv2d-circular": lambda: conv(nn.Conv2d, 4, 4, padding=1, padding_mode="circular"),
    "conv3d": lambda: conv(nn.Conv3d, 3, 3, 3),
    "transposed": lambda: conv(nn.ConvTranspose2d, 3, 3, stride=2, output_padding=1),
    "grouped": lambda: Net(
        lambda m, x: pooled(m.c(x.repeat(1, 3, 1, 1))), image(4, 4), c=nn.Conv2d(6, 3, 3, groups=3)
    ),
    "batch-norm": batch_norm,
    "group-norm": lambda: normed(nn.GroupNorm(2, 4), 3, 3),
    "instance-norm": lambda: normed(nn.InstanceNorm2d(4, affine=True), 3, 3),
    "layer-norm": lambda: normed(nn.LayerNorm(4)),
    "rms-norm": lambda: normed(nn.RMSNorm(4)),
    "embedding": lambda: Net(
        lambda m, x: m.h(m.e(x).mean(1).tanh()),
        torch.randint(6, (4, 3)),
        e=nn.Embedding(6, 4),
        h=nn.Linear(4, 3),
    ),
    "tied": tied,
    "rnn": lambda: recurrent(nn.RNN),
    "gru": lambda: recurrent(nn.GRU),
    "lstm": lambda: recurrent(nn.LSTM),
    "weight-norm": lambda: Net(lambda m, x: m.a(x).tanh(), flat(), a=weight_norm(nn.Linear(5, 3))),
    "grid-sample": lambda: Net(sampled, flat(), a=nn.Linear(5, 8)),
    "einsum": lambda: linears(lambda h: torch.einsum("bi,bj->bij", h, h).sum(2)),
    "fft": lambda: linears(lambda h: torch.fft.rfft(h).abs()[:, [0, 1, 2, 1]]),
    "sort": lambda: linears(lambda h: h.sort(1).values * torch.arange(4.0, dtype=F64)),
    "topk": lambda: linears(lambda h: h.topk(2, 1).values.repeat(1, 2).square()),
    "scatter": lambda: linears(
        lambda h: torch.zeros_like(h).scatter_add(1, torch.tensor([[0, 0, 1, 2]] * 4), h.exp())
    ),
    "attention": lambda: Net(attend, tokens(), a=nn.Linear(4, 12), h=nn.Linear(4, 3)),
    "multi-head": multi_head,
    "encoder-layer": encoder,
    "checkpoint": lambda: checkpointed(reentrant=False),
    "own-function": lambda: linears(Twofold.apply),
}
# name -> net, what the warning names, the way that is taken, digits
SLOWER: dict[str, tuple[Callable[[], Net], str, str, float]] = {
    "embedding-bag": (
        lambda: Net(
            lambda m, x: m.h(m.e(x).tanh()),
            torch.randint(6, (4, 3)),
            e=nn.EmbeddingBag(6, 4),
            h=nn.Linear(4, 3),
        ),
        "embedding_bag",
        "central differences",
        1e-6,
    ),
    "cdist": (
        lambda: linears(lambda h: torch.cdist(h, IMAGE[0, 0, :4, :4]).square()),
        "cdist",
        "central differences",
        1e-6,
    ),
    "once": (lambda: linears(Once.apply), "Once", "central differences", 1e-6),
    "cut": (lambda: linears(Cut.apply), "Cut", "central differences", 1e-6),
    "forward": (lambda: linears(Forward.apply), "Forward", "forward-mode", 1e-10),
}


def is_twice_differentiable(f: Callable[[Tensor], Tensor], *shape: int) -> bool:
    """Ask torch: grid_sample and cdist are not in every version."""
    x = torch.zeros(shape, dtype=F64, requires_grad=True)
    try:
        (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(first.sum(), x)
    except RuntimeError:
        return False
    return True


if not is_twice_differentiable(
    lambda grid: F.grid_sample(IMAGE[:1], grid, align_corners=False), 1, 1, 1, 2
):
    net = FINE.pop("grid-sample")
    SLOWER["grid-sample"] = (net, "grid_sampler", "central differences", 1e-6)
if is_twice_differentiable(lambda x: torch.cdist(x, IMAGE[0, 0, :4, :4]), 2, 4):
    FINE["cdist"] = SLOWER.pop("cdist")[0]


def explicit(net: Net) -> Tensor:
    parameters = list(net.parameters())
    return gauss_newton(net.logits(), lambda z: F.cross_entropy(z, Y), parameters)


def directions(parameters: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(p) for p in parameters]


@pytest.mark.parametrize("name", list(FINE))
def test_products_without_a_word(name: str) -> None:
    torch.manual_seed(0)
    net = FINE[name]()
    parameters = list(net.parameters())
    C = explicit(net)
    model = llqr.quadratic_model(net, parameters)
    for _ in range(2):
        d = directions(parameters)
        agree(vector(model.product(d)), C @ vector(d), 1e-10)
    gradient = torch.autograd.grad(net()[0], parameters)
    agree(vector(model.gradient), vector(gradient), 1e-12)


@pytest.mark.parametrize("way", [*GAUSS_NEWTON_WAYS, *NEWTON_WAYS], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", NETS)
def test_each_way_alone(name: str, way: type[Expansion]) -> None:
    net = case(name)
    curvature = llqr.Newton() if issubclass(way, NewtonExpansion) else llqr.Fisher()
    C = net.matrices["newton" if issubclass(way, NewtonExpansion) else "fisher"]
    with twice_differentiable():
        expansion = way(RepeatableForward(net, net.parameters), net.parameters, curvature, True)
        agree(vector(expansion.gradient), net.matrices["g"])
        for _ in range(2):
            d = torch.randn_like(net.matrices["g"])
            found = expansion.product(split(d, net.parameters))
            agree(vector(found), C @ d, 1e-6 if way.by_differences else 1e-10)
    assert float(expansion.loss) == pytest.approx(float(net()[0].detach()), rel=1e-14)
    assert expansion.rows == len(net.outputs().flatten(0, -2))


@pytest.mark.parametrize("name", list(SLOWER))
def test_products_by_a_slower_way(name: str) -> None:
    torch.manual_seed(0)
    make, operation, way, digits = SLOWER[name]
    net = make()
    parameters = list(net.parameters())
    before = [p.detach().clone() for p in parameters]
    C = explicit(net)
    model = llqr.quadratic_model(net, parameters)
    d = directions(parameters)
    with pytest.warns(UserWarning, match=f"{operation}.*{way}"):
        first = model.product(d)
    agree(vector(first), C @ vector(d), digits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, chosen once
        again = model.product([2 * v for v in d])
    agree(vector(again), 2 * (C @ vector(d)), digits)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    agree(vector(model.gradient), vector(torch.autograd.grad(net()[0], parameters)), 1e-12)


@pytest.mark.parametrize("name", ["embedding-bag", "once", "cut"])
def test_newton_by_differences(name: str) -> None:
    torch.manual_seed(0)
    make, operation, _, _ = SLOWER[name]
    net = make()
    parameters = list(net.parameters())
    names = [n for n, _ in net.named_parameters()]
    d = directions(parameters)

    def gradient(step: float) -> Tensor:
        moved = [(p + step * v).detach() for p, v in zip(parameters, d, strict=True)]
        values = {n: m.requires_grad_() for n, m in zip(names, moved, strict=True)}
        loss = torch.func.functional_call(net, values)[0]
        return vector(torch.autograd.grad(loss, list(values.values())))

    expected = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    model = llqr.quadratic_model(net, parameters, "newton")
    with pytest.warns(UserWarning, match=f"{operation}.*central differences"):
        found = model.product(d)
    agree(vector(found), expected, 1e-6)


def test_differences_replay_randomness() -> None:
    """Dropout in training mode: every forward of a product sees the same mask."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.h(m.d(m.e(x).tanh())),
        torch.randint(6, (4, 3)),
        e=nn.EmbeddingBag(6, 8),
        d=nn.Dropout(0.5),
        h=nn.Linear(8, 3),
    ).train()
    parameters = list(net.parameters())
    state = torch.get_rng_state()
    model = llqr.quadratic_model(net, parameters)
    after = torch.get_rng_state()
    d = directions(parameters)
    torch.set_rng_state(after)
    with pytest.warns(UserWarning, match="embedding_bag"):
        product = model.product(d)
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(state)
    agree(vector(product), explicit(net) @ vector(d), 1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    net = checkpointed(reentrant=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for curvature in ("fisher", "newton"):
            with says(ValueError, "reentrant", "use_reentrant=False"):
                llqr.quadratic_model(net, list(net.parameters()), curvature)


def test_other_errors_pass_through() -> None:
    """Only a missing derivative leads to another way."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise RuntimeError("out of luck")

    net = linears(Broken.apply)
    with pytest.raises(RuntimeError, match="out of luck"):
        llqr.quadratic_model(net, list(net.parameters()))


def test_a_refresh_goes_through_a_slower_way() -> None:
    torch.manual_seed(0)
    net = SLOWER["embedding-bag"][0]()
    geometry = llqr.LLQR("diagonal", lr=0.1)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, net, geometry=geometry)
    with pytest.warns(UserWarning, match="embedding_bag"):
        report = optimizer.refresh(net)
    assert report.accepted and report.J_after < report.J_before
