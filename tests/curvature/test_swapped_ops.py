"""Every swapped operation against the product that torch's own double backward gives."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, gauss_newton, split, vector
from llqr.curvature import twice_differentiable
from llqr.curvature.linearised import ReplacedOperations


def plain_product(
    z: Tensor, loss: Callable[[Tensor], Tensor], parameters: list[Tensor], d: Tensor
) -> Tensor:
    """J' H J d by torch's own double backward."""
    u = torch.zeros_like(z, requires_grad=True)
    options = {"retain_graph": True, "materialize_grads": True}
    gu = torch.autograd.grad(z, parameters, u, create_graph=True, materialize_grads=True)
    (zd,) = torch.autograd.grad(gu, u, split(d, parameters), retain_graph=True)
    free = z.detach().requires_grad_()
    (gz,) = torch.autograd.grad(loss(free), free, create_graph=True)
    (hz,) = torch.autograd.grad(gz, free, zd)
    return vector(torch.autograd.grad(z, parameters, hz, **options))


class Net(nn.Module):
    """An operation between others, so that its input, too, carries a gradient."""

    def __init__(self, op: nn.Module, shape: tuple[int, ...], inner: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape[1:])) if inner else None
        self.op = op
        width = self.body(torch.zeros(shape)).shape[1]
        self.head = nn.Linear(width, 3)

    def body(self, x: Tensor) -> Tensor:
        x = x if self.scale is None else torch.sin(self.scale * x)
        return self.op(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def ready(net: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, away from the initialisation."""
    with torch.no_grad():
        for module in net.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.copy_(0.3 * torch.randn_like(module.running_mean))
                module.running_var.copy_(0.5 + torch.rand_like(module.running_var))
        for p in net.parameters():
            p.copy_(0.7 * torch.randn_like(p))
    return net.to(F64).eval()


