"""Where operations are replaced, where they are not, and what their graph holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr
from explicit import F64, agree, gauss_newton, split, vector
from llqr.curvature.linearised import ReplacedOperations
from replaced import Heads, Net, check, plain_product, ready


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
    pending, names = [g.node for _, g in rows], set()
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


# -- where replaced operations must not be used ----------------------------------------------------


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


def test_a_forward_that_runs_again_for_that_draws_the_same_numbers():
    """With an operation between outputs and loss the forward runs twice: with one dropout mask."""
    torch.manual_seed(0)
    body, norm = nn.Linear(4, 8).to(F64), nn.LayerNorm(8).to(F64)
    x, after = torch.randn(5, 4, dtype=F64), []

    def forward() -> tuple[Tensor, Tensor]:
        z = body(x)
        loss = norm(F.dropout(z, 0.5)).square().square().mean()
        after.append(torch.get_rng_state())
        return loss, z

    parameters = list(body.parameters())
    start = torch.get_rng_state()
    model = llqr.quadratic_model(forward, parameters)
    assert len(after) == 2 and torch.equal(after[0], after[1])
    assert torch.equal(torch.get_rng_state(), after[0])
    torch.set_rng_state(start)
    agree(vector(model.gradient), vector(torch.autograd.grad(forward()[0], parameters)))


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


REPLACED = [
    (F.conv1d, (torch.randn(2, 3, 5), torch.randn(4, 3, 2))),
    (F.conv2d, (torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2))),
    (F.conv3d, (torch.randn(2, 3, 5, 5, 5), torch.randn(4, 3, 2, 2, 2))),
    (F.conv_transpose1d, (torch.randn(2, 3, 5), torch.randn(3, 4, 2))),
    (F.conv_transpose2d, (torch.randn(2, 3, 5, 5), torch.randn(3, 4, 2, 2))),
    (F.conv_transpose3d, (torch.randn(2, 3, 5, 5, 5), torch.randn(3, 4, 2, 2, 2))),
    (F.batch_norm, (torch.randn(2, 3, 5), torch.randn(3), torch.rand(3))),
    (F.batch_norm, (torch.randn(2, 3, 5), None, None, torch.rand(3), None, True)),
    (F.layer_norm, (torch.randn(2, 3, 5), (5,))),
    (F.linear, (torch.randn(2, 5), torch.randn(4, 5))),
    (F.gelu, (torch.randn(2, 5),)),
    (F.scaled_dot_product_attention, torch.randn(3, 2, 4, 5)),
]


@pytest.mark.parametrize("op, arguments", REPLACED, ids=lambda v: getattr(v, "__name__", ""))
def test_these_are_replaced_where_gradients_flow(op, arguments):
    """Otherwise the tests above would compare torch with itself."""
    x, *rest = arguments
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        plain = op(x, *rest)
    with ReplacedOperations():
        replaced = op(x, *rest)
        constant = op(x.detach(), *rest)
        with torch.no_grad():
            unwatched = op(x, *rest)
    if op is F.scaled_dot_product_attention:  # by operations of our own
        torch.testing.assert_close([replaced, constant, unwatched], [plain] * 3)
    else:
        assert torch.equal(plain, replaced) and torch.equal(plain, constant)
        assert torch.equal(plain, unwatched)
    assert type(replaced.grad_fn).__name__ != type(plain.grad_fn).__name__
    assert not constant.requires_grad and not unwatched.requires_grad


@pytest.mark.parametrize("past", ["the parameters", "another output of the operation", "nothing"])
def test_a_loss_that_reads_past_its_output_has_the_whole_gradient(past):
    w = torch.randn(3, 4, 2, dtype=F64, requires_grad=True)

    def forward() -> tuple[Tensor, Tensor]:
        z, other, _ = w.unbind()
        loss = F.cross_entropy(z, torch.tensor([0, 1, 1, 0]))
        extra = {"the parameters": w.square().sum(), "nothing": 0.0}
        return loss + extra.get(past, other.square().sum()), z

    (expected,) = torch.autograd.grad(forward()[0], [w])
    assert torch.equal(llqr.quadratic_model(forward, [w]).gradient[0], expected)
