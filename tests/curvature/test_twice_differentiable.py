"""The forward of a refresh: no trace is left, and wrapped models are looked through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr

# -- no trace --------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Batch norm, dropout, attention: what a forward may leave traces of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.drop(self.norm(self.conv(x)).relu()).mT
        return self.head(self.encoder(h).mean(1))


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_refresh_leaves_no_trace(curvature, fails):
    model = Everything()
    model.encoder.eval()  # a mode of its own is kept
    x, y = torch.randn(4, 2, 5), torch.tensor([0, 1, 2, 1])
    modes, passes = [], []

    def forward() -> tuple[Tensor, Tensor]:
        modes.append([m for m in model.modules() if m.training])
        torch.randn(3)
        z = model(x)
        if fails:
            raise RuntimeError("on purpose")
        passes.append(z.detach())
        return F.cross_entropy(z, y), z

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    geometry = llqr.LLQR("kfac", curvature=curvature, steps=3)
    optimizer = llqr.Optimizer(base, model, geometry=geometry)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    training = {n: m.training for n, m in model.named_modules()}
    fast, random = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            optimizer.refresh(forward)
    else:
        optimizer.refresh(forward)
    assert modes and all(training == [model.norm] for training in modes)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert {n: m.training for n, m in model.named_modules()} == training
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), k
    for n, p in model.named_parameters():
        assert p.grad is grads[n][0] and torch.equal(p.grad, grads[n][1]), n
    assert optimizer.state == {}


def test_modules_beside_the_model_have_the_modes_of_a_refresh():
    model, beside = nn.Linear(4, 3), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    x, y, modes = torch.randn(6, 4), torch.arange(6) % 3, set()

    def forward() -> tuple[Tensor, Tensor]:
        modes.add((model.training, *(module.training for module in beside)))
        z = beside(model(x))
        return F.cross_entropy(z, y), z

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, model, geometry=llqr.LLQR("diagonal"), modules=[beside])
    optimizer.refresh(forward)
    assert modes == {(False, False, True)}  # norms see batch statistics
    assert all(module.training for module in [model, *beside.modules()])


# -- wrapped models --------------------------------------------------------------------------------


class DistributedDataParallel(nn.Module):
    """Wraps as torch's class of that name does; a forward through it may run hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def wrapped_refresh(wrap: Callable[[nn.Module], nn.Module], curvature: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    outer = wrap(model)

    def forward() -> tuple[Tensor, Tensor]:
        z = outer(x)
        return F.cross_entropy(z, y), z

    base = torch.optim.SGD(outer.parameters(), lr=0.1)
    geometry = llqr.LLQR("kfac", curvature=curvature, steps=5, lr=0.1, ema=0.0)
    optimizer = llqr.Optimizer(base, outer, geometry=geometry)
    if wrap is compiled:
        optimizer.minimize(forward, refresh=forward)  # compiled code runs
    report = optimizer.refresh(forward)
    return report, geometry


def compiled(model: nn.Module) -> nn.Module:
    """A backend whose graphs refuse a double backward, as inductor's do, and builds fast."""
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel])
@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_wrapped_models_are_looked_through(wrap, curvature):
    plain, geometry = wrapped_refresh(lambda model: model, curvature)
    report, inside = wrapped_refresh(wrap, curvature)
    assert report.accepted and report.J_after == plain.J_after
    assert list(inside.state()) == list(geometry.state()) == [
        "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias",
    ]  # fmt: skip
    for name, entries in geometry.state().items():
        for key, value in entries.items():
            assert torch.equal(inside.state()[name][key], value)


def test_a_compiled_model_is_refreshed_in_eager_mode():
    report, geometry = wrapped_refresh(compiled, "fisher")
    assert report.accepted and report.change > 0.01
    assert "0.weight" in geometry.state()