def check(net: nn.Module, x: Tensor, tolerance: float = 1e-10, value: float = 0) -> None:
    y = torch.randint(3, (len(x),))

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return loss(z), z

    parameters = [p for p in net.parameters() if p.requires_grad]
    model = llqr.quadratic_model(forward, parameters)
    expected, _ = forward()
    # The very kernels of the network, but for attention's.
    torch.testing.assert_close(model.loss, expected.detach(), rtol=value, atol=0)
    g = vector(torch.autograd.grad(expected, parameters, materialize_grads=True))
    agree(vector(model.gradient), g, tolerance)
    for _ in range(2):
        d = torch.randn_like(g)
        expected = plain_product(net(x), loss, parameters, d)
        assert expected.any()
        agree(vector(model.product(split(d, parameters))), expected, tolerance)
    # A tangent of each parameter alone takes the operations' other branches.
    for i, p in enumerate(parameters):
        d = vector([torch.randn_like(q) if i == j else q * 0 for j, q in enumerate(parameters)])
        expected = plain_product(net(x), loss, parameters, d)
        image = vector(model.product(split(d, parameters)))
        floor = float(expected.abs().max()) or 1.0
        assert float((image - expected).abs().max()) <= tolerance * floor, tuple(p.shape)


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


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_norm 1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "batch_norm 1d of sequences": (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "batch_norm 2d": (lambda: nn.BatchNorm2d(4), (3, 4, 3, 2)),
    "batch_norm 3d": (lambda: nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    "batch_norm not affine": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 3, 2)),
    "batch_norm eps": (lambda: nn.BatchNorm2d(4, eps=0.3), (3, 4, 3, 2)),
    "batch_norm without statistics": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 3, 2),
    ),
    "layer_norm": (lambda: nn.LayerNorm(5), (3, 4, 5)),
    "layer_norm of two dimensions": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer_norm not affine": (lambda: nn.LayerNorm(5, elementwise_affine=False), (3, 4, 5)),
    "layer_norm no bias": (lambda: nn.LayerNorm(5, bias=False), (3, 4, 5)),
    "layer_norm eps": (lambda: nn.LayerNorm(5, eps=0.3), (3, 5)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    make, shape = NORMS[name]
    check(ready(Net(make(), shape)), torch.randn(shape, dtype=F64))


class Heads(nn.Module):
    """Attention over positions, from one linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.options = nn.Linear(6, 18), nn.Linear(6, 6), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out(mixed.transpose(1, 2).flatten(2))


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


DENSE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "linear no bias": lambda: nn.Linear(6, 5, bias=False),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
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


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    net = ready(Net(DENSE[name](), (3, 4, 6)))
    with twice_differentiable():  # for the product that is expected
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


def test_autocast_passes_through():
    """Values have another dtype than the parameters there."""
    net, x = Net(nn.Sequential(nn.Linear(6, 6), nn.GELU()), (3, 6)), torch.randn(3, 6)

    def forward() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            z = net(x)
        return F.cross_entropy(z.float(), torch.tensor([0, 1, 2])), z

    parameters = list(net.parameters())
    model = llqr.quadratic_model(forward, parameters)
    assert all(v.isfinite().all() for v in model.product(model.gradient))


def test_the_graph_holds_no_cotangents():
    """What torch's double backward would keep: a matrix product of cotangents a layer."""
    net = ready(Net(nn.Sequential(Heads(), nn.GELU(), nn.LayerNorm(6)), (3, 4, 6)))
    x, y = torch.randn(3, 4, 6, dtype=F64), torch.tensor([0, 1, 2])

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return F.cross_entropy(z, y), z

    model = llqr.quadratic_model(forward, net.parameters())
    rows = model._terms[0][1]._expansion._jacobian._transposed
    pending, names = [g.grad_fn for _, g in rows], set()
    while pending:
        node = pending.pop()
        if node is not None:
            names.add(node.name())
            # Below the replaced backwards; what follows leads to the inputs' own graph.
            pending += [parent for parent, _ in node.next_functions]
    assert "_OperationVjpBackward" in names
    kept = {"MmBackward0", "BmmBackward0", "GeluBackwardBackward0", "SoftmaxBackwardDataBackward0"}
    assert not names & kept, names & kept


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("frozen", [[], ["weight"], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("kind", ["conv", "batch_norm", "layer_norm"])
def test_first_and_frozen(kind, frozen, inner):
    """No gradient in the input, in the weight, in the bias, and all combinations."""
    x = torch.randn(2, 4, 5, 5, dtype=F64)
    module = {
        "conv": nn.Conv2d(4, 6, 3),
        "batch_norm": nn.BatchNorm2d(4),
        "layer_norm": nn.LayerNorm((5, 5)),
    }[kind]
    net = ready(Net(module, x.shape, inner))
    for name in frozen:
        getattr(module, name).requires_grad_(False)
    check(net, x)


def test_parameters_that_are_differentiated_by_are_not_those_of_the_operation():
    """Only the head is asked for; the operation's weights carry a graph all the same."""
    net = ready(Net(nn.Conv2d(4, 6, 3), (2, 4, 5, 5)))
    x, y = torch.randn(2, 4, 5, 5, dtype=F64), torch.tensor([0, 2])
    parameters = [*net.head.parameters(), net.op.bias]

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return F.cross_entropy(z, y), z

    model = llqr.quadratic_model(forward, parameters)
    d = torch.randn(sum(p.numel() for p in parameters), dtype=F64)
    expected = plain_product(net(x), lambda z: F.cross_entropy(z, y), parameters, d)
    agree(vector(model.product(split(d, parameters))), expected)


class Twice(nn.Module):
    """One convolution used twice, and a norm that follows in place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True)
        return F.relu(self.norm(self.conv(x)), inplace=True) + x


def test_shared_weights_and_activations_in_place():
    x = torch.randn(2, 4, 4, 3, dtype=F64)
    check(ready(Net(Twice(), x.shape)), x)


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


def test_functional_calls_with_keywords():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.zeros(6, 4, 3)), nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv1d(input=x, weight=self.w, bias=self.b, stride=(2,), padding=[1])
            return F.layer_norm(torch.sin(x), normalized_shape=[x.shape[-1]], eps=1e-3)

    x = torch.randn(3, 4, 6, dtype=F64)
    check(ready(Net(Functional(), x.shape)), x)


def test_channels_last():
    net = ready(Net(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 5, 5)))
    net.op.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5, dtype=F64).to(memory_format=torch.channels_last)
    check(net, x)


# -- where the swapped operations must not be used ------------------------------------------------


@pytest.mark.parametrize(
    "top", [lambda: nn.LayerNorm(3), lambda: nn.BatchNorm1d(3), lambda: nn.Conv1d(1, 2, 2)]
)
def test_an_operation_between_outputs_and_loss(top):
    """H runs through it, and there its inputs are not constants."""
    body, top = ready(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))), ready(top())
    x, target = torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)

    def loss(z: Tensor) -> Tensor:
        if isinstance(top, nn.Conv1d):
            return top(z[:, None]).square().square().mean()
        return (top(z) - target).square().square().mean()

    def forward() -> tuple[Tensor, Tensor]:
        z = body(x)
        return loss(z), z

    parameters = list(body.parameters())
    model = llqr.quadratic_model(forward, parameters)
    C = gauss_newton(body(x), loss, parameters)
    d = torch.randn(len(C), dtype=F64)
    agree(vector(model.product(split(d, parameters))), C @ d)


def test_only_curvatures_that_may_use_them_do(monkeypatch):
    """A Hessian needs torch's own: no mode is entered for it."""
    entered = []
    original = ReplacedOperations.__enter__
    monkeypatch.setattr(
        ReplacedOperations, "__enter__", lambda self: (entered.append(1), original(self))[1]
    )
    net = ready(Net(nn.Conv1d(4, 6, 3), (3, 4, 6)))
    x, y = torch.randn(3, 4, 6, dtype=F64), torch.tensor([0, 1, 2])

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return F.cross_entropy(z, y), z

    llqr.quadratic_model(forward, net.parameters(), "newton")
    assert entered == []
    llqr.quadratic_model(forward, net.parameters(), "fisher")
    assert entered == [1]


SWAPPED = [
    (F.conv1d, (torch.randn(2, 3, 5), torch.randn(4, 3, 2))),
    (F.conv2d, (torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2))),
    (F.conv3d, (torch.randn(2, 3, 5, 5, 5), torch.randn(4, 3, 2, 2, 2))),
    (F.conv_transpose1d, (torch.randn(2, 3, 5), torch.randn(3, 4, 2))),
    (F.conv_transpose2d, (torch.randn(2, 3, 5, 5), torch.randn(3, 4, 2, 2))),
    (F.conv_transpose3d, (torch.randn(2, 3, 5, 5, 5), torch.randn(3, 4, 2, 2, 2))),
    (F.batch_norm, (torch.randn(2, 3, 5), torch.randn(3), torch.rand(3))),
    (F.layer_norm, (torch.randn(2, 3, 5), (5,))),
]


@pytest.mark.parametrize("op, arguments", SWAPPED, ids=lambda v: getattr(v, "__name__", ""))
def test_these_are_swapped_where_gradients_flow(op, arguments):
    """Otherwise the tests above would compare torch with itself."""
    x, *rest = arguments
    x = x.clone().requires_grad_()
    plain = op(x, *rest)
    with ReplacedOperations():
        swapped = op(x, *rest)
        constant = op(x.detach(), *rest)
        with torch.no_grad():
            unwatched = op(x, *rest)
    assert torch.equal(plain, swapped) and torch.equal(plain, constant)
    assert torch.equal(plain, unwatched)
    assert type(swapped.grad_fn).__name__ != type(plain.grad_fn).__name__
    assert not constant.requires_grad and not unwatched.requires_grad


ALL = {
    "convolution": CONVOLUTIONS["conv2d plain"],
    "batch_norm": NORMS["batch_norm 2d"],
    "layer_norm": NORMS["layer_norm"],
    **{
        name: (DENSE[name], (3, 4, 6))
        for name in ("linear", "gelu", "attention", "torch's attention")
    },
}


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_is_let_go_frees_its_graph(name):
    make, shape = ALL[name]
    net, x = ready(Net(make(), shape)), torch.randn(shape, dtype=F64)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def use() -> None:
        model = llqr.quadratic_model(lambda: ((z := net(x)).square().sum(), z), net.parameters())
        model.product(model.gradient)

    use()  # what is cached once
    before = tensors()
    use()
    assert tensors() == before
