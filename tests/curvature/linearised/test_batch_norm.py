"""Batch norm against torch's own double backward, and norms that pass through to torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, gauss_newton, gradient_and_hessian, split, vector
from llqr.curvature.linearised import ReplacedOperations
from replaced import Net, check, ready

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
    "group_norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, training):
    make, shape = NORMS[name]
    check(ready(Net(make(), shape)).train(training), torch.randn(shape, dtype=F64))


# -- in training mode ------------------------------------------------------------------------------


class Repeated(nn.Module):
    """One module called twice, each time with the statistics of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.sin(self.norm(x)) * x) + self.norm(x.square())


def test_several_calls_of_one_module():
    x = torch.randn(3, 4, 3, 2, dtype=F64)
    check(ready(Net(Repeated(), x.shape)).train(), x)


def test_channels_last():
    # Without a bias, which the mean would take out again.
    layers = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
    net = ready(Net(nn.Sequential(*layers), (2, 4, 5, 5))).train()
    net.op.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5, dtype=F64).to(memory_format=torch.channels_last)
    check(net, x)


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]])
def test_frozen_parameters(frozen):
    norm, x = nn.BatchNorm2d(4), torch.randn(3, 4, 3, 2, dtype=F64)
    net = ready(Net(norm, x.shape)).train()
    for name in frozen:
        getattr(norm, name).requires_grad_(False)
    check(net, x)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_against_explicit_curvature(curvature):
    """And in float32: as near to that as torch's own gradients are."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4))
    net, x = ready(nn.Sequential(body, nn.Linear(4, 3))).train(), 3 + torch.randn(6, 3)
    y = torch.tensor([0, 1, 2, 2, 1, 0])

    def found(dtype: torch.dtype, d: Tensor) -> Tensor:
        net.to(dtype)

        def forward() -> tuple[Tensor, Tensor]:
            z = net(x.to(dtype))
            return F.cross_entropy(z, y), z

        model = llqr.quadratic_model(forward, net.parameters(), curvature)
        return vector(model.product(split(d.to(dtype), list(net.parameters()))))

    parameters = list(net.parameters())
    d = torch.randn(sum(p.numel() for p in parameters), dtype=F64)
    z = net(x.to(F64))
    if curvature == "fisher":
        C = gauss_newton(z, lambda z: F.cross_entropy(z, y), parameters)
    else:
        C = gradient_and_hessian(F.cross_entropy(z, y), parameters)[1]
    agree(found(F64, d), C @ d)
    agree(found(torch.float32, d).double(), C @ d, 1e-4)


def test_statistics_advance_once_also_if_the_forward_differentiates():
    """A derivative in the forward gets torch's own operation, which is called again for that."""
    counts = []
    for replaced in (False, True):
        torch.manual_seed(0)
        net = ready(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))).train()
        x = torch.randn(5, 3, dtype=F64, requires_grad=True)
        with ReplacedOperations() if replaced else nullcontext():
            torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        counts.append(net.state_dict())
    for name, value in counts[0].items():
        assert torch.equal(value, counts[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps, rows", [(1e-5, 1), (0.0, 3)])
def test_what_torch_refuses_is_refused_as_before(dtype, eps, rows):
    """One row is refused by every torch, eps=0 by newer ones."""
    x, w = torch.randn(rows, 2, dtype=dtype, requires_grad=True), torch.ones(2, dtype=dtype)

    def refusal():
        try:
            F.batch_norm(x, None, None, w, None, training=True, eps=eps)
        except ValueError as error:
            return str(error)
        return None

    before = refusal()
    assert rows > 1 or "more than 1 value" in before
    with ReplacedOperations():
        assert refusal() == before
