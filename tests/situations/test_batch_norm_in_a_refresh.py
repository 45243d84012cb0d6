"""What a refresh sees of BatchNorm: the batch's statistics or the running ones."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import llqr
from explicit import F64, gauss_newton, vector
from llqr.geometry import Learned
from tiny import Problem, llqr_of, norm_net, optimizer_of, same, says

ROWS = 6


class Probe(llqr.StructuredGeometry):
    """Learns nothing; runs the forwards, and tells which statistics it wants."""

    def __init__(self, batch_norm: str = "batch") -> None:
        super().__init__("identity", llqr.geometry.MetricSettings(batch_norm=batch_norm))

    def learn(self, forwards, parameters, *, step, weights):
        for forward in forwards:
            forward()
        return Learned(None, "it is a probe", is_failure=False)


def probe(model: nn.Module, forward, batch_norm: str = "batch") -> None:
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a refresh was refused because it is a probe")
        llqr.Optimizer(base, model, geometry=Probe(batch_norm)).refresh(forward)


# -- which layers are in training mode -------------------------------------------------------------


class Own(nn.BatchNorm1d):
    """A subclass with a part of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class Functional(nn.Module):
    """Calls the function by its own mode; it stays in evaluation mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Stubborn(nn.Sequential):
    """As adapters do, it changes more than the mode in train() and eval()."""

    def train(self, mode: bool = True):
        raise AssertionError("called by a refresh")


def frozen() -> nn.Module:
    return nn.BatchNorm1d(3).eval()


LAYERS = {
    "BatchNorm": (lambda: nn.BatchNorm1d(3), True),
    "frozen": (frozen, False),
    "without running statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), True),
    "subclass": (lambda: Own(3), True),
    "SyncBatchNorm in one process": (lambda: nn.SyncBatchNorm(3), True),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), True),
    "dropout": (lambda: nn.Dropout(0.5), False),
    "a module of one's own": (lambda: Functional(3), False),
}


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
@pytest.mark.parametrize("name", LAYERS)
def test_modes_of_a_refresh(name, batch_norm):
    make, trains = LAYERS[name]
    layer = make()
    model = Stubborn(nn.Conv1d(2, 3, 2), layer, nn.Dropout(0.5))
    x, seen = torch.randn(ROWS, 2, 5), []

    def forward() -> Tensor:
        z = model(x)
        seen.append((z, {m: m.training for m in model.modules()}))
        return z.square().sum()

    modes = {m: m.training for m in model.modules()}
    probe(model, forward, batch_norm)
    z, during = seen.pop()
    assert {m for m, training in during.items() if training} == (
        {layer} if trains and batch_norm == "batch" else set()
    )
    assert {m: m.training for m in model.modules()} == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    # What it computed is what these modes compute: no dropout in it.
    for module, training in during.items():
        module.training = training
    assert torch.equal(z, model(x))


def test_a_lazy_batch_norm_takes_its_size_in_a_refresh():
    layer = nn.LazyBatchNorm1d(affine=False)
    model, x = nn.Sequential(nn.Linear(2, 3), layer), torch.randn(ROWS, 2)
    probe(model, lambda: model(x).square().sum())
    assert layer.running_mean.shape == (3,) and layer.training


def test_a_model_in_evaluation_mode_stays_in_it():
    """Nothing is put into training mode that the user has not."""
    problem = norm_net()
    problem.model.eval()
    expected, _ = problem()
    seen = []
    probe(problem.model, lambda: seen.append(problem()[0]) or seen[-1])
    assert torch.equal(seen[0], expected)


def test_the_setting():
    with says(ValueError, "batch_norm", "batch, running", "'both'"):
        llqr.LLQR(batch_norm="both")
    assert llqr.LLQR().batch_norm == "batch" == llqr.Geometry().batch_norm
    assert llqr.LLQR.paper().batch_norm == "running"
    assert llqr.LLQR.paper(batch_norm="batch").batch_norm == "batch"


# -- what is learned -------------------------------------------------------------------------------


def J_at_identity(problem: Problem, parts: list[Problem], batch_norm: str) -> float:
    """Equation (9) at U = I, with explicit matrices: the plain mean over the forwards."""
    model = copy.deepcopy(problem.model)
    model.eval()
    model[1].train(batch_norm == "batch")
    parameters, values = list(model.parameters()), []
    g = sum(vector(torch.autograd.grad(loss_of(model, p)[0], parameters)) for p in parts)
    g = g / len(parts)
    for part in parts:
        z = model(part.x)
        C = gauss_newton(z, lambda z, part=part: F.cross_entropy(z, part.y), parameters)
        values.append(float(-g @ g + 0.5 * g @ C @ g))
    return sum(values) / len(parts)


def loss_of(model: nn.Module, part: Problem) -> tuple[Tensor, Tensor]:
    z = model(part.x)
    return F.cross_entropy(z, part.y), z


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_each_forward_has_its_own_statistics_and_leaves_no_trace(batch_norm, micro_batch, momentum):
    problem = norm_net(dropout=0.5)
    problem.model[1].momentum = momentum
    problem()  # running statistics of their own
    parts = [problem.part(0, 2), problem.part(2, 6)]
    geometry = llqr.LLQR("kfac", lr=1e-2, ema=0.0, batch_norm=batch_norm, micro_batch=micro_batch)
    optimizer = optimizer_of(problem, geometry=geometry)
    before = copy.deepcopy(problem.model.state_dict())
    assert before["1.num_batches_tracked"] == 1
    random = torch.get_rng_state()
    report = optimizer.refresh(parts)
    same(problem.model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    expected = J_at_identity(problem, parts, batch_norm)
    assert report.J_before == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_activation_checkpointing_meets_the_same_statistics(curvature):
    """It runs the norm again in the products."""

    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Sequential, on: bool) -> None:
            super().__init__()
            self.body, self.on = body, on

        def forward(self, x: Tensor) -> Tensor:
            inner, outer = self.body[:4], self.body[4:]
            return outer(checkpoint(inner, x, use_reentrant=False) if self.on else inner(x))

    found = []
    for on in (False, True):
        problem = norm_net(dropout=0.5)
        problem.model = Checkpointed(problem.model, on)
        optimizer = optimizer_of(problem, geometry=llqr_of(curvature=curvature, ema=0.0))
        before = copy.deepcopy(problem.model.state_dict())
        optimizer.refresh(problem)
        same(problem.model.state_dict(), before)
        found.append(optimizer.geometry.state())
    for name, entries in found[0].items():
        for key, value in entries.items():
            torch.testing.assert_close(found[1][name][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_value_per_channel_has_no_variance(rows):
    """A last minibatch of one row: the norm takes its running statistics, and says so once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
    problem = Problem(model, torch.randn(ROWS, 4, dtype=F64), torch.randint(3, (ROWS,)))
    problem()
    optimizer = optimizer_of(problem, geometry=llqr_of(ema=0.0))
    parts = [problem.part(0, rows), problem.part(rows, ROWS)]
    warns = pytest.warns(UserWarning, match="one value per channel") if rows == 1 else nullcontext()
    with warns:
        report = optimizer.refresh(parts)
    optimizer.refresh(parts)  # told once
    assert model[1].training and not model[1]._forward_pre_hooks
    if rows == 1:
        model[1].eval()
    parameters = list(model.parameters())
    first = vector(torch.autograd.grad(parts[0]()[0], parameters))
    model[1].train()
    second = vector(torch.autograd.grad(parts[1]()[0], parameters))
    assert report.gradient_norm == pytest.approx(float((first + second).norm()) / 2, rel=1e-10)


# -- why it is the default -------------------------------------------------------------------------


def test_batch_statistics_keep_J_of_the_function_that_is_trained():
    """In evaluation mode the network is another function, on which no step would be safe."""
    pytest.importorskip("sklearn")
    from llqr_lab.data.digits import digits

    torch.manual_seed(0)
    data = digits(0, noise=0.0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for i in torch.randint(len(data.train_x), (11, 64)):
        x, y = data.train_x[i], data.train_y[i]
        loss = F.cross_entropy(model(x), y)
        base.zero_grad()
        loss.backward()
        base.step()
    problem = Problem(model, x, y)
    J = {}
    for statistics in ("batch", "running"):
        geometry = llqr.LLQR("diagonal", lr=1e-2, steps=1, constraint="none", batch_norm=statistics)
        J[statistics] = optimizer_of(problem, geometry=geometry).refresh(problem).J_before
    assert J["batch"] < 5 and J["running"] > 200, J
